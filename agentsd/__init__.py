"""AgentSD for diffusers: a training-free accelerator for Stable Diffusion, applied in one line.

Agent attention in the early denoising steps, token merging in the later ones, after "Agent Attention" (Han et al.,
ECCV 2024, arXiv 2312.08874).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentsd.apply import apply_patch, patched, remove_patch
    from agentsd.reports import Report
    from agentsd.settings import PRESETS, Settings
    from agentsd.survey import report
    from agentsd.trials import Tuning
    from agentsd.tuning import tune

__all__ = ["PRESETS", "Report", "Settings", "Tuning", "apply_patch", "patched", "remove_patch", "report", "tune"]
__version__ = "0.2.0"

_HOMES = {
    "PRESETS": "settings",
    "Report": "reports",
    "Settings": "settings",
    "Tuning": "trials",
    "apply_patch": "apply",
    "patched": "apply",
    "remove_patch": "apply",
    "report": "survey",
    "tune": "tuning",
}


def __getattr__(name: str) -> Any:
    """A public name is imported when it is asked for, since `agentsd.vision` does without diffusers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
