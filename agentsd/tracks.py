"""Whose features are whose: the trajectories under way, and the calls that each of their steps makes."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from agentsd.control import Controller, Table
from agentsd.features import Lane, has_values, slowing, worst_error
from agentsd.hosts import Inputs
from agentsd.schedule import Moment
from agentsd.wrapping import Weakly

MOST_LANES = 4  # calls of one step; guidance makes two or three
NEAR = 0.3  # of the size of latents: how far a step takes them at most, where no schedule says that it is one


@dataclass(frozen=True, eq=False)
class Condition:
    """What tells the calls of one step apart: what latents they have and in which types they compute, what they are
    conditioned on and skip.
    """

    kind: tuple[Any, ...]
    text: Tensor | None
    version: int  # of the text, that a loop may write into

    @classmethod
    def of(cls, inputs: Inputs) -> Condition:
        sample, text, kind = inputs.sample, inputs.text, inputs.sample.device.type
        cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if cast else sample.dtype
        version = 0 if text is None or text.is_inference() else text._version
        return cls((sample.shape, sample.dtype, dtype, sample.device, inputs.skipped), text, version)

    def is_in_memory_of(self, other: Condition) -> bool:
        return (self.kind, self.version) == (other.kind, other.version) and _one_memory(self.text, other.text)

    def equals(self, other: Condition) -> bool:
        """Whether it is the same. Values are read only where they are not in the same memory."""
        a, b = self.text, other.text
        if self.kind != other.kind or a is None or b is None or _one_memory(a, b):
            return self.is_in_memory_of(other)
        if a.shape != b.shape or a.device != b.device:
            return False
        return not has_values(a) or torch.equal(a, b)


def _one_memory(a: Tensor | None, b: Tensor | None) -> bool:
    if a is b or a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype or a.storage_offset() != b.storage_offset():
        return False
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


@dataclass(eq=False)
class Step(Lane):
    """A lane, and whose it is; and how its blocks' tokens were matched, in which part of the trajectory."""

    condition: Condition = field(kw_only=True)
    latents: Tensor = field(kw_only=True)  # of its last call
    shapes: dict[str, Any] = field(default_factory=dict)
    used: bool = True  # in the present step
    matched: dict[int, Any] = field(default_factory=dict)
    part: Hashable = None

    def matched_in(self, part: Hashable) -> dict[int, Any]:
        """By the index of a block, for the calls of this part; they add to it."""
        if self.part != part:
            self.part, self.matched = part, {}
        return self.matched


@dataclass(eq=False)
class Track:
    """One trajectory under way: the calls of one image, one step after the other.

    Attributes:
        schedule: equal for its calls; None where nothing but the order of timesteps tells.
        pace: decides which calls are full.
        calls: how many the schedule has, where it says.
        call: the place of the last one.
        loop: what its calls have in common (`agentsd.hosts.Inputs`), while the loop that made it holds it.
        lanes: the features of each of the calls that a step makes.
        read_by: what looks on at the middle, so that all calls are full.
        steady: whether the last two steps made as many calls.
        begun: whether it had a call.
    """

    schedule: Hashable
    pace: Table | Controller
    calls: int | None
    call: int
    loop: Weakly[Tensor] = field(default_factory=lambda: Weakly(None))
    lanes: list[Step] = field(default_factory=list)
    read_by: str = ""
    begun: bool = False
    steady: bool = False
    crowded: bool = False
    before: int = 0  # calls of the step before

    def may_be(self, schedule: Hashable, loop: Tensor | None) -> bool:
        """Whether nothing says that a call of this schedule and this loop is another trajectory's."""
        mine = self.loop()  # None, too, where a loop makes it anew for each call
        return self.schedule == schedule and (mine is None or loop is None or mine is loop)

    def follows(self, moment: Moment) -> bool:
        """Whether a call at ``moment`` may be this trajectory's next: of the same step, or of the one after it."""
        if moment.calls is None:
            return moment.call >= self.call
        return moment.call in (self.call, self.call + 1)

    def is_near(self, sample: Tensor) -> bool:
        """Whether latents may be a step from those of the last calls, and not noise anew. It waits for the device."""
        every = [lane.latents for lane in self.lanes]
        known = [x for x in every if (x.shape, x.device) == (sample.shape, sample.device)]
        return not known or not has_values(sample) or min(_apart(sample, latents) for latents in known) <= NEAR

    @property
    def ended(self) -> bool:
        return self.calls is not None and self.call >= self.calls - 1

    def step_to(self, call: int) -> None:
        if call == self.call:
            return
        made = sum(lane.used for lane in self.lanes)
        unused = [lane for lane in self.lanes if not lane.used]
        # of calls that nothing tells apart, nothing tells either which of them the last step left out
        sure = [lane for lane in self.lanes if not any(lane.condition.equals(other.condition) for other in unused)]
        self.lanes = [] if self.crowded else [lane for lane in sure if lane.used]
        self.steady = made == self.before and not self.crowded
        self.before, self.call, self.crowded = made, call, False
        for lane in self.lanes:
            lane.used = False

    def is_full(self, place: int) -> bool:
        """Whether the call at this place of the trajectory is full."""
        return self.pace.full(place, (lane.error for lane in self.lanes if lane.error is not None))

    def lane(self, condition: Condition, sample: Tensor, order: int, measures: bool, follows: bool) -> Step:
        """The lane of the next call. One that nothing is known of is new, and its first call will be full.

        Where several are alike in all but their latents, these are compared, and the device is waited for.
        """
        alike = [lane for lane in self.lanes if lane.condition.is_in_memory_of(condition)]
        alike = alike or [lane for lane in self.lanes if lane.condition.equals(condition)]
        free = [lane for lane in alike if not lane.used]
        if free and (len(alike) == 1 or self.steady):
            told = len(free) > 1 and has_values(sample)
            lane = min(free, key=lambda lane: _apart(sample, lane.latents)) if told else free[0]
            lane.used, lane.latents = True, sample
            return lane
        # they are not told apart, and may be another image's: a warm-up, or one that was interrupted
        self.lanes = [lane for lane in self.lanes if lane not in free]
        if len(self.lanes) == MOST_LANES:
            self.lanes, self.crowded = [], True
        slows = slowing(self.calls)
        new = Step(order, slowing=slows, measures=measures, follows=follows, condition=condition, latents=sample)
        self.lanes.append(new)
        return new


def _apart(sample: Tensor, before: Tensor) -> float:
    return float(worst_error(before, sample))
