"""Recording CUDA graphs, and telling when what was recorded holds no longer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

WARM_UPS = 2  # libraries choose kernels and allocate workspaces in first calls, which cannot be recorded
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
BESIDE = {*HOOKS, "forward", "_agentsd_patch"}  # of the denoiser itself: they run around what is recorded


class NoGraphError(Exception):
    """Why a call has no graph."""


class CudaGraphs:
    """Records graphs of one device, in memory that they share: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise NoGraphError(f"the latents are on {device}, and CUDA graphs need a CUDA device")
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._last: torch.cuda.Stream | None = None

    def take_turn(self) -> None:
        """Have the present stream wait for the one that has last replayed a graph: buffers are shared."""
        current = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current

    def record(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """A function that does on the device what ``function`` did, and gives the same tensors each time."""
        current, graph = torch.cuda.current_stream(self._device), torch.cuda.CUDAGraph()
        self._side.wait_stream(current)
        # the outer context puts the stream back where a failing capture does not
        with torch.cuda.device(self._device), torch.cuda.stream(self._side):
            for _ in range(WARM_UPS):
                function()
            with torch.cuda.graph(graph, self._pool, self._side, capture_error_mode="thread_local"):
                output = function()
        current.wait_stream(self._side)

        def replay() -> Any:
            graph.replay()
            return output

        return replay


class State:
    """What graphs take for granted: modules, addresses of weights, hooks, processors and plain attributes.

    Compared in each call, so in dictionaries as they are. It holds neither the denoiser nor its patch.

    Args:
        skips: tells by its name a module that the graphs do not run.
    """

    def __init__(self, net: nn.Module, skips: Callable[[str], bool]) -> None:
        self._own = _own(net)
        modules = [module for name, module in net.named_modules() if not skips(name)]
        owners = [vars(module) for module in modules if module is not net]
        processors = [own["processor"] for own in owners if not isinstance(own.get("processor"), nn.Module | None)]
        owners += [vars(processor) for processor in processors if hasattr(processor, "__dict__")]
        held = [item for own in (self._own, *owners) for item in own.items() if isinstance(item[1], dict | list)]
        self._empty = [value for name, value in held if name in HOOKS and not value]
        self._held: list[Any] = [value for _, value in held if value] + owners
        self._copies = [value.copy() for value in self._held]
        named = (module._parameters | module._buffers for module in modules)
        self._tensors = [tensor for each in named for tensor in each.values() if tensor is not None]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]

    def holds(self, net: nn.Module) -> bool:
        try:
            same = self._own == _own(net) and self._held == self._copies and not any(self._empty)
        except (RuntimeError, ValueError):  # another tensor, compared element by element
            return False
        return same and [tensor.data_ptr() for tensor in self._tensors] == self._addresses


def _own(net: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(net).items() if name not in BESIDE}


def refusal(net: nn.Module) -> str:
    """Why no graph may be recorded of this denoiser; empty where it may."""
    for module in net.modules():
        if hasattr(module, "_hf_hook") or getattr(getattr(module, "_diffusers_hook", None), "hooks", None):
            return "hooks of accelerate or diffusers move weights or decide in each call, as offloading does"
    return ""
