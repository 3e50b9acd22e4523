"""How a variant becomes a model: timm's builder, features on demand, and the official checkpoints' keys."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from agentsd.vision.attention import Grid


def default_cfg(**options: Any) -> dict[str, Any]:
    """timm's description of a variant. The authors resize without keeping the aspect ratio: that is "squash"."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "fixed_input_size": True,
        "crop_pct": 0.875,
        "crop_mode": "squash",
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2312.08874",
        "paper_name": "Agent Attention: On the Integration of Softmax and Linear Attention",
        **options,
    }


def resize_positions(x: Tensor, grid: Grid, told: Grid | None = None, others: int = 0) -> Tensor:
    """(1, others + H0 * W0, C) -> (1, others + H * W, C), bicubically, as the paper's fine-tuning does.

    Args:
        grid: (H, W).
        told: (H0, W0), where the checkpoint says so. Elsewhere it is `grid` if the number fits, or else a square.
        others: class tokens in front, which stay.
    """
    number = x.shape[1] - others
    side = isqrt(max(number, 0))
    source = next((size for size in (told, grid, (side, side)) if size and size[0] * size[1] == number), grid)
    if source == grid:
        return x  # the right one, or one whose wrong shape load_state_dict will tell
    return resample_abs_pos_embed(x, list(grid), list(source), others, antialias=False, align_corners=False)


def grid_told(state_dict: Mapping[str, Tensor], attention: str) -> Grid | None:
    """The (H, W) that the agent attention of that name was built for, by the biases of its rows and columns."""
    rows, columns = state_dict.get(f"{attention}.ha_bias"), state_dict.get(f"{attention}.wa_bias")
    return (rows.shape[2], columns.shape[3]) if rows is not None and columns is not None else None


# The authors' training saves its configuration beside the weights. Read as a plain dictionary, it does no harm, and
# ``weights_only`` need not be given up.
torch.serialization.add_safe_globals([(OrderedDict, "yacs.config.CfgNode")])


def names_of(model: nn.Module) -> set[str]:
    """Of its modules, parameters and buffers."""
    return {name for name, _ in model.named_modules()} | set(model.state_dict())


class Features(FeatureGetterNet):
    """timm's `features_only`, which takes official checkpoints as they are.

    Those of classifiers, and of detectors and segmenters, whose ``backbone.`` is then what is read. Keys of what the
    features do without (the classifier, pruned stages) are passed over; any other unknown or missing key is an error.
    """

    def __init__(self, model: nn.Module, *args: Any, **options: Any):
        whole = names_of(model)
        super().__init__(model, *args, **options)
        self._dropped = whole - names_of(model)
        self.register_load_state_dict_pre_hook(self._from_official)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)

    def _from_official(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        keys = [key for key in state_dict if key.startswith(prefix)]
        if any(key.startswith(f"{prefix}model.") for key in keys):
            return
        backbone = f"{prefix}backbone."
        dense = any(key.startswith(backbone) for key in keys)
        for key in keys:
            value = state_dict.pop(key)
            name = key.removeprefix(backbone if dense else prefix)
            gone = name in self._dropped or name.rpartition(".")[0] in self._dropped
            if gone or (dense and not key.startswith(backbone)):
                continue
            state_dict[f"{prefix}model.{name}"] = value


def build(
    cls: type[nn.Module], variant: str, pretrained: bool, features: dict[str, Any] | None = None, **options: Any
) -> nn.Module:
    """timm's builder; `features` are options that `features_only` adds: those of the authors' dense prediction."""
    if options.get("features_only"):
        options = {**(features or {}), **options}
    feature_cfg = {"out_indices": options.pop("out_indices", (0, 1, 2, 3)), "feature_cls": Features}
    return build_model_with_cfg(cls, variant, pretrained, feature_cfg=feature_cfg, **options)
