"""The agent attention module of vision transformers (equations 4 to 6 of arXiv 2312.08874)."""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agentsd.attention import agent_attention

Grid = tuple[int, int]
BLOCK = 7  # rows and columns of the block biases, before they are stretched over the tokens' grid
GRID_AXES = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}  # biases that know the grid's size, and where


def to_map(x: Tensor, grid: Grid) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W)"""
    return x.transpose(1, 2).unflatten(2, grid)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C)"""
    return x.flatten(2).transpose(1, 2)


def depthwise(channels: int) -> nn.Conv2d:
    """The 3x3 convolution that gives back to agent attention the diversity that few agents take away."""
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels)


def stretch(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Linear (one axis) or bilinear (two) interpolation of the last axes of (N, C, ...) to `size`."""
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size=size, mode="linear" if len(size) == 1 else "bilinear", align_corners=False)


class AgentPooling(nn.Module):
    """Agents pooled from the queries, the two softmaxes and their biases: agent attention but for its linear maps.

    Args:
        dim: channels C.
        num_heads: heads h, each of ``d = C / h`` channels.
        grid: (H, W) of the tokens that `ha_bias` and `wa_bias` are built for. Any other grid at run time stretches
            them linearly.
        agents: the number of agents, a square: they are pooled to ``P x P``.
        key_grid: (H, W) of the keys, where it is not that of the queries.
        agent_shape: pool to these (rows, columns) at run time instead of ``P x P``; biases are stretched to it.
        class_tokens: tokens in front of the grid. They ask and answer, but are not pooled and not convolved.
        attn_drop: dropout after each softmax.

    Raises:
        ValueError: if `dim` is not a multiple of `num_heads`, `agents` is not a square, or both `agent_shape` and
            `class_tokens` are given.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Grid,
        agents: int = 49,
        *,
        key_grid: Grid | None = None,
        agent_shape: Grid | None = None,
        class_tokens: int = 0,
        attn_drop: float = 0.0,
    ):
        super().__init__()
        side = isqrt(agents)
        if side < 1 or side * side != agents:
            raise ValueError(f"agents={agents} is not a square: they are pooled to a square grid, use 9, 16, 49 ...")
        if dim % num_heads:
            raise ValueError(f"dim={dim} is not a multiple of num_heads={num_heads}")
        if class_tokens and agent_shape:
            raise ValueError("class tokens have one bias for each agent: leave agent_shape out")
        self.num_heads, self.class_tokens, self.attn_drop = num_heads, class_tokens, attn_drop
        self.grid, self.side, self.agent_shape = grid, side, agent_shape or (side, side)
        heads, (rows, columns) = num_heads, key_grid or grid
        self.an_bias = nn.Parameter(torch.empty(heads, agents, BLOCK, BLOCK))
        self.na_bias = nn.Parameter(torch.empty(heads, agents, BLOCK, BLOCK))
        self.ah_bias = nn.Parameter(torch.empty(1, heads, agents, rows, 1))
        self.aw_bias = nn.Parameter(torch.empty(1, heads, agents, 1, columns))
        self.ha_bias = nn.Parameter(torch.empty(1, heads, grid[0], 1, agents))
        self.wa_bias = nn.Parameter(torch.empty(1, heads, 1, grid[1], agents))
        if class_tokens:
            self.ac_bias = nn.Parameter(torch.empty(1, heads, agents, class_tokens))
            self.ca_bias = nn.Parameter(torch.empty(1, heads, class_tokens, agents))
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(self._stretch_loaded)

    def reset_parameters(self) -> None:
        for bias in self.parameters(recurse=False):
            nn.init.trunc_normal_(bias, std=0.02)

    def position_bias(self, block: Tensor, rows: Tensor, columns: Tensor, grid: Grid) -> Tensor:
        """(h, n, 7, 7), (h, n, H0), (h, n, W0) -> (h, agents, H * W): the bias of each position for each agent.

        Positions are stretched before agents. A row bias has one value for all columns, so to stretch it along the
        rows is to stretch the map.
        """
        bias = stretch(block, grid) + stretch(rows, grid[:1])[..., None] + stretch(columns, grid[1:])[..., None, :]
        bias = bias.flatten(2)
        if self.agent_shape == (self.side, self.side):
            return bias
        per_position = bias.transpose(1, 2).unflatten(2, (self.side, self.side))  # (h, H * W, P, P)
        return stretch(per_position, self.agent_shape).flatten(2).transpose(1, 2)

    def biases(self, grid: Grid, key_grid: Grid) -> tuple[Tensor, Tensor]:
        """B1 (1, h, agents, keys) and B2 (1, h, queries, agents)."""
        agent_bias = self.position_bias(self.an_bias, self.ah_bias[0, ..., 0], self.aw_bias[0, :, :, 0], key_grid)
        rows, columns = self.ha_bias[0, :, :, 0].transpose(1, 2), self.wa_bias[0, :, 0].transpose(1, 2)
        token_bias = self.position_bias(self.na_bias, rows, columns, grid).transpose(1, 2)
        if self.class_tokens:
            agent_bias = torch.cat([self.ac_bias[0], agent_bias], 2)  # the same for every position of the grid
            token_bias = torch.cat([self.ca_bias[0], token_bias], 1)
        return agent_bias[None], token_bias[None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, key_grid: Grid | None = None) -> Tensor:
        """(B, N, C), (B, M, C), (B, M, C) -> (B, N, C), N tokens on `grid` and M on `key_grid`, class tokens first."""
        agents = to_tokens(F.adaptive_avg_pool2d(to_map(q[:, self.class_tokens :], grid), self.agent_shape))
        q, k, v, agents = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v, agents))
        agent_bias, token_bias = self.biases(grid, key_grid or grid)
        output = agent_attention(
            q,
            k,
            v,
            agents,
            k_scale2=1.0,
            k_shortcut=0.0,
            agent_bias=agent_bias,
            token_bias=token_bias,
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        heads = output.transpose(1, 2)
        if torch.compiler.is_compiling():
            # to flatten is a view in the layout of the kernel at hand; an export to ONNX may exchange the kernel
            heads = heads.clone(memory_format=torch.contiguous_format)
        return heads.flatten(2)

    def _stretch_loaded(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """A checkpoint of another grid is stretched along the grid's axis, as the paper's fine-tuning does."""
        for name, axis in GRID_AXES.items():
            bias, shape = state_dict.get(prefix + name), getattr(self, name).shape
            if bias is None or bias.shape == shape:
                continue
            if bias.shape[:axis] + bias.shape[axis + 1 :] == shape[:axis] + shape[axis + 1 :]:
                lines = bias.movedim(axis, -1)
                stretched = stretch(lines.flatten(1, -2), (shape[axis],)).unflatten(1, lines.shape[1:-1])
                state_dict[prefix + name] = stretched.movedim(-1, axis)


class AgentAttention(AgentPooling):
    """Multi-head self-attention of cost linear in the tokens, in the place of a vision transformer's::

        attention = AgentAttention(dim=192, num_heads=3, grid=(14, 14), class_tokens=1)
        y = attention(x)                    # (B, 1 + 14 * 14, 192)
        y = attention(x, grid=(20, 30))     # (B, 1 + 20 * 30, 192)

    Agents A are pooled from the queries' grid; with the position biases B1 and B2::

        V_A = softmax(A K^T / sqrt(d) + B1) V
        y = proj(softmax(Q A^T / sqrt(d) + B2) V_A + DWC(V))

    Args: as `AgentPooling`, and
        qkv_bias: whether queries, keys and values have a bias.
        proj_drop: dropout after the output's projection.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Grid,
        agents: int = 49,
        *,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        **pooling: Any,
    ):
        super().__init__(dim, num_heads, grid, agents, **pooling)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dwc = depthwise(dim)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """
        Args:
            x: (B, class_tokens + H * W, C), the grid row by row.
            grid: (H, W), by default the one that the module was built for.

        Returns:
            (B, class_tokens + H * W, C)

        Raises:
            ValueError: if the tokens are not those of the grid.
        """
        grid = self.checked(x, grid)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.output(self.attend(q, k, v, grid), to_map(v[:, self.class_tokens :], grid))

    def checked(self, x: Tensor, grid: Grid | None) -> Grid:
        height, width = grid or self.grid
        if x.shape[1] != self.class_tokens + height * width:
            raise ValueError(
                f"{x.shape[1]} tokens, but a grid of {height}x{width} and {self.class_tokens} class tokens are "
                f"{self.class_tokens + height * width}: give the tokens' `grid`"
            )
        return height, width

    def output(self, x: Tensor, values: Tensor) -> Tensor:
        """(B, N, C) attention and (B, C, H, W) values -> (B, N, C), with the convolution, through the last map."""
        convolved = to_tokens(self.dwc(values))
        if self.class_tokens:
            convolved = F.pad(convolved, (0, 0, self.class_tokens, 0))
        return self.proj_drop(self.proj(x + convolved))


class ReducedAgentAttention(AgentAttention):
    """Agent attention of the Pyramid Vision Transformer: keys and values from a map that is `sr_ratio` times smaller.

    Args: as `AgentAttention`, and
        sr_ratio: spatial reduction, kernel and stride of a convolution in front of keys and values; 1 for none.
    """

    def __init__(self, dim: int, num_heads: int, grid: Grid, agents: int = 49, *, sr_ratio: int = 1, **options: Any):
        qkv_bias = options.get("qkv_bias", True)
        key_grid = (grid[0] // sr_ratio, grid[1] // sr_ratio)
        super().__init__(dim, num_heads, grid, agents, key_grid=key_grid, **options)
        del self.qkv
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio) if sr_ratio > 1 else None
        self.norm = nn.LayerNorm(dim) if sr_ratio > 1 else None

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        grid = key_grid = self.checked(x, grid)
        source = x
        if self.sr is not None and self.norm is not None:
            reduced = self.sr(to_map(x, grid))
            key_grid = (reduced.shape[2], reduced.shape[3])
            source = self.norm(to_tokens(reduced))
        k, v = self.kv(source).chunk(2, dim=-1)
        return self.output(self.attend(self.q(x), k, v, grid, key_grid), stretch(to_map(v, key_grid), grid))
