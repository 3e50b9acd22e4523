"""What a denoiser call is to do, decided before it from plain numbers, and then frozen."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from agentsd.features import Lane
from agentsd.matching import Edges, Matching, Partition, partitions
from agentsd.schedule import Counts, Moment, Phase
from agentsd.settings import Settings

Grid = tuple[int, int]
DRAWN_AHEAD = 2**24  # bytes of draws that are made at once, as far as the schedule is known
MOST_DRAWS = 4  # kept for later: of each phase, and of the image after this one, which may have the same seed


@dataclass(frozen=True)
class Plan:
    """One denoiser call.

    Attributes:
        phase: how tokens are merged or sampled.
        steps: of the trajectory, that the schedule has in one phase with this call's.
        counts: by the index of a patched block, what becomes of its tokens; without the blocks that are left alone.
    """

    phase: Phase
    steps: range
    counts: dict[int, Counts]


def plan(settings: Settings, moment: Moment, grids: Sequence[Grid], cached: bool, outermost: Sequence[bool]) -> Plan:
    """The plan of the call at ``moment``.

    Args:
        grids: the token grid of each patched block.
        cached: whether the call reuses deep features.
        outermost: for each patched block, whether a cached call runs it.
    """
    phase = settings.phase_at(moment)
    if cached and settings.cached is not None:
        phase = settings.cached
    agents = round(settings.agent_steps * moment.steps)
    steps = range(agents) if moment.step < agents else range(agents, max(moment.steps, moment.step + 1))
    counts = {i: _counts(phase, grid) for i, grid in enumerate(grids) if outermost[i] or not cached}
    return Plan(phase, steps, {i: found for i, found in counts.items() if found.changed})


@lru_cache(maxsize=256)
def _counts(phase: Phase, grid: Grid) -> Counts:
    return phase.counts(*grid)


@dataclass(frozen=True)
class BlockPlan:
    """What becomes of the tokens of one block in one call, and which of them are dst."""

    counts: Counts
    partition: Partition


class Draws:
    """The random choice of dst tokens, for every block and step of a trajectory at once, on the device.

    Each block has a generator of its own at each step, or round of steps (`source`): a draw is the same however
    often, and in what order, it is asked for, and no generator of the user's is advanced.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return Draws, ()

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], list[dict[int, Partition]]] = {}

    def blocks(
        self, plan: Plan, grids: Sequence[Grid], moment: Moment, seed: int | None, device: torch.device
    ) -> dict[int, BlockPlan]:
        """The plans of all blocks that ``plan`` changes. Without a ``seed`` dst tokens are the top-left of cells."""
        if not plan.counts:
            return {}
        used = {i: grids[i] for i in plan.counts}
        steps = range(moment.step, moment.step + 1)
        if seed is not None and moment.calls is not None:  # the schedule is known, and so are the steps to come
            ahead = max(1, DRAWN_AHEAD // sum(2 * 4 * height * width for height, width in used.values()))
            passed = (moment.step - plan.steps.start) // ahead * ahead + plan.steps.start
            steps = range(passed, min(passed + ahead, plan.steps.stop))
        how = (plan.phase.sy, plan.phase.sx, plan.phase.sample_kv)
        key = (how, tuple(used.items()), seed, device, steps if seed is not None else None)
        if (drawn := self._made.get(key)) is None:
            drawn = self._draw(plan.phase, used, seed, steps, device)
            while len(self._made) >= MOST_DRAWS:
                self._made.pop(next(iter(self._made)), None)
            self._made[key] = drawn
        step = drawn[moment.step - steps.start]
        return {i: BlockPlan(counts, step[i]) for i, counts in plan.counts.items()}

    @staticmethod
    def _draw(
        phase: Phase, used: dict[int, Grid], seed: int | None, steps: range, device: torch.device
    ) -> list[dict[int, Partition]]:
        drawn: list[dict[int, Partition]] = [{} for _ in steps]
        # of use under gradients, too, and in functions that torch.func transforms
        with torch.inference_mode(False), torch.no_grad(), torch._C._DisableFuncTorch():
            for grid in set(used.values()):
                indices = [i for i, other in used.items() if other == grid]
                each = [(None, 0) if seed is None else source(seed, phase, s, i) for s in steps for i in indices]
                generators, turns = zip(*each, strict=True)
                made = iter(partitions(*grid, phase.sy, phase.sx, generators, device, turns))
                for step in drawn:
                    step |= {i: next(made) for i in indices}
        return drawn


def source(seed: int, phase: Phase, step: int, index: int) -> tuple[torch.Generator, int]:
    """Of the draw of the ``index``-th block at a step: its generator, and which turn of its cells' tokens it is.

    The tokens of a cell whose keys are sampled take turns, so that the next steps see what one leaves out
    (benchmarks/NOTES.md). Where tokens are merged, each step draws anew.
    """
    number, turn = divmod(step, phase.sy * phase.sx) if phase.sample_kv else (step, 0)
    digest = hashlib.blake2b(f"{seed}/{number}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1), turn


@dataclass
class Matched:
    """How a block's tokens were matched, as far as was asked: in this call, or in one of the calls before.

    Attributes:
        merging: around its layers.
        agents: into agents.
    """

    edges: Edges | None = None
    merging: Matching | None = None
    agents: Matching | None = None


@dataclass
class Running:
    """One call of a block, as far as it has come.

    Attributes:
        plan: of the block.
        x: (B, N, C), the input of the block, by which its tokens are matched.
        matched: so far.
        merged: whether the layer that runs has merged tokens, which are to be unmerged.
        handed: to the processor that has taken over its attention: agents, (B, A, C), or `agentsd.joint.Part`.
    """

    plan: BlockPlan
    x: Tensor
    matched: Matched = field(default_factory=Matched)
    merged: bool = False
    handed: Any = None


@dataclass
class Call:
    """A denoiser call under way.

    Attributes:
        cached: whether it reuses deep features.
        blocks: the plans of the patched blocks that are changed in it, by their index.
        running: the block that runs.
        matched: what is known of the blocks' tokens from calls before, by their index; the call adds to it.
        features: what stands for the middle in a cached call, or is to be remembered of a full one.
        lane: where they come from, and go to.
        begins: whether it is the first of its trajectory.
        shapes: of the modules of the middle, by name or class, what their outputs look like.
        entered: the input of the middle, where the features are what it adds to that.
        writes: whether outputs of the middle may be written into.
        borrowed: whether the features are in memory that a graph will write into again.
        recomputed: whether it is run a second time, for its gradients.
    """

    cached: bool = False
    blocks: dict[int, BlockPlan] = field(default_factory=dict)
    running: Running | None = None
    matched: dict[int, Matched] = field(default_factory=dict)
    features: Tensor | None = None
    lane: Lane | None = None
    begins: bool = False
    shapes: dict[str, Any] | None = None
    entered: Tensor | None = None
    writes: bool = False
    borrowed: bool = False
    recomputed: bool = False


class Now(threading.local):
    """What is under way in the present thread; a copy of it begins with nothing.

    Attributes:
        call: the denoiser call.
        tracks: the trajectories (`agentsd.tracks.Track`).
    """

    def __init__(self) -> None:
        self.call: Call | None = None
        self.tracks: list[Any] = []

    @property
    def running(self) -> Running | None:
        """The block that runs."""
        return self.call.running if self.call is not None else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Now, ()
