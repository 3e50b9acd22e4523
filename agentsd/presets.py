"""Named settings along the front of speed against fidelity, chosen by measurement (benchmarks/NOTES.md)."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

REUSED = {"cache_order": 1, "cache_cell": 2}

PRESETS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "quality": {**REUSED, "ratio": 0.0, "cache_interval": 2},
        "balanced": {**REUSED, "ratio": 0.0, "cache_interval": 3},
        "fast": {**REUSED, "agent_steps": 0.0, "cache_interval": 5},
        "few_steps": {"sample_kv": True, "agent_sx": 3, "agent_sy": 3},
    }
)
