"""Agent-CSwin: the CSwin Transformer (arXiv 2107.00652) with agent attention, over the whole map, in two stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from agentsd.vision.attention import AgentPooling, Grid, depthwise, to_map, to_tokens
from agentsd.vision.build import build, default_cfg
from agentsd.vision.pyramid import Pyramid, check_attn_type, drop_path

Attend = Callable[[Tensor, Tensor, Tensor, Grid], Tensor]


def attend_in_stripes(attend: Attend, lepe: nn.Module, qkv: Sequence[Tensor], grid: Grid, stripes: Grid) -> Tensor:
    """Attention inside each of (rows, columns) stripes of the map, plus a convolution of the values in it (LePE).

    (B, H * W, C) queries, keys and values -> (B, H * W, C)
    """
    (height, width), (rows, columns) = grid, stripes
    if height % rows or width % columns:
        raise ValueError(
            f"a map of {height}x{width} does not divide into {rows}x{columns} stripes: Agent-CSwin takes images "
            "whose height and width are multiples of 32"
        )
    stripe = (height // rows, width // columns)
    split = (rows, stripe[0], columns, stripe[1])
    q, k, v = (x.unflatten(1, split).transpose(2, 3).flatten(3, 4).flatten(0, 2) for x in qkv)
    x = attend(q, k, v, stripe) + to_tokens(lepe(to_map(v, stripe)))
    x = x.unflatten(0, (-1, rows, columns)).unflatten(3, stripe)  # (B, rows, columns, h, w, C)
    return x.transpose(2, 3).flatten(1, 4)


class SoftmaxBranch(nn.Module):
    """Softmax attention in stripes."""

    def __init__(self, dim: int, num_heads: int, stripes: Grid, attn_drop: float = 0.0):
        super().__init__()
        self.num_heads, self.stripes, self.attn_drop = num_heads, stripes, attn_drop
        self.get_v = depthwise(dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        return attend_in_stripes(self.attend, self.get_v, (q, k, v), grid, self.stripes)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        return x.transpose(1, 2).flatten(2)


class AgentBranch(AgentPooling):
    """Agent attention in stripes, each with agents of its own; `grid` is that of the map that is striped."""

    def __init__(self, dim: int, num_heads: int, stripes: Grid, grid: Grid, agents: int, attn_drop: float = 0.0):
        stripe = (grid[0] // stripes[0], grid[1] // stripes[1])
        super().__init__(dim, num_heads, stripe, agents, attn_drop=attn_drop)
        self.stripes = stripes
        self.get_v = depthwise(dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        return attend_in_stripes(self.attend, self.get_v, (q, k, v), grid, self.stripes)


class CSwinBlock(nn.Module):
    """Pre-norm block whose channels are shared out to its branches: one over the whole map, or one along each axis."""

    def __init__(
        self,
        dim: int,
        branches: Sequence[nn.Module],
        mlp_ratio: float,
        drop_path_rate: float,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attns = nn.ModuleList(branches)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path = drop_path(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        qkv = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        shares = zip(*(tensor.chunk(len(self.attns), dim=-1) for tensor in qkv), strict=True)
        attended = [attn(q, k, v, grid) for attn, (q, k, v) in zip(self.attns, shares, strict=True)]
        x = x + self.drop_path(self.proj_drop(self.proj(torch.cat(attended, dim=-1))))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.unflatten(1, grid)


class ConvMerge(nn.Module):
    """3x3 convolution of stride 2 and a norm: (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C')."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, 2, 1)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class AgentCSwin(Pyramid):
    """Four stages of blocks, with convolutions in front of them and a norm behind the last.

    Args: as `Pyramid`, and
        embed_dim: channels of the first stage, doubled in each that follows.
        num_heads: of each stage.
        agents: agents of each stage.
        attn_type: for each stage "A" (agent attention) or "B" (softmax attention).
        stripes: how many stripes each stage's map is cut into, along either axis; 1 for the whole map.
    """

    def __init__(
        self,
        img_size: int | Grid = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 4.0,
        agents: Sequence[int] = (9, 16, 49, 49),
        attn_type: str = "AABB",
        stripes: Sequence[int] = (1, 1, 2, 1),
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        **options: Any,
    ):
        dims = [embed_dim * 2**i for i in range(len(depths))]
        super().__init__(img_size, in_chans, num_classes, dims, depths, **options)
        check_attn_type(attn_type)
        self.stage1_conv_embed = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim, 7, 4, 2), ChannelsLast(), nn.LayerNorm(embed_dim)
        )
        for i, (dim, heads, kind) in enumerate(zip(dims, num_heads, attn_type, strict=True)):
            cuts = [(1, stripes[i]), (stripes[i], 1)] if stripes[i] > 1 else [(1, 1)]
            branch = (
                partial(AgentBranch, grid=self.grid(i), agents=agents[i], attn_drop=attn_drop_rate)
                if kind == "A"
                else partial(SoftmaxBranch, attn_drop=attn_drop_rate)
            )
            blocks = [
                CSwinBlock(
                    dim,
                    [branch(dim // len(cuts), heads // len(cuts), cut) for cut in cuts],
                    mlp_ratio,
                    rate,
                    proj_drop_rate,
                )
                for rate in self.drop_path_rates[i]
            ]
            if i:
                self.add_module(f"merge{i}", ConvMerge(dims[i - 1], dim))
            self.add_module(f"stage{i + 1}", nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(dims[-1])
        self.finish()

    def stage_modules(self, stage: int) -> list[str]:
        return [f"stage{stage + 1}", f"merge{stage}" if stage else "stage1_conv_embed"]

    def forward_stage(self, stage: int, x: Tensor) -> Tensor:
        blocks, embed = (getattr(self, name) for name in self.stage_modules(stage))
        return self.run_blocks(blocks, embed(x))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^stage(\d)\." if coarse else r"^stage(\d)\.(\d+)"
        return {
            "stem": r"^stage1_conv_embed",
            "blocks": [(blocks, None), (r"^merge(\d)", (0,)), (r"^norm", (99999,))],
        }


def _create(variant: str, pretrained: bool, **options: Any) -> nn.Module:
    return build(AgentCSwin, variant, pretrained, {"dynamic_img_size": True}, **options)


_cfg = partial(default_cfg, first_conv="stage1_conv_embed.0", pool_size=(7, 7))
default_cfgs = generate_default_cfgs(
    {
        "agent_cswin_tiny.in1k": _cfg(),
        "agent_cswin_small.in1k": _cfg(),
        "agent_cswin_base.in1k": _cfg(),
        "agent_cswin_base.in1k_384": _cfg(input_size=(3, 384, 384), pool_size=(12, 12)),
    }
)


@register_model
def agent_cswin_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """Agent-CSwin-T: 20.5M parameters."""
    return _create("agent_cswin_tiny", pretrained, **options)


@register_model
def agent_cswin_small(pretrained: bool = False, **options: Any) -> nn.Module:
    """Agent-CSwin-S: 32.8M parameters."""
    return _create("agent_cswin_small", pretrained, **{"depths": (3, 6, 29, 2), **options})


@register_model
def agent_cswin_base(pretrained: bool = False, **options: Any) -> nn.Module:
    """Agent-CSwin-B: 73.2M parameters."""
    sizes = {"embed_dim": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32)}
    return _create("agent_cswin_base", pretrained, **{**sizes, **options})
