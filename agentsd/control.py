"""Which calls of a trajectory are full: those of a table, or as the errors of the estimates tell."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

from agentsd.features import Arriving
from agentsd.schedule import FIRST_GAP, Reusing, full_calls, interval_of

SHORTEST, LONGEST = 2, 10  # calls from one full call to the next; the longest is a fifth of a long trajectory
SHRINK, GROW = 0.3, 2.0  # at most, from one gap to the next
LOOSE, TIGHT = 1.6, 0.4  # the tolerance in the first call and after the last, in units of ``cache_tolerance``


class Tolerance(Reusing, Protocol):
    """The settings that say which calls are full."""

    @property
    def cache_tolerance(self) -> float: ...

    @property
    def cache_budget(self) -> float: ...


def most_full(calls: int, settings: Tolerance, evenly: bool = False) -> int:
    """How many of a trajectory's calls are full; where errors decide, how many may be."""
    if not settings.cache_tolerance:
        return sum(full_calls(calls, settings, evenly=evenly))
    return min(max(int(settings.cache_budget * calls), 3), calls // SHORTEST + 1)


class Table:
    """The calls of `agentsd.schedule.full_calls`."""

    def __init__(self, settings: Reusing, calls: int | None, begin: int, evenly: bool = False) -> None:
        self._full = full_calls(calls, settings, begin, evenly)

    def full(self, call: int, errors: Iterable[Arriving]) -> bool:
        """Whether this call is full; where a step makes several, they are asked for in turn and agree."""
        return call >= len(self._full) or self._full[call]


class Controller:
    """The next full call comes the sooner, the further the estimate was off at the last one.

    At a full call the true features come to stand beside their estimate. An error r after a gap of g calls makes the
    next gap g (tolerance / r) ** (1 / (order + 1)): features that are held are off by the distance, a line is by its
    square. The tolerance falls along the trajectory, because what is wrong early is mended later
    (benchmarks/NOTES.md). The first two calls and the last but one are full in any case, as in a table with
    ``cache_order=1``.

    Args:
        calls: of the whole schedule; None where nobody says.
        begin: the place in it of the first call that is made.
    """

    def __init__(self, settings: Tolerance, calls: int | None, begin: int) -> None:
        self._order = settings.cache_order
        self._tolerance, self._calls, self._begin = settings.cache_tolerance, calls, begin
        self._first = max(SHORTEST, int(FIRST_GAP * interval_of(settings.cache_interval, calls) + 0.5))
        self._left = most_full(calls - begin, settings) if calls is not None else None
        self._asked = self._latest = -1
        self._gap = 1.0  # before the latest full call
        self._next: int | None = None  # None as long as the latest full call's error has not been asked for
        self._answer = False

    def full(self, call: int, errors: Iterable[Arriving]) -> bool:
        """Whether this call is full. ``errors``: of the latest full call, one of each call of the step."""
        if call != self._asked:
            self._asked, self._answer = call, self._decide(call, errors)
            if self._answer:
                self._gap = float(max(call - self._latest, 1))
                self._latest, self._next = call, None
                self._left = self._left - 1 if self._left is not None else None
        return self._answer

    def _decide(self, call: int, errors: Iterable[Arriving]) -> bool:
        if call - self._begin < 2 or (self._calls is not None and call == self._calls - 2):
            return True
        if call - self._latest < SHORTEST:  # time for the error to arrive
            return False
        if self._next is None:
            self._next = self._latest + self._next_gap(errors)
        return call >= self._next

    def _next_gap(self, errors: Iterable[Arriving]) -> int:
        least, most = SHORTEST, LONGEST
        if self._calls is not None and self._left is not None:
            ahead, free = self._calls - 2 - self._latest, self._left - 1  # the last but one is spoken for
            least = max(least, -(-ahead // (free + 1)))
            most = max(most, least, self._calls // 5)
        values = [error.value for error in errors] if self._latest - self._begin > self._order else []
        if not values:
            return max(self._first, least)
        share = self._latest / self._calls if self._calls is not None else 0.5
        tolerance = self._tolerance * (LOOSE - (LOOSE - TIGHT) * share)
        worst = max(values) if all(map(math.isfinite, values)) else math.inf  # where half precision overflows
        change = (tolerance / max(worst, 1e-9)) ** (1 / (self._order + 1))
        gap = self._gap * min(max(change, SHRINK), GROW)
        return min(max(int(gap + 0.5), least), most)
