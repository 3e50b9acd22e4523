"""Gradient checkpointing runs a block a second time, in the backward pass: with the plan of its first run."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Plan = TypeVar("Plan")


class RecordedPlans(Generic[Plan]):
    """The plan of each call whose gradient is recorded, found again by the memory of its input.

    Checkpointing keeps that memory alive from a block's first run to its last; a plan is kept as long, and no longer.
    """

    def __init__(self) -> None:
        self._plans: Any = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordedPlans, ()

    def plan(self, x: Tensor, coming: Plan | None, recomputed: bool = False) -> Plan | None:
        """The plan of a call with input ``x``: the ``coming`` one, but in a backward pass that of the first run.

        Args:
            recomputed: whether the ``coming`` plan is itself that of a first run, as where all of a denoiser is
                checkpointed.

        Raises:
            RuntimeError: in a backward pass, where there was no first run.
        """
        # reentrant checkpointing makes the first run without gradients, but its input asks for one
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or x.requires_grad):
            return coming
        memory = x.untyped_storage()
        if torch._C._current_graph_task_id() != -1:  # the id of the backward pass that is running
            if memory not in self._plans:
                if recomputed:
                    return coming
                raise RuntimeError(
                    "a patched block runs in the backward pass with an input that it has not seen: its gradients "
                    "would be those of other tokens. Call agentsd.remove_patch before training like this."
                )
            known: Plan | None = self._plans[memory]
            return known
        self._plans[memory] = coming
        return coming
