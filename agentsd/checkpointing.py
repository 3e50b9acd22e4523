"""Calls of which derivatives are taken, and gradient checkpointing, which runs some of them a second time."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.weak import WeakIdKeyDictionary

Plan = TypeVar("Plan")


def is_transformed() -> bool:
    """Whether a function of `torch.func` is under way: its tensors have no memory, and none of them may be kept."""
    return torch._C._functorch.maybe_current_level() is not None


def is_differentiated(x: Tensor) -> bool:
    """Whether derivatives are taken of a call with input ``x``, backwards or forwards."""
    # reentrant checkpointing makes the first run without gradients, but its input asks for one
    backwards = torch.is_grad_enabled() or x.requires_grad
    return backwards or forward_ad._current_level >= 0 or is_transformed()


class RecordedPlans(Generic[Plan]):
    """The plan of each call whose gradient is recorded, found again by the memory of its input.

    Checkpointing keeps that memory alive from a block's first run to its last; a plan is kept as long, and no longer.
    """

    def __init__(self) -> None:
        self._plans: Any = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordedPlans, ()

    def plan(self, x: Tensor, coming: Plan | None, recomputed: bool = False, which: Hashable = None) -> Plan | None:
        """The plan of a call with input ``x``: the ``coming`` one, but in a backward pass that of the first run.

        Args:
            recomputed: whether the ``coming`` plan is itself that of a first run, as where all of a denoiser is
                checkpointed.
            which: of several calls with the same input.

        Raises:
            RuntimeError: in a backward pass, where there was no first run.
        """
        recorded = not torch.compiler.is_compiling() and (torch.is_grad_enabled() or x.requires_grad)
        if not recorded or is_transformed():
            return coming
        memory, which = x.untyped_storage(), (int(x.storage_offset()), *map(int, x.shape), which)
        known: dict[Hashable, Plan | None] = self._plans.get(memory, {})
        if torch._C._current_graph_task_id() == -1:  # the id of the backward pass that is running
            self._plans[memory] = {**known, which: coming}
            return coming
        if len(known) == 1:  # wherever its scheduler may be by now
            return next(iter(known.values()))
        if which not in known and not recomputed:
            raise RuntimeError(
                "a patched block runs in the backward pass with an input that it has not seen: its gradients "
                "would be those of other tokens. Call agentsd.remove_patch before training like this."
            )
        return known.get(which, coming)
