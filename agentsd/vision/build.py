"""How a variant becomes a model: timm's builder, features on demand, and the official checkpoints' keys."""

from __future__ import annotations

from collections import OrderedDict
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


def resize_square(position: Tensor, grid: Grid, class_tokens: int = 0) -> Tensor:
    """(1, class_tokens + S * S, C) -> (1, class_tokens + H * W, C), bicubically, as the paper's fine-tuning does."""
    side = isqrt(position.shape[1] - class_tokens)
    if (side, side) == grid or side * side + class_tokens != position.shape[1]:
        return position  # the right one, or one whose wrong shape load_state_dict will tell
    return resample_abs_pos_embed(
        position, list(grid), [side, side], class_tokens, antialias=False, align_corners=False
    )


# The authors' training saves its configuration beside the weights. Read as a plain dictionary, it does no harm, and
# ``weights_only`` need not be given up.
torch.serialization.add_safe_globals([(OrderedDict, "yacs.config.CfgNode")])


class Features(FeatureGetterNet):
    """timm's `features_only`, which takes official checkpoints as they are.

    Those of classifiers, and of detectors and segmenters, whose ``backbone.`` is then what is read. Keys of what the
    features do without (the classifier, pruned stages) are passed over; any other unknown or missing key is an error.
    """

    def __init__(self, model: nn.Module, *args: Any, **options: Any):
        whole = set(model.state_dict())
        super().__init__(model, *args, **options)
        self._passed_over = whole - set(model.state_dict())
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
            if (dense and not key.startswith(backbone)) or name in self._passed_over:
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
