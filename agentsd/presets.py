"""Named settings along the front of speed against fidelity, chosen by measurement (benchmarks/NOTES.md)."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

SAMPLED_2 = {"sample_kv": True, "sx": 2, "sy": 2, "agent_sx": 2, "agent_sy": 2}
SAMPLED_3 = {"sample_kv": True, "sx": 3, "sy": 3, "agent_sx": 3, "agent_sy": 3}

PRESETS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "quality": SAMPLED_2,
        "balanced": {**SAMPLED_2, "cache_interval": 2, "cache_order": 1},
        "fast": {**SAMPLED_3, "cache_interval": 3, "cache_order": 1},
    }
)
