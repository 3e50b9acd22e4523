"""What the three pyramids (PVT, Swin, CSwin) share: timm's conventions for a model of four stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, to_2tuple
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from agentsd.vision.attention import GRID_AXES, Grid

POSITION_NAMES = (*GRID_AXES, "an_bias", "na_bias", "ac_bias", "ca_bias", "pos_embed", "relative_position_bias_table")


def check_attn_type(attn_type: str) -> None:
    if set(attn_type) - {"A", "B"}:
        raise ValueError(f"attn_type={attn_type!r}: for each stage 'A' (agent attention) or 'B' (softmax attention)")


def drop_path(rate: float) -> nn.Module:
    return DropPath(rate) if rate > 0 else nn.Identity()


class Block(nn.Module):
    """Pre-norm transformer block on (B, H, W, C) maps.

    Args:
        attn: called with (B, H * W, C) tokens and their grid (H, W).
        eps: of the norms.
        proj_drop: dropout in the MLP.
    """

    def __init__(
        self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path_rate: float, eps: float, proj_drop: float = 0.0
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attn
        self.drop_path1 = drop_path(drop_path_rate)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path2 = drop_path(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        x = x + self.drop_path1(self.attn(self.norm1(x), grid))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.unflatten(1, grid)


class Pyramid(nn.Module):
    """Four stages of maps at strides 4, 8, 16 and 32, mean pooling and a linear classifier.

    A family gives `forward_stage` and `stage_modules`, and ends its constructor with `finish`.

    Args:
        img_size: pixels, (height, width) or one number for both. Sizes the positions' parameters.
        dims, depths: channels and blocks of each stage.
        global_pool: "avg", or "" for the map itself.
        drop_rate: dropout in front of the classifier.
        drop_path_rate: stochastic depth, growing linearly from 0 in the first block to this in the last.
        dynamic_img_size: take images of any size, stretching what depends on the position.
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        img_size: int | Grid,
        in_chans: int,
        num_classes: int,
        dims: Sequence[int],
        depths: Sequence[int],
        *,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
    ):
        super().__init__()
        self.img_size: Grid = to_2tuple(img_size)
        self.in_chans, self.dims, self.depths = in_chans, tuple(dims), tuple(depths)
        self.num_stages, self.num_features, self.head_hidden_size = len(depths), dims[-1], dims[-1]
        self.dynamic_img_size, self.drop_rate, self.grad_checkpointing = dynamic_img_size, drop_rate, False
        self.drop_path_rates: list[list[float]] = calculate_drop_path_rates(
            drop_path_rate, list(depths), stagewise=True
        )
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**stage, "module": self.stage_modules(stage)[0]}
            for stage, dim in enumerate(dims)
        ]
        self.norm: nn.Module = nn.Identity()
        self.num_classes, self.global_pool = num_classes, global_pool

    def finish(self) -> None:
        """Adds the classifier and initialises the weights."""
        self.reset_classifier(self.num_classes)
        self.init_weights()

    def grid(self, stage: int) -> Grid:
        """(H, W) of a stage's map for images of `img_size`."""
        stride = 4 * 2**stage
        return self.img_size[0] // stride, self.img_size[1] // stride

    def forward_stage(self, stage: int, x: Tensor) -> Tensor:
        """One stage with what embeds or merges in front of it: (B, C, H, W) images for the first, then
        (B, H, W, C) maps -> (B, H', W', C').
        """
        raise NotImplementedError

    def stage_modules(self, stage: int) -> list[str]:
        """Names of the modules and parameters that a stage may have, that of its blocks first."""
        raise NotImplementedError

    def forward_feature(self, stage: int, x: Tensor) -> Tensor:
        """What a stage's map is given out as: (B, H, W, C) -> (B, H, W, C)."""
        return x

    def run_blocks(self, blocks: nn.Module, x: Tensor) -> Tensor:
        for block in blocks.children():
            x = checkpoint(block, x) if self.grad_checkpointing and self.training else block(x)
        return x

    def check_size(self, x: Tensor) -> None:
        size = (x.shape[2], x.shape[3])
        if not self.dynamic_img_size and size != self.img_size:
            raise ValueError(
                f"an image of {size[0]}x{size[1]} for a model of {self.img_size[0]}x{self.img_size[1]}: give "
                "create_model that `img_size` (checkpoints are resized to it), or `dynamic_img_size=True`"
            )

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of the stages, (B, C, H, W) each: timm's arguments, and what it returns for them."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: maps are given as 'NCHW'")
        take, last = feature_take_indices(self.num_stages, indices)
        self.check_size(x)
        maps = []
        for stage in range(last + 1 if stop_early else self.num_stages):
            x = self.forward_stage(stage, x)
            if stage in take:
                final = norm and stage == len(self.depths) - 1
                feature = self.norm(x) if final else self.forward_feature(stage, x)
                maps.append(feature.permute(0, 3, 1, 2).contiguous())
        if intermediates_only:
            return maps
        return self.norm(x) if stage == len(self.depths) - 1 else x, maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages behind the last of `indices`, and what ends the model; returns the indices."""
        take, last = feature_take_indices(self.num_stages, indices)
        for stage in reversed(range(last + 1, self.num_stages)):
            for name in self.stage_modules(stage):
                parent, _, child = name.rpartition(".")
                if hasattr(self.get_submodule(parent), child):
                    delattr(self.get_submodule(parent), child)
        shortened, self.num_stages = last + 1 < self.num_stages, last + 1
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.head_hidden_size = self.dims[last]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H / 32, W / 32, C)"""
        self.check_size(x)
        for stage in range(self.num_stages):
            x = self.forward_stage(stage, x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool:
            x = x.mean(dim=(1, 2))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.global_pool = self.global_pool if global_pool is None else global_pool
        if self.global_pool not in ("avg", ""):
            raise ValueError(f"global_pool={self.global_pool!r}: 'avg', or '' for none")
        self.num_classes = num_classes
        head: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head = head.to(next(self.parameters())).train(self.training)

    @torch.no_grad()
    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("pos_embed"):
                nn.init.trunc_normal_(parameter, std=0.02)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Position embeddings and biases."""
        return {n for n, _ in self.named_parameters() if n.rpartition(".")[2].rstrip("1234") in POSITION_NAMES}
