"""Merge tokens into the groups of a matching, and give every token its group's output back."""

from __future__ import annotations

import torch
from torch import Tensor

from agentsd.matching import Matching


def merge(x: Tensor, matching: Matching) -> Tensor:
    """The mean of each group: (B, N, C) -> (B, M, C). A token that is alone in its group is untouched.

    Sums are taken in float32 at least: bfloat16 cannot count beyond 256, and a flat background is a larger group.
    """
    batch, tokens, groups = matching.shape
    rows = x.reshape(batch * tokens, -1).to(torch.promote_types(x.dtype, torch.float32))
    sums = rows.new_zeros(batch * groups, rows.shape[-1]).index_add(0, matching.group, rows)
    sizes = rows.new_zeros(batch * groups, 1).index_add(0, matching.group, rows.new_ones(len(rows), 1))
    return (sums / sizes).to(x.dtype).view(batch, groups, -1)


def unmerge(y: Tensor, matching: Matching) -> Tensor:
    """Each token gets its group's row: (B, M, C) -> (B, N, C)."""
    batch, tokens, groups = matching.shape
    return y.reshape(batch * groups, -1).index_select(0, matching.group).view(batch, tokens, -1)
