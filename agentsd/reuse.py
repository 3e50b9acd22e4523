"""Feature reuse: most denoiser calls run the outermost layers alone, and take the deep features from before.

Deep features change slowly along the trajectory (DeepCache, Ma et al., CVPR 2024, arXiv 2312.00858). Nothing of the
denoiser is rewritten: in a cached call a module of its middle hands back a blank of the right shape where nobody reads
it, and the remembered features where the first layer that runs does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from agentsd.checkpointing import is_differentiated
from agentsd.control import Controller, Table
from agentsd.features import along
from agentsd.hosts import Inputs, Middle
from agentsd.planner import Call, Now
from agentsd.processor import watcher
from agentsd.schedule import Moment
from agentsd.settings import Settings
from agentsd.tracks import MOST_LANES, Condition, Track
from agentsd.wrapping import Weakly, Wrap, never_first, wrap

MOST_TRACKS = 4  # trajectories whose calls may come in turns, in each thread


class Reuse:
    """Decides which calls are full, and answers for the middle in the others.

    It also tells which calls may keep the matching of the one before (``match_interval``); where that is all, the
    middle is empty, and every call full.
    """

    def __init__(self, settings: Settings, middle: Middle, now: Now) -> None:
        self.settings = settings
        self.middle = middle
        self._now = now
        self._order = settings.cache_order if middle.lines else 0
        self._follows = settings.cache_order > 0 and not middle.lines
        self._net: Weakly[nn.Module] = Weakly(None)
        self._keys: dict[str, str] = {}  # of each module of the middle, under which its shapes are known
        self._wraps: list[tuple[nn.Module, Wrap]] = []
        self._in_vain = 0  # full calls since the last cached one that began a trajectory, or that nobody had planned
        self._warned = False

    def attach(self, net: nn.Module) -> list[tuple[nn.Module, Wrap]]:
        """Let the middle be skipped; `Wrap.undo` of each undoes it."""
        self._net = Weakly(net)
        if not self.settings.reuses:
            return []
        middle = self.middle
        answers: dict[str, Callable[..., Any]] = dict.fromkeys(middle.unread, self._unread)
        answers[middle.last] = self._unread if middle.reader else self._last
        if middle.reader:
            answers[middle.reader] = self._reads
        modules = {name: net.get_submodule(name) for name in answers}
        # blocks of a transformer that are alike give alike: the fewer keys, the fewer guards has a graph
        alike = middle.unread if middle.reader else ()
        self._keys = {name: type(modules[name]).__name__ if name in alike else name for name in modules}
        self._wraps = [
            (module, wrap(module, partial(answers[name], self._keys[name]))) for name, module in modules.items()
        ]
        return self._wraps

    def before_call(self, moment: Moment, inputs: Inputs) -> Call:
        """Decide on the call at ``moment``. Calls of a trajectory that cannot be told from another's are full."""
        for module, wrapped in self._wraps:
            if module._compiled_call_impl is not None:
                wrapped.before_graph(module, self._in_graph)
        if is_differentiated(inputs.sample) or moment.mixed:
            if moment.mixed:
                self._warn("the samples of a call are at several timesteps")
            return Call()
        track = self._track(moment, inputs)
        if track.read_by:
            self._warn(f"{track.read_by} may look on at a layer that cached calls skip, or count its calls")
            return Call()
        if moment.call != track.call and track.crowded:
            self._warn(
                f"a step makes more than {MOST_LANES} calls of one shape, and nothing says which of the last step's "
                "each follows. Give their samples in fewer, larger calls"
            )
        track.step_to(moment.call)
        measures = self.settings.cache_tolerance > 0
        sample = inputs.sample if moment.calls is not None else inputs.sample.clone()  # a loop may write into its own
        lane = track.lane(Condition.of(inputs), sample, self._order, measures, self._follows)
        lane.begin()
        planned = track.is_full(moment.call if moment.calls is not None else lane.calls)
        cached = not (planned or lane.due or (lane.order and lane.calls < 2))
        lane.due = lane.due or not cached
        self._count(cached, in_vain=lane.calls < 2 or not planned)
        shapes = lane.shapes if lane.shapes else dict.fromkeys(self._keys.values())
        lane.shapes = shapes  # all keys now: graphs are guarded by which there are
        features = lane.estimate() if cached else None
        # guidance may make another call in the same step, and loops that their text tells have each a track of its own
        together = [
            other for other in self._now.tracks if (other.schedule, other.call) == (track.schedule, track.call)
        ]
        begins, track.begun = not track.begun and len(together) == 1, True
        call = Call(cached, features=features, lane=lane, begins=begins, shapes=shapes, writes=inputs.writes)
        if self.settings.match_interval > 1:
            step = moment.step if moment.calls is not None else lane.calls
            call.matched = lane.matched_in((self.settings.phase_at(moment).name, step // self.settings.match_interval))
        return call

    def after_call(self, call: Call) -> None:
        if not call.cached and call.features is not None and call.lane is not None:
            # a graph of its own memory may write the next call's features where it wrote these
            call.lane.remember(call.features.clone() if call.borrowed else call.features)

    def _track(self, moment: Moment, inputs: Inputs) -> Track:
        tracks: list[Track] = self._now.tracks
        loop, planned = inputs.loop, moment.calls is not None
        mine = [t for t in tracks if t.may_be(moment.schedule, loop) and (planned or t.is_near(inputs.sample))]
        for track in sorted(mine, key=lambda track: track.loop() is not loop):  # a loop's own first
            if track.follows(moment):
                track.loop = Weakly(loop)
                return track
        begin = moment.call if moment.calls is not None else 0
        pace: Table | Controller
        if self.settings.cache_tolerance:
            pace = Controller(self.settings, moment.calls, begin)
        else:
            pace = Table(self.settings, moment.calls, begin, not self.middle.lines)
        new = Track(moment.schedule, pace, moment.calls, moment.call, Weakly(loop), read_by=self._reader())
        others = [track for track in tracks if track not in mine and not track.ended]
        tracks[:] = [*others[1 - MOST_TRACKS :], new]
        return new

    def _reader(self) -> str:
        """Who looks on at attention in the middle, as self-attention guidance does."""
        modules = net.named_modules() if (net := self._net()) is not None else ()
        held = (m for name, m in modules if hasattr(m, "processor") and self.middle.holds(name))
        return next(filter(None, map(watcher, held)), "")

    def _count(self, cached: bool, in_vain: bool) -> None:
        self._in_vain = 0 if cached else self._in_vain + in_vain
        usual = 2 * MOST_LANES * MOST_TRACKS  # the first two steps of as many images as are drawn at a time
        if self.settings.reuses and self._in_vain > usual:
            self._warn(f"nothing could be reused of {self._in_vain} full calls and more")

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            what = "reuses no features" if self.settings.reuses else "keeps no matching"
            warnings.warn(f"agentsd {what}: {why}.", stacklevel=2)

    def _in_graph(self, graph: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A full call of a module that is compiled by itself: it has been answered for before its graph."""
        call = self._now.call
        if call is None:
            return graph(*args, **kwargs)
        shapes, call.shapes = call.shapes, None
        try:
            return graph(*args, **kwargs)
        finally:
            call.shapes = shapes

    @never_first
    def _unread(self, key: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self._now.call
        if call is None or call.shapes is None:
            return forward(*args, **kwargs)
        if self.middle.reader and call.entered is None:
            call.entered = args[0] if args else kwargs["hidden_states"]
        if call.cached:
            return _blank(call.shapes[key], call)
        output = forward(*args, **kwargs)
        call.shapes[key] = _shapes(output)
        return output

    @never_first
    def _last(self, key: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self._now.call
        if call is None or call.shapes is None:
            return forward(*args, **kwargs)
        if call.cached:
            return (call.features,) if call.shapes[key] else call.features
        output = forward(*args, **kwargs)
        call.shapes[key] = isinstance(output, tuple)  # a transformer gives its features in a tuple
        features = (output[0] if call.shapes[key] else output).detach()
        call.borrowed = torch.compiler.is_compiling()
        call.features = features if call.borrowed and not call.writes else features.clone()
        return output

    @never_first
    def _reads(self, key: str, forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Of a sum: the features are kept in float32, since half precision would lose them beside what they add to."""
        call = self._now.call
        if call is None or call.shapes is None or call.entered is None:
            return forward(x, *args, **kwargs)
        entered = call.entered[:, -x.shape[1] :]  # the text may stand before the image's tokens, which alone are read
        if call.cached and call.features is not None:
            added = along(call.features, entered) if self._follows else call.features
            return forward((entered + added).to(entered.dtype), *args, **kwargs)
        call.borrowed = torch.compiler.is_compiling()
        entered = entered.detach().float()
        added = x.detach().float() - entered
        call.features = torch.stack((entered, added)) if self._follows else added
        return forward(x, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Memory of the features that the present thread keeps between calls."""
        return sum(lane.nbytes for track in self._now.tracks for lane in track.lanes)


def _shapes(output: Any) -> Any:
    if output is None:  # as the text of Stable Diffusion 3's last block
        return None
    return tuple(map(_shapes, output)) if isinstance(output, tuple) else output.shape


def _blank(shapes: Any, call: Call) -> Any:
    """What stands where nothing reads: of the right shape and of no memory, unless the call writes into it."""
    if shapes is None:
        return None
    if not isinstance(shapes, torch.Size):
        return tuple(_blank(shape, call) for shape in shapes)
    features: Any = call.features
    return features.new_zeros(shapes) if call.writes else features.as_strided(shapes, (0,) * len(shapes))
