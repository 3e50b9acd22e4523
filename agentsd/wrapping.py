"""Standing in for a module's ``forward``, and living with `torch.compile`."""

from __future__ import annotations

import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import nn

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])


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
    """Has ``around(forward, ...)`` called for ``module.forward(...)``, until `undo`.

    It holds the module weakly: a cycle would keep a denoiser in memory after its pipeline is deleted.
    """

    def __init__(self, module: nn.Module, around: Callable[..., Any]) -> None:
        self.around: Callable[..., Any] | None = around
        self._module = weakref.ref(module)
        self._inner: Callable[..., Any] | None = vars(module).get("forward")
        self._class_s = type(module).forward  # now: in a graph, classes that diffusers allows there have no attributes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], nn.Module):  # accelerate has bound it to the module, as if it were a function
            args = args[1:]
        # a partial function: of a method that is made in a graph, the compiler of PyTorch 2.6 knows nothing
        forward = self._inner if self._inner is not None else functools.partial(self._class_s, self._module())
        return forward(*args, **kwargs) if self.around is None else self.around(forward, *args, **kwargs)

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
        if vars(module).get("forward") is self and self._inner is None:
            del module.forward
        hooks = getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ())
        for holder in (module, *hooks):
            for name in ("forward", "_old_forward", "_original_forward", "original_forward"):  # accelerate, diffusers
                found = vars(holder).get(name)
                if found is self or getattr(found, "__func__", None) is self:
                    setattr(holder, name, before)


def wrap(module: nn.Module, around: Callable[..., Any]) -> Wrap:
    wrapped = Wrap(module, around)
    module.forward = wrapped
    return wrapped


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
