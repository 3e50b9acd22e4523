"""Official checkpoints, as they are: classifiers, detectors, other sizes, and what is none."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import timm
import torch
from golden import image, official_state
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import agentsd.vision  # noqa: F401 (registers the models)

SMALL = {
    "agent_deit_tiny": {"embed_dim": 24, "depth": 2},
    "agent_pvt_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 16, 20, 32)},
    "agent_swin_tiny": {"embed_dim": 12, "depths": (1, 1, 2, 2), "agent_blocks": (1, 1, 1, 0)},
    "agent_cswin_tiny": {"embed_dim": 8, "depths": (1, 1, 1, 1)},
}
PYRAMIDS = [name for name in SMALL if name != "agent_deit_tiny"]


def created(name: str, **options: object) -> nn.Module:
    return timm.create_model(name, **{"img_size": 64, **SMALL[name], **options}).eval()


def saved(folder: Path, state: dict[str, Tensor], **extra: object) -> Path:
    torch.save({"model": state, "epoch": 299, **extra}, folder / "official.pth")
    return folder / "official.pth"


def equal(state: dict[str, Tensor], official: dict[str, Tensor]) -> bool:
    state = {key.removeprefix("model."): value for key, value in state.items()}
    return all(torch.equal(value, official[key]) for key, value in state.items() if key in official)


@pytest.mark.parametrize("name", SMALL)
def test_classifier(name: str, tmp_path: Path) -> None:
    official = official_state(created(name))
    model = created(name, checkpoint_path=saved(tmp_path, official))
    assert model.state_dict().keys() == official.keys() and equal(model.state_dict(), official)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrapped(wrapper: str | None, prefix: str, tmp_path: Path) -> None:
    official = official_state(created("agent_pvt_tiny"))
    state = {prefix + key: x for key, x in official.items()}
    torch.save({wrapper: state, "epoch": 299} if wrapper else state, tmp_path / "official.pth")
    assert equal(created("agent_pvt_tiny", checkpoint_path=tmp_path / "official.pth").state_dict(), official)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"], ids=["empty", "text"])
def test_a_file_that_is_no_checkpoint_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "official.pth"
    path.write_bytes(content)
    with pytest.raises((EOFError, RuntimeError)):
        created("agent_pvt_tiny", checkpoint_path=path)


def test_another_models_checkpoint_is_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path, official_state(created("agent_swin_tiny")))
    with pytest.raises(RuntimeError, match=r"AgentPVT[\s\S]*Missing key[\s\S]*Unexpected key"):
        created("agent_pvt_tiny", checkpoint_path=path)


def test_the_configuration_beside_the_weights_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class CfgNode(dict):
        """As yacs has it: a dictionary with attributes of its own."""

        __module__, __qualname__ = "yacs.config", "CfgNode"

    config = types.ModuleType("yacs.config")
    config.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", config)
    node = CfgNode(MODEL=CfgNode(NAME="agent_pvt_tiny"))
    node.__dict__["__immutable__"] = True
    official = official_state(created("agent_pvt_tiny"))
    path = saved(tmp_path, official, config=node)
    monkeypatch.undo()
    assert equal(created("agent_pvt_tiny", checkpoint_path=path).state_dict(), official)


@pytest.mark.parametrize("name", PYRAMIDS)
def test_classifier_into_features(name: str, tmp_path: Path) -> None:
    official = official_state(created(name, img_size=224))  # where Swin's windows are those of the features
    path = saved(tmp_path, official)
    model = created(name, img_size=224, features_only=True, checkpoint_path=path)
    assert equal(model.state_dict(), official)
    some = created(name, img_size=224, features_only=True, out_indices=(0, 1), checkpoint_path=path)
    assert len(some(image(64, 64))) == 2


@pytest.mark.parametrize("name", PYRAMIDS)
def test_detector_into_features(name: str, tmp_path: Path) -> None:
    """The backbone loads exactly, with Swin's norms of the maps; neck and heads are passed over."""
    official = official_state(created(name, features_only=True))
    detector = {f"backbone.{key}": value for key, value in official.items()}
    detector["neck.lateral_convs.0.conv.weight"] = detector["rpn_head.rpn_conv.weight"] = torch.zeros(1)
    torch.save({"state_dict": detector, "meta": {}}, tmp_path / "mask_rcnn.pth")
    model = created(name, features_only=True, checkpoint_path=tmp_path / "mask_rcnn.pth")
    assert equal(model.state_dict(), official)
    assert {key.removeprefix("model.") for key in model.state_dict()} == set(official)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(96, 96), (64, 96)])
