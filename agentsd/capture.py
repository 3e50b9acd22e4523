"""CUDA graphs of denoiser calls: recorded at the first call of a kind, replayed in all others of that kind.

One image leaves a GPU waiting for Python to launch its kernels. A graph launches all of a call's at once; they are the
very same kernels, so that every pixel is as without.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from agentsd.graphs import CudaGraphs, NoGraphError, State, refusal
from agentsd.matching import Partition
from agentsd.planner import BlockPlan, Call, Now
from agentsd.processor import AgentAttnProcessor

MOST_GRAPHS = 8  # the least recently used is dropped; a size has three at most, or six where guidance makes two calls
MOST_CHANGES = 8  # of the denoiser, without a graph that was of use
CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class Recipe:
    """How a call is put together from the tensors that it reads: those of its arguments, of its partitions, features.

    Attributes:
        leaves: of the arguments, `Tensor` for each tensor; ``tree`` is their structure.
        call: as it was planned.
    """

    leaves: list[Any]
    tree: TreeSpec
    call: Call

    def arguments(self, tensors: list[Tensor]) -> Any:
        """``args, kwargs``, in containers of their own: a denoiser takes residuals out of its lists."""
        rest = iter(tensors)
        return tree_unflatten([next(rest) if leaf is Tensor else leaf for leaf in self.leaves], self.tree)

    def planned(self, tensors: list[Tensor], shapes: dict[str, Any] | None) -> Call:
        rest = iter(tensors[self.leaves.count(Tensor) :])
        blocks = {
            index: BlockPlan(plan.counts, Partition(next(rest), next(rest), plan.partition.num_dst))
            for index, plan in self.call.blocks.items()
        }
        return Call(self.call.cached, blocks, features=next(rest, None), shapes=shapes, writes=self.call.writes)


def _read(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], Recipe, Any]:
    """The tensors that a call reads, how it is put together from them, and what kind of call it is."""
    if torch.is_grad_enabled():
        raise NoGraphError("gradients are recorded: call the denoiser under torch.no_grad()")
    leaves, tree = tree_flatten((args, kwargs))
    device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), torch.device("cpu"))
    if torch.is_autocast_enabled(device.type):
        raise NoGraphError("autocast is on: load the weights in half precision instead")
    if len(args) > 1:
        args = (args[0], _timestep(args[1], device), *args[2:])
    elif "timestep" in kwargs:
        kwargs = {**kwargs, "timestep": _timestep(kwargs["timestep"], device)}
    leaves, tree = tree_flatten((args, kwargs))
    tensors: list[Tensor] = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    for x in tensors:
        if x.device != device:
            raise NoGraphError(f"among the arguments are tensors on {x.device} and on {device}")
    shown = [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    for leaf in shown:
        if leaf is not Tensor and type(leaf) not in CONSTANTS:
            raise NoGraphError(f"a {type(leaf).__name__} is among the arguments, which may change unseen")
    for plan in call.blocks.values():
        tensors += [plan.partition.order, plan.partition.inverse]
    if call.features is not None:
        tensors.append(call.features)
    enabled: Any = torch.backends.cuda
    kind = (
        repr(tree),
        tuple((type(leaf), leaf) for leaf in shown),
        tuple((x.shape, x.stride(), x.dtype, x.device) for x in tensors),
        (call.cached, call.writes, call.shapes is None, call.cached and tuple((call.shapes or {}).items())),
        tuple((index, plan.counts, plan.partition.num_dst) for index, plan in call.blocks.items()),
        (enabled.flash_sdp_enabled(), enabled.mem_efficient_sdp_enabled(), enabled.math_sdp_enabled()),
    )
    return tensors, Recipe(shown, tree, call), kind


def _is_capturing() -> bool:
    """Whether somebody else records this call."""
    cuda: Any = torch.cuda
    return bool(cuda.is_initialized() and cuda.is_current_stream_capturing())


def _timestep(given: Any, device: torch.device) -> Any:
    """On the device, since a graph would keep a number; in the types that diffusers chooses."""
    if isinstance(given, Tensor):
        return given.to(device) if given.dim() == 0 else given
    if type(given) not in (int, float):
        return given
    dtype = torch.float64 if isinstance(given, float) else torch.int64
    return torch.full((), given, dtype=dtype, device=device)


@dataclass(frozen=True)
class Graph:
    """A recorded call: the buffers that it reads, what replays it, and the shapes of its middle's outputs."""

    inputs: list[Tensor]
    replay: Callable[[], tuple[Any, Tensor | None]]
    shapes: dict[str, Any] | None


