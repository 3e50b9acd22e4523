"""Feature reuse: most denoiser calls run the outermost layers alone, and take the deep features from before.

Deep features change slowly along the trajectory (DeepCache, Ma et al., CVPR 2024, arXiv 2312.00858). Nothing of the
UNet is rewritten: in a cheap call a skipped module hands back a blank of the right shape where nobody reads it, and
the remembered features where the first layer that runs does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from agentsd.skip import skipped_modules, unwrap, wrap

MOST_LANES = 4  # calls of one step; guidance makes two or three
USUAL_CALLS = 25  # of a trajectory of which nobody says how many it has


def interval_of(interval: float, calls: int | None = None) -> int:
    """``cache_interval`` in calls: below 1 it is a share of a trajectory of ``calls``, rounded, and at least 2.

    Fidelity follows the number of whole calls, however many lie between them (benchmarks/NOTES.md).
    """
    return int(interval) if interval >= 1 else max(2, math.floor(interval * (calls or USUAL_CALLS) + 0.5))


def is_whole(call: int, interval: int, order: int, left: int | None = None) -> bool:
    """Whether the ``call``-th call of a trajectory, from 0, runs the whole UNet; ``left`` calls come after it.

    Every ``interval``-th does. Where features are extrapolated (``order`` 1) the second does, too, since features move
    fastest in the first steps; and the others are counted back from the last call but one,
    which gives the image its texture (benchmarks/NOTES.md).
    """
    if order == 0:
        return call % interval == 0
    return call < 2 or (call if left is None else left - 1) % interval == 0


@dataclass
class Lane:
    """The deep features of one of the calls that a step makes: guidance may take two, of different prompts.

    Attributes:
        latest: the features of the last whole call.
        previous: those of the whole call before, where ``order`` asks for them; ``gap`` calls lie between the two.
        age: how many calls ago the latest are.
        calls: how many there were before the present one.
    """

    order: int
    latest: Tensor | None = None
    previous: Tensor | None = None
    gap: int = 0
    age: int = 0
    calls: int = -1

    def begin(self) -> None:
        self.calls, self.age = self.calls + 1, self.age + 1

    def remember(self, features: Tensor) -> None:
        """Take these as the latest.

        No line is drawn from the first call's: features move too fast there for a line to tell where they are heading
        (benchmarks/NOTES.md).
        """
        self.previous = self.latest if self.order and self.calls > 1 else None
        self.latest, self.gap, self.age = features, self.age, 0

    def estimate(self) -> Tensor | None:
        """The latest features, or where they are heading: the first order of a Taylor polynomial, as in TaylorSeer.

        No further ahead than the line is long. A tensor of its own: FreeU scales features in place.
        """
        if self.latest is None:
            return None
        if self.previous is None:
            return self.latest.clone()
        return torch.lerp(self.previous, self.latest, 1 + min(self.age / self.gap, 1))

    @property
    def nbytes(self) -> int:
        return sum(features.nbytes for features in (self.latest, self.previous) if features is not None)


@dataclass
class Reuse:
    """Decides which calls are whole, and keeps the features between them.

    Attributes:
        interval: every ``interval``-th call of a lane is whole, or a share of them (`interval_of`); `is_whole` has the
            rule.
        branch: how many layers run on the way down in a cheap call; one more runs on the way up.
        order: of the extrapolation in time, 0 or 1.
        cheap: whether the present call is one.
        features: what the deep layers gave in this call, or are taken to give.
        blanks: by the name of a skipped module, its output as shapes without memory; None before the first call.
        lanes: the features of each of the calls that a step makes.
        attached: False once undone: somebody else's wrap may keep ours in place, which then does nothing.
    """

    interval: float
    branch: int
    order: int
    cheap: bool = False
    features: Tensor | None = None
    blanks: dict[str, Any] = field(default_factory=dict)
    lanes: list[Lane] = field(default_factory=list)
    attached: bool = False
    _trajectory: Any = None
    _crowded: bool = False  # whether the present step made more calls than there are lanes
    _call: int = -1  # the place of the last call in its trajectory, and how many calls before it were at the same
    _repeat: int = 0

    def attach(self, unet: nn.Module) -> None:
        """Let the deep layers of ``unet`` be skipped; `detach` undoes it. Raises ValueError as `skipped_modules`."""
        *unread, last = skipped_modules(unet, self.branch)
        self.blanks = dict.fromkeys((*unread, last))  # all keys now: graphs are guarded by which there are
        for name in unread:
            wrap(unet.get_submodule(name), _blank_if_cheap, self, name)
        wrap(unet.get_submodule(last), _features_if_cheap, self, last)
        self.attached = True

    def detach(self, unet: nn.Module) -> None:
        for name in skipped_modules(unet, self.branch):
            unwrap(unet.get_submodule(name), _blank_if_cheap)
            unwrap(unet.get_submodule(name), _features_if_cheap)
        self.forget()
        self.attached = False

    def forget(self) -> None:
        self.cheap = self._crowded = False
        self.features = None
        self.lanes.clear()

    def before_call(self, trajectory: Any, call: int, left: int | None = None) -> None:
        """Decide on the ``call``-th call of a trajectory, which several calls in a row may claim to be.

        Args:
            trajectory: equal for all calls of one image, and for no other's.
            left: how many calls come after this one, where that is known.
        """
        if trajectory != self._trajectory or call < self._call:
            self.forget()
            self._repeat = 0
        else:
            if call > self._call and self._crowded:
                warnings.warn(
                    f"agentsd reuses no features: a step makes more than {MOST_LANES} calls of one shape, and nothing "
                    "says which of the last step's each follows. Give their samples in fewer, larger calls.",
                    stacklevel=2,
                )
            # nor does anything say whose the lanes are after a step that left some out
            if call > self._call and (self._crowded or self._repeat + 1 < len(self.lanes)):
                self.forget()
            self._repeat = self._repeat + 1 if call == self._call else 0
        self._trajectory, self._call = trajectory, call
        if self._repeat == MOST_LANES:  # images that nothing tells apart: of one step each, without a pipeline
            self.forget()
            self._repeat, self._crowded = 0, True
        if self._repeat == len(self.lanes):
            self.lanes.append(Lane(self.order))
        lane = self.lanes[self._repeat]
        lane.begin()
        interval = interval_of(self.interval, None if left is None else call + 1 + left)
        overdue = lane.latest is None or lane.age >= interval  # too old where a whole call failed
        whole = overdue or torch.is_grad_enabled() or is_whole(lane.calls, interval, self.order, left)
        self.cheap = not whole
        self.features = lane.estimate() if self.cheap else None

    def after_call(self) -> None:
        if not self.cheap and self.features is not None:
            # a graph of its own memory may write the next call's features where it wrote these
            self.lanes[self._repeat].remember(self.features.clone())
        self.cheap, self.features = False, None

    @property
    def nbytes(self) -> int:
        """Memory of the features that are kept between calls."""
        return sum(lane.nbytes for lane in self.lanes)


def _blank_if_cheap(reuse: Reuse, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if reuse.cheap:
        return _blank(reuse.blanks[name])
    output = forward(*args, **kwargs)
    if reuse.attached:
        reuse.blanks[name] = _shapes(output)
    return output


def _features_if_cheap(reuse: Reuse, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if reuse.cheap:
        return (reuse.features,) if reuse.blanks[name] else reuse.features
    output = forward(*args, **kwargs)
    if not reuse.attached:
        return output
    reuse.blanks[name] = isinstance(output, tuple)  # a transformer gives its features in a tuple
    reuse.features = (output[0] if reuse.blanks[name] else output).detach().clone()
    return output


def _shapes(output: Any) -> Any:
    """The same shapes, without memory."""
    if isinstance(output, tuple):
        return tuple(_shapes(part) for part in output)
    return output.new_zeros(()).expand(output.shape)


def _blank(shapes: Any) -> Any:
    """Tensors of these shapes, each with memory of its own: adapters add to them in place."""
    if isinstance(shapes, tuple):
        return tuple(_blank(part) for part in shapes)
    return shapes.new_zeros(shapes.shape)
