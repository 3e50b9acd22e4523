"""Loops that make their denoiser's timesteps themselves, followed without waiting for the device in each call."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from torch import Tensor

from agentsd.features import Arriving
from agentsd.wrapping import Weakly

SURE = 2  # places in a row that were read, after which a scheduler that was at each of them is this loop's


class Loop:
    """Where the calls of one loop are, as far as Python knows.

    Two things tell, and neither is relied on alone. A call of the very latents of the one before is at the same place,
    as guidance makes it, and a call of others at the next. And the scheduler counts its steps in Python, but it may be
    another loop's. Where the two agree, and did so at the last `SURE` places that were read, the place is theirs;
    anywhere else it is read. What was not read is sent for, and looked at two calls later, when it has arrived: a loop
    that turns out to be elsewhere is read again.
    """

    def __init__(self) -> None:
        self._schedule: Hashable = None
        self._place: int | None = None  # of the last call
        self._sample: Weakly[Tensor] = Weakly(None)
        self._agreed = 0  # places in a row that were read, and that the latents and the scheduler told, too
        self._sent: deque[tuple[Arriving, float]] = deque()

    def _next(self, schedule: Hashable, sample: Tensor | None) -> int | None:
        if self._place is None or schedule != self._schedule:
            return None
        return self._place if sample is self._sample() else self._place + 1

    def expected(self, schedule: Hashable, at: int | None, sample: Tensor | None) -> int | None:
        """The place of a call of these latents, (B, ...), with the scheduler ``at`` its own; None: read it."""
        while len(self._sent) > 1:
            error, tolerance = self._sent.popleft()
            if not error.value <= tolerance:
                self._agreed = 0
        return at if self._agreed >= SURE and self._next(schedule, sample) == at else None

    def follow(self, place: int, sample: Tensor | None, error: Tensor, tolerance: float) -> None:
        """A call was taken to be at this place; ``error``, (), is how far its timestep is off."""
        self._place, self._sample = place, Weakly(sample)
        self._sent.append((Arriving(error), tolerance))

    def read(self, schedule: Hashable, place: int | None, at: int | None, sample: Tensor | None) -> None:
        """A call was at this place, or at none of the schedule, and the scheduler ``at`` its own."""
        if place is None or place != at:
            self._agreed = 0
        elif place != self._next(schedule, sample):
            self._agreed = 1
        elif place != self._place:
            self._agreed += 1
        self._schedule, self._place, self._sample = schedule, place, Weakly(sample)
        self._sent.clear()
