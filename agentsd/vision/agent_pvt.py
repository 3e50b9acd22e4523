"""Agent-PVT: the Pyramid Vision Transformer (arXiv 2102.12122) with agent attention in its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models import generate_default_cfgs, register_model
from timm.models.pvt_v2 import Attention
from torch import Tensor, nn

from agentsd.vision.attention import Grid, ReducedAgentAttention, stretch, to_map
from agentsd.vision.build import build, default_cfg, grid_told, resize_positions
from agentsd.vision.pyramid import Block, Pyramid, check_attn_type

DIMS = (64, 128, 320, 512)
DOWNSTREAM_AGENTS = ((12, 12), (16, 16), (28, 28), (28, 28))


class AgentPVT(Pyramid):
    """Four stages, each with a patch embedding, position embeddings of its own, and blocks.

    Args: as `Pyramid`, and
        num_heads, mlp_ratios: of each stage.
        agents: agents of each stage.
        attn_type: for each stage "A" (agent attention) or "B" (softmax attention).
        sr_ratios: spatial reduction of the keys and values of "B" stages.
        agent_sr_ratios: the same of "A" stages.
        downstream_agent_shapes: (rows, columns) that agents are pooled to at run time, for each stage; by default
            the square that `agents` says.
    """

    def __init__(
        self,
        img_size: int | Grid = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (2, 2, 2, 2),
        dims: Sequence[int] = DIMS,
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        agents: Sequence[int] = (9, 16, 49, 49),
        attn_type: str = "AAAA",
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        agent_sr_ratios: Sequence[int] = (1, 1, 1, 1),
        downstream_agent_shapes: Sequence[Grid] | None = None,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        **options: Any,
    ):
        super().__init__(img_size, in_chans, num_classes, dims, depths, **options)
        check_attn_type(attn_type)
        shapes: Sequence[Grid | None] = downstream_agent_shapes or [None] * len(depths)
        drops = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        for i, (dim, heads, kind) in enumerate(zip(dims, num_heads, attn_type, strict=True)):
            grid = self.grid(i)
            source, patch = (dims[i - 1], 2) if i else (in_chans, 4)
            embed = PatchEmbed(None, patch, source, dim, norm_layer=nn.LayerNorm, output_fmt="NHWC")
            attention = (
                partial(
                    ReducedAgentAttention,
                    dim, heads, grid, agents[i], sr_ratio=agent_sr_ratios[i], agent_shape=shapes[i], **drops,
                )
                if kind == "A"
                else partial(Attention, dim, heads, sr_ratio=sr_ratios[i], **drops)
            )  # fmt: skip
            blocks = [
                Block(dim, attention(), mlp_ratios[i], rate, 1e-6, proj_drop_rate) for rate in self.drop_path_rates[i]
            ]
            self.register_parameter(f"pos_embed{i + 1}", nn.Parameter(torch.empty(1, grid[0] * grid[1], dim)))
            self.add_module(f"patch_embed{i + 1}", embed)
            self.add_module(f"block{i + 1}", nn.Sequential(*blocks))
        self.finish()
        self.register_load_state_dict_pre_hook(self._resize_loaded)

    def stage_modules(self, stage: int) -> list[str]:
        return [f"block{stage + 1}", f"patch_embed{stage + 1}", f"pos_embed{stage + 1}"]

    def forward_stage(self, stage: int, x: Tensor) -> Tensor:
        blocks, embed, position = (getattr(self, name) for name in self.stage_modules(stage))
        x = embed(x.permute(0, 3, 1, 2) if stage else x)
        position = stretch(to_map(position, self.grid(stage)), (x.shape[1], x.shape[2]))
        return self.run_blocks(blocks, x + position.permute(0, 2, 3, 1))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^(?:block|patch_embed|pos_embed)(\d)" if coarse else r"^block(\d)\.(\d+)"
        return {"stem": r"^(?:patch_embed1|pos_embed1)", "blocks": [(blocks, None), (r"^\w+_embed(\d)", (0,))]}

    def _resize_loaded(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for stage in range(self.num_stages):
            key = f"{prefix}pos_embed{stage + 1}"
            if key in state_dict:
                told = grid_told(state_dict, f"{prefix}block{stage + 1}.0.attn")
                state_dict[key] = resize_positions(state_dict[key], self.grid(stage), told)


def _create(variant: str, pretrained: bool, **options: Any) -> nn.Module:
    features = {"dynamic_img_size": True, "downstream_agent_shapes": DOWNSTREAM_AGENTS}
    return build(AgentPVT, variant, pretrained, features, **options)


_cfg = partial(default_cfg, first_conv="patch_embed1.proj", pool_size=(7, 7))
default_cfgs = generate_default_cfgs(
    {
        "agent_pvt_tiny.in1k": _cfg(),
        "agent_pvt_small.in1k": _cfg(),
        "agent_pvt_medium.in1k": _cfg(),
        "agent_pvt_medium.in1k_256": _cfg(input_size=(3, 256, 256), pool_size=(8, 8)),
        "agent_pvt_large.in1k": _cfg(),
    }
)


@register_model
def agent_pvt_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """Agent-PVT-T: 11.6M parameters."""
    return _create("agent_pvt_tiny", pretrained, **{"depths": (2, 2, 2, 2), **options})


@register_model
def agent_pvt_small(pretrained: bool = False, **options: Any) -> nn.Module:
    """Agent-PVT-S: 20.6M parameters."""
    return _create("agent_pvt_small", pretrained, **{"depths": (3, 4, 6, 3), **options})


@register_model
def agent_pvt_medium(pretrained: bool = False, **options: Any) -> nn.Module:
    """Agent-PVT-M: 35.9M parameters."""
    return _create("agent_pvt_medium", pretrained, **{"depths": (3, 4, 18, 3), **options})


@register_model
def agent_pvt_large(pretrained: bool = False, **options: Any) -> nn.Module:
    """Agent-PVT-L: 48.7M parameters."""
    return _create("agent_pvt_large", pretrained, **{"depths": (3, 8, 27, 3), **options})
