"""AgentSD for diffusers: a training-free accelerator for Stable Diffusion, applied in one line.

Agent attention in the early denoising steps, token merging in the later ones, after "Agent Attention" (Han et al.,
ECCV 2024, arXiv 2312.08874).
"""

from agentsd.apply import apply_patch, patched, remove_patch
from agentsd.reports import Report, report
from agentsd.settings import PRESETS, Settings
from agentsd.tuning import Tuning, tune

__all__ = ["PRESETS", "Report", "Settings", "Tuning", "apply_patch", "patched", "remove_patch", "report", "tune"]
__version__ = "0.1.0"
