"""Gradient checkpointing runs a block a second time, in the backward pass: with the plan of its first run."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import Tensor

Plan = TypeVar("Plan")


class RecordedPlans(Generic[Plan]):
    """The plan of each call whose gradient is recorded, found again by the memory of its input.

    Checkpointing keeps that memory alive from a block's first run to its second.
    """

    def __init__(self) -> None:
        self._plans: dict[int, Plan] = {}
        self._was_backward = False

    def plan(self, x: Tensor, coming: Plan) -> Plan:
        """The plan of a call with input ``x``: the ``coming`` one, but in a backward pass that of the first run."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return coming
        if torch._C._current_graph_task_id() != -1:  # the id of the backward pass that is running
            self._was_backward = True
            return self._plans.get(x.data_ptr(), coming)
        if self._was_backward:
            self._plans.clear()
            self._was_backward = False
        self._plans[x.data_ptr()] = coming
        return coming
