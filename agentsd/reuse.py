"""Feature reuse: most denoiser calls run the outermost layers alone, and take the deep features from before.

Deep features change slowly along the trajectory (DeepCache, Ma et al., CVPR 2024, arXiv 2312.00858). Nothing of the
denoiser is rewritten: in a cached call a module of its middle hands back a blank of the right shape where nobody reads
it, and the remembered features where the first layer that runs does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from agentsd.features import Lane
from agentsd.hosts import Inputs, Middle
from agentsd.planner import Call, Now
from agentsd.processor import keeper
from agentsd.schedule import Moment, full_calls, interval_of
from agentsd.settings import Settings
from agentsd.wrapping import Weakly, Wrap, wrap

MOST_LANES = 4  # calls of one step; guidance makes two or three
MOST_TRACKS = 4  # trajectories whose calls may come in turns, in each thread


@dataclass(frozen=True, eq=False)
class Condition:
    """What tells the calls of one step apart: the shape of the latents, and what they are conditioned on."""

    kind: tuple[Any, ...]
    text: Tensor | None

    @classmethod
    def of(cls, inputs: Inputs) -> Condition:
        sample = inputs.sample
        return cls((sample.shape, sample.dtype, sample.device), inputs.text)

    def is_in_memory_of(self, other: Condition) -> bool:
        a, b = self.text, other.text
        if self.kind != other.kind or a is b or a is None or b is None:
            return self.kind == other.kind and a is b
        if a.shape != b.shape or a.dtype != b.dtype or a.storage_offset() != b.storage_offset():
            return False
        return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)

    def equals(self, other: Condition) -> bool:
        """Whether it is the same. Values are read only where they are not in the same memory."""
        if self.kind != other.kind or self.is_in_memory_of(other) or self.text is None or other.text is None:
            return self.is_in_memory_of(other)
        a, b = self.text, other.text
        if a.shape != b.shape or a.device != b.device:
            return False
        return a.is_meta or isinstance(a, FakeTensor) or torch.equal(a, b)  # these have no values


@dataclass
class Step(Lane):
    """A lane, and whose it is."""

    condition: Condition = field(kw_only=True)
    shapes: dict[str, Any] = field(default_factory=dict)
    used: bool = True  # in the present step


@dataclass
class Track:
    """One trajectory under way: the calls of one image, one step after the other.

    Attributes:
        schedule: equal for its calls; None where nothing but the order of timesteps tells.
        full: for each call, whether it is full.
        calls: how many the schedule has, where it says.
        call: the place of the last one.
        lanes: the features of each of the calls that a step makes.
        read_by: what reads the attention of the middle, so that all calls are full.
        steady: whether the last two steps made as many calls.
    """

    schedule: Hashable
    full: tuple[bool, ...]
    calls: int | None
    call: int
    lanes: list[Step] = field(default_factory=list)
    read_by: str = ""
    steady: bool = False
    crowded: bool = False
    before: int = 0  # calls of the step before

    def follows(self, moment: Moment) -> bool:
        """Whether a call at ``moment`` may be this trajectory's next: of the same step, or of the one after it."""
        if moment.calls is None:
            return moment.call >= self.call
        return moment.call in (self.call, self.call + 1)

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

    def lane(self, condition: Condition, order: int) -> Step:
        """The lane of the next call. One that nothing is known of is new, and its first call will be full."""
        alike = [lane for lane in self.lanes if lane.condition.is_in_memory_of(condition)]
        alike = alike or [lane for lane in self.lanes if lane.condition.equals(condition)]
        free = [lane for lane in alike if not lane.used]
        if free and (len(alike) == 1 or self.steady):
            free[0].used = True
            return free[0]
        # they are not told apart, and may be another image's: a warm-up, or one that was interrupted
        unsure = {id(lane) for lane in free}
        self.lanes = [lane for lane in self.lanes if id(lane) not in unsure]
        if len(self.lanes) == MOST_LANES:
            self.lanes, self.crowded = [], True
        self.lanes.append(Step(order, condition=condition))
        return self.lanes[-1]


