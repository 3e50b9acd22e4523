"""Deep features between calls: remembered, and followed to where they are heading."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

SLOWING = 5.0  # features move in the last call exp(-SLOWING) times as fast as in the first (benchmarks/NOTES.md)


class Arriving:
    """A number on its way from the device. Reading it waits for no more than what was asked of the device before."""

    def __init__(self, number: Tensor) -> None:
        self._number = number.to("cpu", non_blocking=number.is_cuda)  # other devices have no event
        self._event: Any = torch.cuda.Event() if number.is_cuda else None  # type: ignore[no-untyped-call]
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(number.device))

    @property
    def value(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        return float(self._number)


def has_values(x: Tensor) -> bool:
    """Whether there is anything to read: not on the meta device, and not where a compiler plays through."""
    return not (x.is_meta or isinstance(x, FakeTensor))


def worst_error(estimate: Tensor, features: Tensor) -> Tensor:
    """|estimate - features| / |features| of the worst sample: (B, ...) and (B, ...) -> ()."""
    exact = torch.promote_types(features.dtype, torch.float32)
    off = torch.linalg.vector_norm((estimate - features).flatten(1), dim=1, dtype=exact)
    size = torch.linalg.vector_norm(features.flatten(1), dim=1, dtype=exact)
    worst: Tensor = (off / size.clamp_min(1e-12)).amax()
    return worst


def slowing(calls: int | None) -> float:
    """By which features' movement changes from one call of a trajectory of ``calls`` to the next; 1 if nobody says."""
    return math.exp(-SLOWING / calls) if calls else 1.0


def secant(before: Tensor, now: Tensor) -> Tensor:
    """How a sum's second part follows its first, for each sample and channel: by least squares over the tokens.

    Args:
        before, now: (2, B, N, C), the input of the middle and what the middle adds to it, at two full calls.

    Returns:
        (B, 1, C), between -1 and 1.
    """
    moved, added = now - before
    slope: Tensor = (moved * added).sum(1, keepdim=True) / moved.square().sum(1, keepdim=True).clamp_min(1e-9)
    return slope.clamp(-1, 1)


def along(line: Tensor, x: Tensor) -> Tensor:
    """What the middle adds to its input (B, N, C) by a line, (B, 1 + N, C): the slope, and what is added at 0."""
    return line[:, 1:] + line[:, :1] * x


@dataclass(eq=False)
class Lane:
    """The deep features of one of the calls that a step makes: guidance may take two, of different prompts.

    Attributes:
        order: of the extrapolation in time, 0 or 1.
        latest: the features of the last full call.
        previous: those of the full call before, where ``order`` asks for them; ``gap`` calls lie between the two.
        age: how many calls ago the latest are.
        calls: how many there were before the present one.
        due: whether a full call was begun that has not remembered anything yet.
        follows: whether features are (2, B, N, C), the input of the middle and what the middle adds to it. Then they
            are estimated by how that followed its input between the last two full calls, and not in time.
        slope: of that.
        slowing: by which the features' movement changes from one call to the next.
        measures: whether full calls compare the features with their estimate in time.
        error: of the estimate at the last full call, where it was compared.
    """

    order: int
    latest: Tensor | None = None
    previous: Tensor | None = None
    gap: int = 0
    age: int = 0
    calls: int = -1
    due: bool = True
    follows: bool = False
    slope: Tensor | None = None
    slowing: float = 1.0
    measures: bool = False
    error: Arriving | None = None

    def begin(self) -> None:
        self.calls, self.age = self.calls + 1, self.age + 1

    def remember(self, features: Tensor) -> None:
        """Take these as the latest.

        No line is drawn from the first call's: features move too fast there for a line to tell where they are heading
        (benchmarks/NOTES.md).
        """
        known = self.measures and self.latest is not None and has_values(features)
        self.error = Arriving(worst_error(self.estimate(), features)) if known else None
        if self.follows:
            self.slope = torch.zeros_like(features[0, :, :1]) if self.latest is None else secant(self.latest, features)
        self.previous = self.latest if self.order and self.calls > 1 else None
        self.latest, self.gap, self.age, self.due = features, self.age, 0, False

    def estimate(self) -> Tensor:
        """The latest features, or where they are heading: the first order of a Taylor polynomial, as in TaylorSeer,
        but for features that slow down, as the noise does that is left.

        No further ahead than the line is long. A tensor of its own: FreeU scales features in place.

        Raises:
            ValueError: nothing has been remembered.
        """
        if self.latest is None:
            raise ValueError("there are no features before a full call has been remembered")
        if self.slope is not None:
            x, added = self.latest
            return torch.cat((self.slope, added - self.slope * x), dim=1)
        if self.previous is None:
            return self.latest.clone()
        q = self.slowing
        ahead = self.age / self.gap if q == 1 else q**self.gap * (1 - q**self.age) / (1 - q**self.gap)
        return torch.lerp(self.previous, self.latest, 1 + min(ahead, 1))

    @property
    def nbytes(self) -> int:
        return sum(features.nbytes for features in (self.latest, self.previous, self.slope) if features is not None)
