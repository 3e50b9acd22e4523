"""Peak memory, and where the time of a call goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

import agentsd.block


class PeakMemory:
    """The most that CUDA's allocator held, in MB. None on a CPU: `counting.LiveMemory` says what tensors hold."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.peak_mb: float | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.startswith("cuda"):
            self.peak_mb = torch.cuda.max_memory_allocated(self.device) / 2**20


@contextlib.contextmanager
def timed(unet: nn.Module, seconds: dict[str, float]) -> Iterator[None]:
    """Seconds of each kind of layer, and of the patch's own work. For CPUs, which do not queue.

    Around ``forward``, not by hooks: the hooks of a patch are its own work, and none of the layer's.
    """
    layers: list[nn.Module] = []

    def watch(kind: str, module: nn.Module) -> None:
        module.forward = _counted(module.forward, kind, seconds)
        layers.append(module)

    for name, module in unet.named_modules():
        if name.endswith(".attn1"):
            watch("self-attention", module)
        elif name.endswith(".attn2"):
            watch("cross-attention", module)
        elif name.endswith(".ff"):
            watch("MLP", module)
        elif isinstance(module, ResnetBlock2D) or ("samplers." in name and name.endswith("conv")):
            watch("convolutions", module)
    functions = ("bipartite_soft_matching", "merge", "unmerge")
    originals = {name: getattr(agentsd.block, name) for name in functions}
    for name, function in originals.items():
        setattr(agentsd.block, name, _counted(function, "matching and merging", seconds))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(agentsd.block, name, function)
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _counted(function: Callable[..., Any], kind: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def around(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[kind] = seconds.get(kind, 0.0) + time.perf_counter() - start
        return result

    return around


def breakdown(run: Callable[[], float], unet: nn.Module) -> dict[str, float]:
    """Shares of the time of all calls that ``run`` makes, by kind of layer. It returns the seconds of all of them."""
    seconds: dict[str, float] = {}
    with timed(unet, seconds):
        total = run()
    shares = {kind: round(value / total, 4) for kind, value in seconds.items()}
    return {**shares, "everything else": round(1 - sum(shares.values()), 4), "seconds": total}