class Reuse:
    """Decides which calls are full, and answers for the middle in the others."""

    def __init__(self, settings: Settings, middle: Middle, now: Now) -> None:
        self.settings = settings
        self.middle = middle
        self._now = now
        self._net: Weakly[nn.Module] = Weakly(None)
        self._full = 0  # calls in a row
        self._warned = False

    def attach(self, net: nn.Module) -> list[tuple[nn.Module, Wrap]]:
        """Let the middle be skipped; `Wrap.undo` of each undoes it."""
        self._net = Weakly(net)
        middle, wraps = self.middle, []
        for name in (*middle.unread, middle.last):
            answer = self._last if name == middle.last else self._unread
            module = net.get_submodule(name)
            wraps.append((module, wrap(module, partial(answer, name))))
        return wraps

    def before_call(self, moment: Moment, inputs: Inputs) -> Call:
        """Decide on the call at ``moment``. Calls of a trajectory that cannot be told from another's are full."""
        if torch.is_grad_enabled() or moment.mixed:
            if moment.mixed:
                self._warn("the samples of a call are at several timesteps")
            return Call()
        track = self._track(moment)
        if track.read_by:
            self._warn(f"{track.read_by} reads the attention of a layer that cached calls skip")
            return Call()
        if moment.call != track.call and track.crowded:
            self._warn(
                f"a step makes more than {MOST_LANES} calls of one shape, and nothing says which of the last step's "
                "each follows. Give their samples in fewer, larger calls"
            )
        track.step_to(moment.call)
        lane = track.lane(Condition.of(inputs), self.settings.cache_order)
        lane.begin()
        place = moment.call if moment.calls is not None else lane.calls
        planned = place >= len(track.full) or track.full[place]
        cached = not (planned or lane.due or (lane.order and lane.calls < 2))
        lane.due = lane.due or not cached
        self._count(full=not cached)
        shapes = lane.shapes if lane.shapes else dict.fromkeys((*self.middle.unread, self.middle.last))
        lane.shapes = shapes  # all keys now: graphs are guarded by which there are
        features = lane.estimate() if cached else None
        return Call(cached, features=features, lane=lane, shapes=shapes, writes=inputs.writes)

    def after_call(self, call: Call) -> None:
        if not call.cached and call.features is not None and call.lane is not None:
            # a graph of its own memory may write the next call's features where it wrote these
            call.lane.remember(call.features.clone() if call.borrowed else call.features)

    def _track(self, moment: Moment) -> Track:
        tracks: list[Track] = self._now.tracks
        for track in tracks:
            if track.schedule == moment.schedule and track.follows(moment):
                return track
        begin = moment.call if moment.calls is not None else 0
        full = full_calls(moment.calls, self.settings, begin)
        new = Track(moment.schedule, full, moment.calls, moment.call, read_by=self._reader())
        others = [track for track in tracks if track.schedule != moment.schedule and not track.ended]
        tracks[:] = [*others[1 - MOST_TRACKS :], new]
        return new

    def _reader(self) -> str:
        """The processor of self-attention guidance, if it is in the middle."""
        modules = net.named_modules() if (net := self._net()) is not None else ()
        held = (m for name, m in modules if hasattr(m, "processor") and self.middle.holds(name))
        return next((keeper(m) for m in held if hasattr(m.processor, "attention_probs")), "")

    def _count(self, full: bool) -> None:
        self._full = self._full + 1 if full else 0
        if self._full >= 2 * interval_of(self.settings.cache_interval) + 4:
            self._warn(f"none of the last {self._full} calls follows another of the same trajectory")

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"agentsd reuses no features: {why}.", stacklevel=2)

    def _unread(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self._now.call
        if call is None or call.shapes is None:
            return forward(*args, **kwargs)
        if call.cached:
            return _blank(call.shapes[name], call)
        output = forward(*args, **kwargs)
        call.shapes[name] = _shapes(output)
        return output

    def _last(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self._now.call
        if call is None or call.shapes is None:
            return forward(*args, **kwargs)
        if call.cached:
            return (call.features,) if call.shapes[name] else call.features
        output = forward(*args, **kwargs)
        call.shapes[name] = isinstance(output, tuple)  # a transformer gives its features in a tuple
        features = (output[0] if call.shapes[name] else output).detach()
        call.borrowed = torch.compiler.is_compiling()
        call.features = features if call.borrowed and not call.writes else features.clone()
        return output

    @property
    def nbytes(self) -> int:
        """Memory of the features that the present thread keeps between calls."""
        return sum(lane.nbytes for track in self._now.tracks for lane in track.lanes)


def _shapes(output: Any) -> Any:
    return tuple(map(_shapes, output)) if isinstance(output, tuple) else output.shape


def _blank(shapes: Any, call: Call) -> Any:
    """What stands where nothing reads: of the right shape and of no memory, unless the call writes into it."""
    if not isinstance(shapes, torch.Size):
        return tuple(_blank(shape, call) for shape in shapes)
    features: Any = call.features
    return features.new_zeros(shapes) if call.writes else features.as_strided(shapes, (0,) * len(shapes))
