"""Named settings, chosen by measuring speed against fidelity (benchmarks/NOTES.md)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")
REUSED = {"agent_steps": 0.0, "cache_order": 1, "cache_cell": 2}

PRESETS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "quality": {**REUSED, "ratio": 0.0, "cache_interval": 0.095},
        "balanced": {**REUSED, "ratio": 0.0, "cache_interval": 0.125},
        "fast": {**REUSED, "cache_interval": 0.125},
        "few_steps": {"sample_kv": True, "agent_sx": 3, "agent_sy": 3},
    }
)


def takes_preset(function: Callable[P, T]) -> Callable[P, T]:
    """Let the settings of ``preset=`` stand in for the arguments that a call of ``function`` leaves out.

    Raises:
        ValueError: there is no preset of this name.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def with_preset(*args: P.args, **kwargs: P.kwargs) -> T:
        preset = kwargs.get("preset")
        if preset is None:
            return function(*args, **kwargs)
        if preset not in PRESETS:
            names = ", ".join(map(repr, PRESETS))
            raise ValueError(
                f"preset={preset!r} is not allowed: expected one of {names}, or None for the paper's schedule."
            )
        given = signature.bind(*args, **kwargs).arguments
        return cast("Callable[..., T]", function)(**{**PRESETS[str(preset)], **given})

    return with_preset
