"""Bipartite soft matching on a token grid (ToMe for Stable Diffusion, Bolya & Hoffman 2023, arXiv 2303.17604).

A matching is data: the group that each token belongs to. `agentsd.merge` needs nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_SIMILARITIES = 8  # for each number of the tokens
ADDS_IN_ORDER = ("cpu", "mps")  # elsewhere `index_add_` rounds differently each time: no image is the same twice


@dataclass(frozen=True)
class Partition:
    """Which tokens of a grid are dst and which are src.

    Attributes:
        order: (N,) grid positions, the dst tokens first, then the src tokens, each in raster order.
        inverse: (N,) the place of every grid position in ``order``.
        num_dst: how many of them are dst.
    """

    order: Tensor
    inverse: Tensor
    num_dst: int

    @property
    def dst(self) -> Tensor:
        """(D,) grid positions of the dst tokens."""
        return self.order[: self.num_dst]


def partition(height: int, width: int, sy: int, sx: int, generator: torch.Generator | None = None) -> Partition:
    """Choose one dst token in every ``sy`` x ``sx`` cell of a ``height`` x ``width`` grid; all others are src.

    Without a generator it is the top-left token of the cell, with one a random token of it, by one draw of shape
    ``(height // sy, width // sx, 1)``. Rows and columns that the stride leaves over are src.
    """
    return partitions(height, width, sy, sx, [generator], torch.device("cpu"))[0]


def partitions(
    height: int,
    width: int,
    sy: int,
    sx: int,
    generators: Sequence[torch.Generator | None],
    device: torch.device,
    turns: Sequence[int] = (0,),
) -> list[Partition]:
    """A `partition` for each of the generators, at once, on ``device``. Drawn on the CPU: no value is read back.

    Args:
        turns: of each, or of all, how many tokens further in its cell, in raster order, the dst token is than drawn.
    """
    rows, columns, tokens = height // sy, width // sx, height * width
    shape, corner = (rows, columns, 1), torch.zeros(rows, columns, 1, dtype=torch.long)
    drawn = [corner if g is None else torch.randint(sy * sx, shape, generator=g) for g in generators]
    turned = (torch.stack(drawn) + torch.tensor(turns).view(-1, 1, 1, 1)) % (sy * sx)
    offset = turned.squeeze(-1).to(device, non_blocking=True)
    y = torch.arange(rows, device=device)[:, None] * sy + offset // sx
    x = torch.arange(columns, device=device) * sx + offset % sx
    place = (y * width + x).flatten(1)  # (generators, D)
    is_src = torch.ones(len(generators), tokens, dtype=torch.uint8, device=device).scatter_(1, place, 0)
    order = is_src.argsort(dim=1, stable=True)
    inverse = torch.empty_like(order).scatter_(1, order, torch.arange(tokens, device=device).expand_as(order))
    pairs = zip(order.int(), inverse.int(), strict=True)  # which are kept for a whole trajectory
    return [Partition(*pair, rows * columns) for pair in pairs]


@dataclass(frozen=True)
class Matching:
    """An assignment of B x N tokens to B x M groups, numbered through the batch.

    Attributes:
        group: (B, N) the group of each token; groups of sample b are ``b * M .. (b + 1) * M - 1``.
        groups: M.
        bags: (B * N,) the tokens sorted by group, and (B * M,) where among them each group begins; None where a
            device needs no order of them to add them up in the same order each time.
    """

    group: Tensor
    groups: int
    bags: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Edges:
    """The best edge of every src token, and their order by similarity: the matchings of all ratios at once.

    Attributes:
        partition: the tokens that the edges connect.
        nearest: (B, S) for each src token the dst token most similar to it, as an index below D.
        ranked: (B, S) the src tokens, as indices below S, by that similarity, the most similar first.
    """

    partition: Partition
    nearest: Tensor
    ranked: Tensor

    def cut(self, r: int) -> Matching:
        """Merge along the ``r`` best edges: (B, N) tokens into M = N - r groups, one of each dst first."""
        (batch, num_src), num_dst = self.nearest.shape, self.partition.num_dst
        groups = num_dst + num_src - r
        numbers = torch.arange(batch * groups, device=self.nearest.device)
        number = numbers.view(batch, groups)
        src = (self.nearest + number[:, :1]).scatter_(1, self.ranked[:, r:], number[:, num_dst:])
        group = torch.cat((number[:, :num_dst], src), dim=1).index_select(1, self.partition.inverse)
        if group.device.type in ADDS_IN_ORDER:
            return Matching(group, groups)
        in_order, members = group.flatten().sort(stable=True)
        return Matching(group, groups, (members, torch.searchsorted(in_order, numbers)))


def bipartite_soft_matching(x: Tensor, partition: Partition) -> Edges:
    """Connect each src token to the dst token of largest cosine similarity.

    The (B, S, D) similarities are there in parts of at most `MOST_SIMILARITIES` numbers for each of ``x``: as many as
    the block's MLP has in its hidden layer, so that matching never is what a large image runs out of memory for.

    Args:
        x: (B, N, C) tokens in raster order, the input of the transformer block before its first norm.
        partition: of the N tokens, with at least one dst; on the device of ``x``.
    """
    x = x.detach() if x.requires_grad else x
    exact = torch.promote_types(x.dtype, torch.float32)  # in half precision norms overflow
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
    x = (x / length.clamp_min(1e-12)).to(x.dtype).index_select(1, partition.order)
    dst, src = x[:, : partition.num_dst].mT, x[:, partition.num_dst :]
    rows = max(1, MOST_SIMILARITIES * x.shape[1] * x.shape[2] // partition.num_dst)
    if rows >= src.shape[1]:
        similarity, nearest = torch.bmm(src, dst).max(dim=-1)  # (B, S, D) -> (B, S)
    else:
        best = [torch.bmm(part, dst).max(dim=-1) for part in torch.split(src, rows, dim=1)]
        similarity, nearest = (torch.cat(parts, dim=1) for parts in zip(*best, strict=True))
    return Edges(partition, nearest, similarity.argsort(dim=-1, descending=True))
