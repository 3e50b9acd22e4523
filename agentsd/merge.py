"""Merge tokens into the groups of a matching, and give every token its group's output back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from agentsd.matching import Matching


def merge(x: Tensor, matching: Matching) -> Tensor:
    """The mean of each group, summed in float32: (B, N, C) -> (B, M, C). A token alone in its group is untouched."""
    rows = x.flatten(0, 1)
    if matching.bags is None:
        exact = torch.promote_types(x.dtype, torch.float32)
        sums = rows.new_zeros(len(x) * matching.groups, rows.shape[1], dtype=exact)
        means = sums.index_add_(0, matching.group.flatten(), rows.to(exact)) / sizes(matching).view(-1, 1)
    else:  # one pass, that materialises nothing between
        means = F.embedding_bag(matching.bags[0], rows, matching.bags[1], mode="mean")
    return means.to(x.dtype).view(len(x), matching.groups, -1)


def sizes(matching: Matching) -> Tensor:
    """How many tokens each group has, (B, M), in float32: not every device adds whole numbers."""
    group = matching.group.flatten()
    none = group.new_zeros(len(matching.group) * matching.groups, dtype=torch.float32)
    return none.index_add_(0, group, torch.ones_like(group, dtype=torch.float32)).view(-1, matching.groups)


def unmerge(y: Tensor, matching: Matching) -> Tensor:
    """Each token gets its group's row: (B, M, C) -> (B, N, C)."""
    return F.embedding(matching.group, y.flatten(0, 1))