class Capture:
    """Stands around a denoiser's ``forward``, with graphs that all threads share. A copy begins without.

    Attributes:
        captured: how many graphs were recorded.

    Args:
        skips: tells by its name a module that cached calls do not run.
    """

    def __init__(self, now: Now, skips: Callable[[str], bool]) -> None:
        self.captured = 0
        self._now = now
        self._skips = skips
        self._lock = threading.RLock()
        self._warned: set[str] = set()
        self._changes = 0  # since a graph was last of use
        self._refused = ""
        self.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return Capture, (self._now, self._skips)

    def forget(self) -> None:
        """Free all graphs."""
        self._graphs: dict[Any, Graph | str] = {}  # or why there is none
        self._recorder: Any = None
        self._states: dict[bool, State] = {}  # for cached calls that of the modules they run, which are few

    def look_at(self, net: nn.Module, cached: bool) -> None:
        """Before a call: what was recorded is forgotten where it takes for granted what holds no longer."""
        with self._lock:
            self._net = weakref.ref(net)
            if cached not in self._states or not self._states[cached].holds(net):
                self.forget()
                self._see(net)
                self._refused = refusal(net)
                self._changes += 1
                if self._changes > MOST_CHANGES:
                    self._refused = "something in the denoiser changes in every call"

    def _see(self, net: nn.Module) -> None:
        self._states = {False: State(net, lambda name: False), True: State(net, self._skips)}

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self._now.call
        if call is None or torch.compiler.is_compiling() or _is_capturing():
            return forward(*args, **kwargs)
        try:
            if self._refused:
                raise NoGraphError(self._refused)
            tensors, recipe, kind = _read(call, args, kwargs)
            with self._lock:
                return self._run(forward, tensors, recipe, kind)
        except NoGraphError as error:
            why = str(error)
        output = forward(*args, **kwargs)
        if why not in self._warned:
            self._warned.add(why)
            warnings.warn(f"agentsd replays no CUDA graph here: {why}.", stacklevel=2)
        return output

    def _run(self, forward: Callable[..., Any], tensors: list[Tensor], recipe: Recipe, kind: Any) -> Any:
        if self._recorder is None:
            self._recorder = CudaGraphs(tensors[0].device)
        self._recorder.take_turn()
        self._changes = 0 if kind in self._graphs else self._changes
        graph = self._graphs.pop(kind, None) or self._record(forward, tensors, recipe)
        self._graphs[kind] = graph  # the latest is last
        while len(self._graphs) > MOST_GRAPHS:
            self._graphs.pop(next(iter(self._graphs)))
        if isinstance(graph, str):
            raise NoGraphError(graph)
        torch._foreach_copy_(graph.inputs, tensors)
        output, features = graph.replay()
        call = recipe.call
        if not call.cached and features is not None:
            call.features = features.clone()
        if not call.cached and call.shapes is not None:
            call.shapes.update(graph.shapes or {})
        return tree_map_only(Tensor, Tensor.clone, output)

    def _record(self, forward: Callable[..., Any], tensors: list[Tensor], recipe: Recipe) -> Graph | str:
        call = recipe.call
        with torch.inference_mode(False):  # to be written into in any mode
            inputs = [torch.empty_like(x).copy_(x) for x in tensors]
        shapes = None if call.shapes is None else dict(call.shapes)

        def function() -> tuple[Any, Tensor | None]:
            under_way, planned = self._now.call, recipe.planned(inputs, shapes)
            self._now.call = planned
            try:
                args, kwargs = recipe.arguments(inputs)
                return forward(*args, **kwargs), planned.features
            finally:
                self._now.call = under_way

        net: Any = self._net()
        try:
            replay = self._recorder.record(function)
        except Exception as error:  # of CUDA, or of whoever waits for the device
            for module in net.modules():
                if isinstance(processor := getattr(module, "processor", None), AgentAttnProcessor):
                    processor.give_back(module, calls=2**31)
            return f"recording a {'cached' if call.cached else 'full'} call failed with {error!r:.300}"
        self._see(net)  # a call may leave something else than it found
        self.captured += 1
        return Graph(inputs, replay, shapes)
