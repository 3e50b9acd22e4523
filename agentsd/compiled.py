"""Living with `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_the_graph(function: Function) -> Function:
    """Never trace ``function``: a plan follows the scheduler, and would be compiled anew for each step.

    As a hook of the compiled module itself it runs before its graph is entered, and breaks none.
    """
    disabled: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


def recompile(*nets: nn.Module) -> None:
    """Forget what is compiled, if a part of ``nets`` is: graphs do not notice hooks that come and go."""
    modules = (module for net in nets for module in net.modules())
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in modules):
        torch.compiler.reset()
