"""How a denoiser runs, whatever the method: compiled, with CUDA graphs, or as it is."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from architectures import denoiser
from methods import agent
from peers import Method, Undo, unpatched
from torch import nn

import agentsd


def prepared(method: Method, prepare: Callable[[nn.Module], Undo]) -> Method:
    """The same on a denoiser that is prepared before the method is applied."""

    def apply(pipe: Any) -> Undo:
        undo_mode = prepare(denoiser(pipe))
        undo = method.apply(pipe)
        return lambda: (undo(), undo_mode())

    return replace(method, apply=apply)


def channels_last(net: nn.Module) -> Undo:
    net.to(memory_format=torch.channels_last)
    return lambda: net.to(memory_format=torch.contiguous_format)


def compiled(mode: str) -> Callable[[nn.Module], Undo]:
    def prepare(net: nn.Module) -> Undo:
        net.compile(mode=mode)

        def undo() -> None:
            net._compiled_call_impl = None
            torch.compiler.reset()

        return undo

    return prepare


def graphs_alone(pipe: Any) -> Undo:
    agentsd.apply_patch(pipe, ratio=0, cuda_graphs=True)
    return lambda: agentsd.remove_patch(pipe)


def graphed(method: Method) -> Method | None:
    """The same with CUDA graphs of the patch's own; without one in it, under a patch that does nothing else."""
    if method.apply is unpatched:
        return replace(method, apply=graphs_alone)
    if set(method.settings) != {"agentsd"}:
        return None
    return replace(method, apply=agent(**method.settings["agentsd"], cuda_graphs=True).apply)


# how a denoiser runs: each takes a method and gives the one that runs so, or None where it cannot
MODES: dict[str, Callable[[Method], Method | None]] = {
    "eager": lambda method: method,
    "channels-last": lambda method: prepared(method, channels_last),
    "cuda-graphs": graphed,
    "compile": lambda method: prepared(method, compiled("default")),
    "reduce-overhead": lambda method: prepared(method, compiled("reduce-overhead")),
}
SLOW_TO_APPLY = {"compile", "reduce-overhead"}  # each method compiles anew
