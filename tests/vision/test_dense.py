"""Detection in torchvision, segmentation in segmentation-models-pytorch."""

from __future__ import annotations

from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from golden import image
from torch import nn

from agentsd.vision.detection import mask_rcnn, retinanet

SMALL: dict[str, dict[str, Any]] = {
    "agent_pvt_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 16, 20, 32)},
    "agent_swin_tiny": {"embed_dim": 12, "depths": (1, 1, 2, 2), "agent_blocks": (1, 1, 1, 0)},
}
AGENTS = {"img_size": 64, "downstream_agent_shapes": ((3, 3), (3, 3), (2, 2), (2, 2))}
DETECTORS = {"mask_rcnn": mask_rcnn, "retinanet": retinanet}


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("name", SMALL)
@torch.enable_grad()
def test_detector(name: str, detector: str) -> None:
    torch.manual_seed(0)
    model = DETECTORS[detector](name, 3, {**SMALL[name], **AGENTS}, min_size=64, max_size=96)
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
