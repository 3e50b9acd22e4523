"""Standing in for a module's ``forward``, and living with `torch.compile`."""

from __future__ import annotations

import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import torch
from torch import nn

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])


def never_first(function: Function) -> Function:
    """Trace ``function`` where a graph leads through it, and never begin a graph with it.

    Where modules are compiled by themselves, all that stands before them would count as a graph for each module and
    each decision, of which compilers allow few.
    """
    skip = getattr(torch._dynamo.eval_frame, "skip_code", None)
    if skip is not None:
        skip(function.__code__)
    return function


class Weakly(Generic[T]):
    """A reference that keeps nothing alive. A copy made along with its object refers to the object's copy."""

    def __init__(self, referent: T | None) -> None:
        self._reference = weakref.ref(referent) if referent is not None else lambda: None

    def __call__(self) -> T | None:
        return self._reference()

    def __deepcopy__(self, memo: dict[int, Any]) -> Weakly[T]:
        return Weakly(memo.get(id(self())))

    def __reduce__(self) -> tuple[Any, ...]:
        return Weakly, (None,)


class Wrap:
    """Has ``around(forward, ...)`` called for ``module.forward(...)``, until `undo`; or is there, and no more.

    It holds the module weakly: a cycle would keep a denoiser in memory after its pipeline is deleted.
    """

    def __init__(self, module: nn.Module, around: Callable[..., Any] | None) -> None:
        self.around = around
        self._module = weakref.ref(module)
        self._inner: Callable[..., Any] | None = vars(module).get("forward")
        self._class_s = type(module).forward  # now: in a graph, classes that diffusers allows there have no attributes

    def before_graph(self, module: nn.Module, inside: Callable[..., Any]) -> None:
        """Stand before the graph of a ``module`` that is compiled by itself: ``inside(graph, ...)`` enters it.

        In the graph, what each call decides anew would count as a graph more for each module and each decision, of
        which compilers allow few.
        """
        graph: Any = module._compiled_call_impl
        if self.around is not None and not isinstance(graph, BeforeGraph):
            instead = functools.partial(self.around, functools.partial(inside, graph))
            module._compiled_call_impl = BeforeGraph(graph, instead)

    @never_first
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], nn.Module):  # accelerate has bound it to the module, as if it were a function
            args = args[1:]
        return self.before(*args, **kwargs) if self.around is None else self.around(self.before, *args, **kwargs)

    @never_first
    def before(self, *args: Any, **kwargs: Any) -> Any:
        """What it stands in for."""
        if self._inner is not None:
            return self._inner(*args, **kwargs)
        return self._class_s(self._module(), *args, **kwargs)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """What it stands in for, so that signatures are found, and others' wrappers below it."""
        return self._inner if self._inner is not None else types.MethodType(self._class_s, self._module())

    def __getstate__(self) -> dict[str, Any]:
        return {"around": self.around, "module": self._module(), "inner": self._inner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.around, self._inner = state["around"], state["inner"]
        self._module, self._class_s = weakref.ref(state["module"]), type(state["module"]).forward

    def undo(self, module: nn.Module) -> None:
        """Leave ``module`` as it was; where others have wrapped it since, they keep what was there before, too."""
        self.around = None
        before = self.__wrapped__
        if isinstance(graph := module._compiled_call_impl, BeforeGraph):
            module._compiled_call_impl = graph.graph
        if self.is_in(vars(module).get("forward")) and self._inner is None:
            del module.forward
        hooks = getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ())
        for holder in (module, *hooks):
            for name in ("forward", "_old_forward", "_original_forward", "original_forward"):  # accelerate, diffusers
                if self.is_in(vars(holder).get(name)):
                    setattr(holder, name, before)

    def is_in(self, forward: Any) -> bool:
        """Whether a ``forward`` is this, a method of it, or this as a method of somebody else's."""
        return any(
            found is self for found in (forward, getattr(forward, "__self__", 0), getattr(forward, "__func__", 0))
        )


class BeforeGraph:
    """What is called in the place of a module's own graph."""

    def __init__(self, graph: Callable[..., Any], instead: Callable[..., Any]) -> None:
        self.graph = graph
        self.instead = instead

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.instead(*args, **kwargs)


def wrap(module: nn.Module, around: Callable[..., Any]) -> Wrap:
    wrapped = Wrap(module, around)
    module.forward = wrapped
    return wrapped


def mark(module: nn.Module) -> Wrap:
    """Have compiled code tell a module with hooks from others like it, which it does not by hooks, until `Wrap.undo`.

    Of modules that are marked one is like another: of a ``forward`` that is a method, compilers compare the function.
    """
    marked = Wrap(module, None)
    module.forward = marked.__call__
    return marked


TRACED = (
    "agentsd: a patched model cannot be traced or exported, nor compiled with fullgraph=True: each call decides anew "
    "on its phase and its random draws, and a trace would keep those of one. Call agentsd.remove_patch first."
)
_REASON = {"reason": TRACED} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}


def is_running(net: nn.Module) -> bool:
    """Whether a call of ``net`` is under way in this thread."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is net:
            return True
        frame = frame.f_back
    return False


def outside_the_graph(function: Function) -> Function:
    """Never trace ``function``: a plan follows the scheduler, and would be compiled anew for each step.

    As a hook of the compiled module itself it runs before its graph is entered, and breaks none.
    """
    disabled: Function = torch.compiler.disable(function, **_REASON)  # type: ignore[no-untyped-call]
    return disabled


def in_one_piece(function: Function) -> Function:
    """Trace ``function`` where a graph leads through it, and leave it and all that it calls alone elsewhere."""
    alone = outside_the_graph(function)

    @functools.wraps(function)
    @never_first
    def either(*args: Any) -> Any:
        return function(*args) if torch.compiler.is_compiling() else alone(*args)

    return cast(Function, either)


def forget_graphs() -> None:
    """Have all that is compiled compiled anew, in whatever form: graphs do not notice hooks that come and go."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def refuse_tracing() -> None:
    """A patch decides anew in each call, and a trace would hold what it decided in one.

    Raises:
        RuntimeError: a trace or an export is being made.
    """
    exporting = getattr(torch.compiler, "is_exporting", bool)()
    if torch._C._get_tracing_state() is not None or exporting:
        raise RuntimeError(TRACED)
