"""What holds when along a denoising trajectory: its phases, and which of its calls are full."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

FIRST_GAP = 0.3  # of the mean gap, where the gaps between full calls begin to grow; they end at 1.7 of it
EVEN_CALLS = 10  # from which evenly spread full calls may skip the second; a shorter trajectory changes too fast
USUAL_CALLS = 25  # of a trajectory of which nobody says how many it has
ENDLESS = 1000  # calls that are planned for one


@dataclass(frozen=True)
class Counts:
    """What becomes of the N tokens of one layer in one phase.

    Attributes:
        tokens: N, the tokens of the grid.
        merged: r, how many src tokens are merged away; 0 means that the layer is left as it is.
        agents: how many agent tokens mediate the attention; 0 means softmax attention.
        keys: how many tokens stay keys and values where these are sampled; 0 means that they are not.
    """

    tokens: int
    merged: int = 0
    agents: int = 0
    keys: int = 0

    @property
    def changed(self) -> bool:
        return self.merged > 0 or self.keys > 0

    @property
    def remaining(self) -> int:
        return self.tokens - self.merged

    @property
    def attention_cost(self) -> float:
        """Multiply-adds of the attention products, as a share of unpatched attention's N x N."""
        if self.keys:
            return self.keys / self.tokens
        return self.remaining * (2 * self.agents or self.remaining) / self.tokens**2


@dataclass(frozen=True)
class Phase:
    """One part of the denoising trajectory: how tokens are merged there, and by how much for agents.

    Attributes:
        name: ``"agent"`` or ``"merge"``, or ``"cached"`` for calls that reuse deep features.
        sy, sx: the cell of the token grid that keeps one dst token.
        ratio: share of the tokens to merge.
        agent_ratio: share of the tokens to merge into agents; None where attention stays softmax attention.
        sample_kv: merge nothing, and keep the dst tokens alone as keys and values.
        min_tokens: grids of fewer tokens are left as they are.
    """

    name: str
    sy: int
    sx: int
    ratio: float
    agent_ratio: float | None = None
    sample_kv: bool = False
    min_tokens: int = 0

    def counts(self, height: int, width: int) -> Counts:
        """The token counts on a ``height`` x ``width`` grid.

        Agents pay only where the two products with them are cheaper than the one they replace, that is where
        ``2 * agents < tokens - merged``; elsewhere the layer merges tokens and keeps softmax attention.
        """
        tokens = height * width
        dst = (height // self.sy) * (width // self.sx)
        src = tokens - dst
        if src == tokens or tokens < self.min_tokens:  # a grid smaller than a cell has no dst
            return Counts(tokens)
        if self.sample_kv:
            return Counts(tokens, keys=dst if src else 0)
        merged = min(int(tokens * self.ratio), src)
        if merged == 0 or self.agent_ratio is None:
            return Counts(tokens, merged)
        agents = tokens - min(int(tokens * self.agent_ratio), src)
        return Counts(tokens, merged, agents if 2 * agents < tokens - merged else 0)


class Moment(NamedTuple):
    """``step`` of the trajectory's ``steps`` are behind us, and ``call`` denoiser calls: Heun makes two a step.

    Guidance that takes two calls makes both at the same moment. There are ``calls`` in all, which is None where no
    schedule says; ``schedule`` is equal for the calls of one schedule, and for no other's. A ``mixed`` batch has
    samples at several timesteps.
    """

    step: int
    steps: int
    call: int = 0
    calls: int | None = None
    schedule: Hashable = None
    mixed: bool = False

    def within_first(self, share: float) -> bool:
        """Whether this step belongs to the first ``share`` of the trajectory, rounded to whole steps."""
        return self.step < round(share * self.steps)


class Reusing(Protocol):
    """The settings that say which calls are full."""

    @property
    def cache_interval(self) -> float: ...

    @property
    def cache_order(self) -> int: ...


def interval_of(interval: float, calls: int | None = None) -> int:
    """``cache_interval`` in calls: below 1 it is a share of a trajectory of ``calls``, rounded, and at least 2.

    Fidelity follows the number of full calls, however many lie between them (benchmarks/NOTES.md).
    """
    return int(interval) if interval >= 1 else max(2, math.floor(interval * (calls or USUAL_CALLS) + 0.5))


def full_calls(calls: int | None, settings: Reusing, begin: int = 0, evenly: bool = False) -> tuple[bool, ...]:
    """For each call of a trajectory, whether it runs the whole denoiser; the others are cached calls.

    Every ``interval``-th call is full. Where features are extrapolated (``cache_order`` 1) as many are, and at most
    two more: the second, since features move fastest in the first steps, and the last but one, which gives the image
    its texture. Between these two the gaps grow evenly, from `FIRST_GAP` of their mean: what is wrong in the first
    quarter decides which images go wrong (benchmarks/NOTES.md). Where features follow their input instead, full calls
    are spread ``evenly``, ``interval`` apart or a little more, and in 10 calls and more without the second.

    Args:
        calls: of the whole schedule; None where nobody says, and then enough of them are planned.
        begin: the place in it of the first call that is made: img2img starts in the middle. Full calls are spread over
            those that are made, as far apart on average as in the whole schedule.
        evenly: whether features follow their input rather than a line in time, where ``cache_order`` is 1.
    """
    interval = interval_of(settings.cache_interval, calls)
    made = range((calls or ENDLESS) - begin)
    if settings.cache_order == 0 or (evenly and calls is None):
        full = [i % interval == 0 for i in made]
    elif calls is None:
        full = [i < 2 or i % interval == 0 for i in made]
    else:
        last = len(made) - 2
        if evenly and len(made) >= EVEN_CALLS:
            places = set(_growing(0, last, max(1, last // interval), 1.0))
        else:
            first = 1.0 if evenly else FIRST_GAP
            places = {0, *_growing(1, last, math.ceil((last - 1) / interval), first)}
        full = [i in places for i in made]
    return (True,) * begin + tuple(full)


def _growing(start: int, last: int, gaps: int, first: float) -> list[int]:
    """Places from ``start`` to ``last`` in so many gaps, which grow evenly from ``first`` of their mean."""
    places = [start]
    for i in range(1, gaps + 1):
        share = i / gaps
        place = start + (last - start) * share * (first + (1 - first) * share)
        places.append(max(places[-1] + 1, math.ceil(place - 0.5)))
    return places