def test_another_size(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = saved(tmp_path, official_state(created(name)))
    model = created(name, img_size=size, checkpoint_path=path)
    assert model(image(*size)).isfinite().all()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(64, 96), (64, 256), (256, 64)])  # 4 x 16 positions are 8 x 8, too
def test_a_rectangle_loads_what_it_has_saved(name: str, size: tuple[int, int]) -> None:
    official = official_state(created(name, img_size=size))
    model = created(name, img_size=size)
    model.load_state_dict(official)
    assert equal(model.state_dict(), official)


def positions(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Of each table of positions that is resized bicubically: the tokens in front, its rows and its columns."""
    found = {}
    for key in model.state_dict():
        if key == "pos_embed":
            found[key] = (1, *model.patch_embed.grid_size)
        elif key.startswith("pos_embed"):
            found[key] = (0, *model.grid(int(key[-1]) - 1))
        elif key.endswith("relative_position_bias_table"):
            rows, columns = model.get_submodule(key.rpartition(".attn.")[0]).window_size
            found[key] = (0, 2 * rows - 1, 2 * columns - 1)
    return found


def turned(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The positions of ``model`` with rows for columns."""
    tables = {}
    for key, (others, rows, columns) in positions(model).items():
        x = state[key].flatten(0, -2)
        grid = x[others:].unflatten(0, (rows, columns)).transpose(0, 1).flatten(0, 1)
        tables[key] = torch.cat([x[:others], grid]).view_as(state[key])
    return tables


@pytest.mark.parametrize("name", ["agent_deit_tiny", "agent_pvt_tiny", "agent_swin_tiny"])
@pytest.mark.parametrize("size", [(96, 64), (128, 192), (128, 128)])
def test_a_rectangle_is_stretched_from_its_own_grid(name: str, size: tuple[int, int]) -> None:
    """The checkpoint of a portrait in the place of a landscape's gives the landscape's positions, turned."""
    landscape, portrait = created(name, img_size=(64, 96)), created(name, img_size=(96, 64))
    official = official_state(landscape)
    model, other = created(name, img_size=size), created(name, img_size=size[::-1])
    model.load_state_dict(official)
    other.load_state_dict({**official_state(portrait), **turned(official, landscape)})
    found = turned(model.state_dict(), model)
    assert found
    for key, table in found.items():
        torch.testing.assert_close(table, other.state_dict()[key])


@pytest.mark.parametrize("features", [False, True])
def test_what_is_no_checkpoint_of_the_model_is_an_error(features: bool, tmp_path: Path) -> None:
    state = official_state(created("agent_pvt_tiny"))
    with pytest.raises(RuntimeError, match=r"Missing key.*an_bias"):
        path = saved(tmp_path, {k: v for k, v in state.items() if not k.endswith("an_bias")})
        created("agent_pvt_tiny", features_only=features, checkpoint_path=path)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layer1\.0\.conv1"):
        path = saved(tmp_path, {**state, "layer1.0.conv1.weight": torch.zeros(1)})
        created("agent_pvt_tiny", features_only=features, checkpoint_path=path)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*block1\.0\.attn\.ah_bias"):
        path = saved(tmp_path, {**state, "block1.0.attn.ah_bias": torch.zeros(1, 1, 16, 16, 1)})
        created("agent_pvt_tiny", features_only=features, checkpoint_path=path)


@pytest.mark.parametrize("missing", ["norm.weight", "patch_embed.norm.weight"])
def test_a_swin_without_a_norm_is_an_error(missing: str, tmp_path: Path) -> None:
    state = official_state(created("agent_swin_tiny"))
    with pytest.raises(RuntimeError, match=f"Missing key.*{missing}"):
        created("agent_swin_tiny", checkpoint_path=saved(tmp_path, {k: v for k, v in state.items() if k != missing}))


@pytest.mark.parametrize("name", SMALL)
def test_fine_tuning_takes_all_but_the_classifier(name: str, tmp_path: Path) -> None:
    """timm's `pretrained` with a file: a new classifier, and a first convolution for other channels."""
    path = saved(tmp_path, official_state(created(name)))
    overlay = {"file": str(path)}
    model = created(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10, in_chans=1)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 10)


@pytest.mark.parametrize("name", SMALL)
def test_safetensors_and_back(name: str, tmp_path: Path) -> None:
    official = official_state(created(name))
    save_file(official, tmp_path / "model.safetensors")
    model = created(name, checkpoint_path=tmp_path / "model.safetensors")
    save_file(model.state_dict(), tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == official.keys() and all(torch.equal(again[key], official[key]) for key in official)
