"""Merge tokens into the groups of a matching, and give every token its group's output back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from agentsd.matching import Matching


def merge(x: Tensor, matching: Matching) -> Tensor:
    """The mean of each group: (B, N, C) -> (B, M, C). A token that is alone in its group is untouched.

    One pass over the tokens, sorted by group: an embedding bag sums in float32 and materialises nothing between.
    """
    rows = x.flatten(0, 1)
    if x.device.type == "mps":  # has an embedding bag only in the newest PyTorch
        return means_by_adding(rows, matching).to(x.dtype).view(len(x), matching.groups, -1)
    if x.dtype == torch.float16 and x.device.type == "cpu":  # stores the sum before it divides: large groups overflow
        rows = rows.float()
    means = F.embedding_bag(matching.members, rows, matching.starts, mode="mean")
    return means.to(x.dtype).view(len(x), matching.groups, -1)


def means_by_adding(rows: Tensor, matching: Matching) -> Tensor:
    """The mean of each group without an embedding bag: (B * N, C) -> (B * M, C), in float32."""
    sums = rows.new_zeros(len(matching.starts), rows.shape[1], dtype=torch.float32)
    return sums.index_add_(0, matching.group.flatten(), rows.float()) / sizes(matching).view(-1, 1)


def sizes(matching: Matching) -> Tensor:
    """How many tokens each group has, (B, M)."""
    end = matching.starts.new_full((1,), len(matching.members))
    return matching.starts.diff(append=end).view(-1, matching.groups)


def unmerge(y: Tensor, matching: Matching) -> Tensor:
    """Each token gets its group's row: (B, M, C) -> (B, N, C)."""
    return F.embedding(matching.group, y.flatten(0, 1))
