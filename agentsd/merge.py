"""Merge tokens into the groups of a matching, and give every token its group's output back."""

from __future__ import annotations

from torch import Tensor

from agentsd.matching import Matching


def merge(x: Tensor, matching: Matching) -> Tensor:
    """The mean of each group: (B, N, C) -> (B, M, C). A token that is alone in its group is untouched."""
    batch, tokens, groups = matching.shape
    group = matching.group
    sums = x.new_zeros(batch * groups, x.shape[-1]).index_add(0, group, x.reshape(batch * tokens, -1))
    sizes = x.new_zeros(batch * groups).index_add(0, group, x.new_ones(1).expand(batch * tokens))
    return (sums / sizes[:, None]).view(batch, groups, -1)


def unmerge(y: Tensor, matching: Matching) -> Tensor:
    """Each token gets its group's row: (B, M, C) -> (B, N, C)."""
    batch, tokens, groups = matching.shape
    return y.reshape(batch * groups, -1).index_select(0, matching.group).view(batch, tokens, -1)
