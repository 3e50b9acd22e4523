"""What is counted rather than timed: the operations of UNet calls, and the memory of their tensors.

Nothing is computed: no machine is in these figures, and no noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from methods import Method
from timing import Denoiser, Timed
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary


class FusedAttention(TorchFunctionMode):
    """Attention as one operation, as devices have it. Of tensors without data PyTorch makes the N x N products."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args[:3], None, False)[0]
        return function(*args, **(kwargs or {}))


class LiveMemory(TorchDispatchMode):
    """The most bytes that tensors made within it hold at once: no weights, no inputs, no workspace of a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes = WeakIdKeyDictionary()  # of the storages that are alive

    @property
    def peak_mb(self) -> float:
        return self.peak / 2**20

    def __torch_dispatch__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}  # an output that is one of them is a view
        for storage in _storages(output):
            if storage._cdata not in given:
                self._sizes[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self._sizes.values()))
        return output


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_meta)
    return [tensor.untyped_storage() for tensor in tensors]


class Counter(Denoiser):
    """Counts the floating-point operations of single UNet calls by torch's own counter, where others take seconds."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(argparse.Namespace(**{**vars(args), "device": "meta", "compile": False}))

    def memory(self) -> LiveMemory:
        return LiveMemory()

    @torch.inference_mode()
    def call(self, place: int) -> float:
        with FusedAttention(), FlopCounterMode(display=False) as counter:
            self.unet(self.sample, self.timesteps[place], self.text, **self.extra)
        return float(counter.get_total_flops())


def counted(args: argparse.Namespace, methods: dict[str, Method]) -> dict[str, dict[str, Any]]:
    """By method, the operations of a call of each kind and of the schedule, and the peak of the memory."""
    bench, shared = Counter(args), Timed()
    return {name: bench.round(method, shared) for name, method in methods.items()}
