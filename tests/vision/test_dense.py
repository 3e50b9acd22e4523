"""Detection in torchvision, segmentation in segmentation-models-pytorch."""

from __future__ import annotations

from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from golden import filled, image
from torch import nn

from agentsd.vision.detection import mask_rcnn, retinanet

SMALL: dict[str, dict[str, Any]] = {
    "agent_pvt_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 16, 20, 32)},
    "agent_swin_tiny": {"embed_dim": 12, "depths": (1, 1, 2, 2), "agent_blocks": (1, 1, 1, 0)},
}
AGENTS = {"img_size": 64, "downstream_agent_shapes": ((3, 3), (3, 3), (2, 2), (2, 2))}
DETECTORS = {"mask_rcnn": mask_rcnn, "retinanet": retinanet}
FEW = {"rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 10, "box_batch_size_per_image": 16}


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("name", SMALL)
@torch.enable_grad()
def test_detector(name: str, detector: str) -> None:
    torch.manual_seed(0)
    proposals = FEW if detector == "mask_rcnn" else {}
    model = DETECTORS[detector](name, 3, {**SMALL[name], **AGENTS}, min_size=64, max_size=96, **proposals)
    images = [torch.rand(3, 64, 96), torch.rand(3, 80, 64)]
    masks = torch.zeros(1, 64, 96, dtype=torch.uint8)
    masks[:, 10:40, 20:60] = 1
    target = {"boxes": torch.tensor([[20.0, 10.0, 60.0, 40.0]]), "labels": torch.tensor([1]), "masks": masks}
    losses = model(images, [target, {**target, "masks": torch.zeros(1, 80, 64, dtype=torch.uint8)}])
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    body = model.backbone.body
    assert total.isfinite() and all(p.grad is not None for p in body.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        found = model(images)
    assert [set(f) >= {"boxes", "labels", "scores"} for f in found] == [True, True]
    if detector == "mask_rcnn":
        assert found[0]["masks"].shape[1:] == (1, 64, 96)


@pytest.mark.parametrize("architecture", [smp.UPerNet, smp.FPN])
@pytest.mark.parametrize("name", SMALL)
@torch.enable_grad()
def test_segmenter(name: str, architecture: type[nn.Module]) -> None:
    options = {**SMALL[name], **AGENTS}
    model = architecture(encoder_name=f"tu-{name}", encoder_weights=None, classes=4, **options)
    out = model(image(64, 96))
    assert out.shape == (2, 4, 64, 96)
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.encoder.parameters())


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("name", SMALL)
def test_detector_on_an_odd_size(name: str, detector: str) -> None:
    every = {"retinanet": {"score_thresh": 0.0}}.get(detector, {})
    model = DETECTORS[detector](name, 3, {**SMALL[name], **AGENTS}, min_size=77, max_size=123, **every).eval()
    (found,) = model([torch.rand(3, 123, 77)])
    height, width = 123, 77
    assert len(found["boxes"]) > 0
    assert found["boxes"].isfinite().all() and (found["boxes"] <= torch.tensor([width, height, width, height])).all()


@pytest.mark.parametrize("name", SMALL)
def test_segmenter_on_an_odd_size(name: str) -> None:
    """The library pads nothing and says so; padded to multiples of 32, what was asked for can be cut out."""
    model = smp.FPN(encoder_name=f"tu-{name}", encoder_weights=None, classes=4, **SMALL[name], **AGENTS).eval()
    x = image(123, 77)
    with pytest.raises(RuntimeError, match="128, 96"):
        model(x)
    padded = nn.functional.pad(x, (0, -77 % 32, 0, -123 % 32))
    assert model(padded)[..., :123, :77].isfinite().all()


@torch.enable_grad()
def test_agents_that_do_not_divide_a_rectangle() -> None:
    """Maps of 40x24 to 5x3, 7x7 to 2x2 agents: a model of any size agrees, and all parameters learn."""
    sizes = {**SMALL["agent_pvt_tiny"], "img_size": (160, 96), "agents": (49, 16, 9, 4)}
    fixed = filled(timm.create_model("agent_pvt_tiny", **sizes))
    free = filled(timm.create_model("agent_pvt_tiny", **sizes, dynamic_img_size=True))
    out = fixed(image(160, 96))
    torch.testing.assert_close(free(image(160, 96)), out)
    out.square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in fixed.parameters())
