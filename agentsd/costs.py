"""What the self-attention of a patched layer takes where it is, with and without the patch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from agentsd.block import PatchedBlock
from agentsd.matching import partitions
from agentsd.planner import BlockPlan, Grid
from agentsd.schedule import Counts, Phase

COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RUNS = 7  # of which the median is taken, after two that warm up


def attention_seconds(
    block: PatchedBlock, attn: Any, grid: Grid, phases: list[Phase], counts: Mapping[str, Counts]
) -> dict[str, float]:
    """Seconds of a call of the layer on random tokens of two samples, by the name of the phase, and ``"unpatched"``.

    Matching, merging and unmerging are part of it. Empty where its weights are not computed with as they are:
    quantised, cast layer by layer, or elsewhere until they are needed.
    """
    weight = getattr(attn.to_q, "weight", None)
    offloaded = any(hasattr(layer, "_hf_hook") or hasattr(layer, "_diffusers_hook") for layer in (attn, attn.to_q))
    if not isinstance(weight, torch.Tensor) or weight.dtype not in COMPUTED or weight.is_meta or offloaded:
        return {}
    tokens, device = grid[0] * grid[1], weight.device
    x = torch.randn(2, tokens, attn.to_q.in_features, device=device, dtype=weight.dtype)
    plans: dict[str, BlockPlan | None] = {"unpatched": None}
    for phase in phases:
        if counts.get(phase.name, Counts(tokens)).changed:
            dst = partitions(*grid, phase.sy, phase.sx, [None], device)[0]
            plans[phase.name] = BlockPlan(counts[phase.name], dst)
    with torch.inference_mode():
        return {name: _seconds(partial(block.attend, attn, x, plan), device) for name, plan in plans.items()}


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    taken = []
    for _ in range(RUNS + 2):
        start = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])
