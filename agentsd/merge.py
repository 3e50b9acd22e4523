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
    batch, tokens, groups = matching.shape
    rows = x.reshape(batch * tokens, -1)
    if x.device.type == "mps":  # has an embedding bag only in the newest PyTorch
        return means_by_adding(rows, matching).to(x.dtype).view(batch, groups, -1)
    if x.dtype == torch.float16 and x.device.type == "cpu":  # stores the sum before it divides: large groups overflow
        rows = rows.float()
    means = F.embedding_bag(matching.members, rows, matching.starts, mode="mean")
    return means.to(x.dtype).view(batch, groups, -1)


def means_by_adding(rows: Tensor, matching: Matching) -> Tensor:
    """The mean of each group without an embedding bag: (B * N, C) -> (B * M, C), in float32."""
    groups = matching.shape[0] * matching.shape[2]
    sums = rows.new_zeros(groups, rows.shape[1], dtype=torch.float32).index_add_(0, matching.group, rows.float())
    ones = rows.new_ones(len(rows), 1, dtype=torch.float32)
    return sums / torch.zeros_like(sums[:, :1]).index_add_(0, matching.group, ones)


def unmerge(y: Tensor, matching: Matching) -> Tensor:
    """Each token gets its group's row: (B, M, C) -> (B, N, C)."""
    batch, tokens, groups = matching.shape
    return y.reshape(batch * groups, -1).index_select(0, matching.group).view(batch, tokens, -1)
