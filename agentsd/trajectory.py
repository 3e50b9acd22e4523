"""Where in the denoising trajectory a denoiser call is."""

from __future__ import annotations

import copy
import math
from collections.abc import MutableMapping
from typing import Any

import torch
from diffusers import PNDMScheduler
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from agentsd.loops import Loop
from agentsd.schedule import Moment
from agentsd.wrapping import Weakly


class Trajectory:
    """Locates denoiser calls in the schedule that they belong to.

    The loop of a pipeline hands its denoiser one element of the schedule's tensor, in the very memory of that tensor:
    this tells the place, and that it is this schedule and no other's, and the device is asked for nothing. So a second
    pipeline with a scheduler of its own is followed, too. Where a loop makes timesteps of its own, a value is read
    from the device, and looked up in the schedule of the patched pipeline, whichever scheduler that holds at the time:
    in each call, or in the first ones alone where its loop is known (`agentsd.loops.Loop`). A timestep that is not in
    there is one of the training timesteps.
    """

    def __init__(self, pipeline: Any = None) -> None:
        # weak: a pipeline owns its denoiser, and the denoiser this; a cycle would keep both alive after `del pipeline`
        self._pipeline = Weakly(pipeline)
        self._scheduler: Any = getattr(pipeline, "scheduler", None)
        self._known: list[tuple[_Schedule, list[float]]] = []  # the schedules last read, and their values
        self._loops: MutableMapping[Tensor, Loop] = WeakIdKeyDictionary()  # by what tells one; each is of one thread

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler, or the last one it had, where another pipeline has taken over its parts."""
        self._scheduler = getattr(self._pipeline(), "scheduler", self._scheduler)
        return self._scheduler

    def __reduce__(self) -> tuple[Any, ...]:
        return Trajectory, ()  # a scheduler may hold what cannot be pickled

    def __deepcopy__(self, memo: dict[int, Any]) -> Trajectory:
        """Follows the copy of the pipeline where that is what is being copied."""
        copied = Trajectory(memo.get(id(self._pipeline())))
        copied._scheduler = copy.deepcopy(self.scheduler, memo)
        return copied

    def locate(
        self, timestep: Tensor | float, divisor: float = 1.0, sample: Tensor | None = None, loop: Tensor | None = None
    ) -> Moment:
        """The moment of a call with ``timestep``, in the scheduler's state before it. Of a batch, the first counts.

        Args:
            divisor: by which the loop has divided the schedule's timestep, after casting it to this one's type.
            sample: the latents of the call, where its ``loop`` is known (`agentsd.hosts.Inputs`).
        """
        scheduler = self.scheduler
        timesteps = getattr(scheduler, "timesteps", None)
        if isinstance(timesteps, Tensor) and (place := _place_in(timesteps, timestep)) is not None:
            return Moment(*_steps(scheduler, place), place, len(timesteps), _Schedule(timesteps))
        if isinstance(timestep, Tensor) and (schedule := self._schedule_around(timestep)) is not None:
            call, calls = int(timestep.storage_offset()), len(schedule)
            if isinstance(timesteps, Tensor) and schedule == self._values(timesteps):  # its scheduler is a copy
                return Moment(*_steps(scheduler, call), call, calls, _Schedule(timestep))
            step = call if schedule[0] >= schedule[-1] else calls - 1 - call  # inversion goes up, from the image
            return Moment(step, calls, call, calls, _Schedule(timestep))
        # half precision may not tell neighbours in the schedule apart
        inexact = 2 * torch.finfo(getattr(timestep, "dtype", torch.float32)).eps if divisor != 1 else 0.0
        known = Loop() if loop is None else self._loops.setdefault(loop, Loop())
        if isinstance(timesteps, Tensor) and isinstance(timestep, Tensor):
            found = known.expected(_Schedule(timesteps), _at(scheduler), sample)
            if found is not None and found < len(timesteps):  # a loop may go on after its last step
                there = self._values(timesteps)[found]
                known.follow(found, sample, (timestep.float() * divisor - there).abs().amax(), inexact * abs(there))
                return self._moment(scheduler, found)
        values = timestep.flatten().tolist() if isinstance(timestep, Tensor) else [float(timestep)]
        value, mixed = values[0] * divisor if values else math.nan, len(set(values)) > 1
        if isinstance(timesteps, Tensor):
            found = self._look_up(scheduler, value, inexact)
            known.read(_Schedule(timesteps), None if mixed else found, _at(scheduler), sample)
            if found is not None:
                return self._moment(scheduler, found, mixed)
        trained = _trained(scheduler)
        noise = trained if math.isnan(value) else math.floor(min(max(value, 0), trained))
        step = max(trained - 1 - noise, 0)
        alone = None if 0 <= value <= trained else object()  # what is no timestep is part of no trajectory
        return Moment(step, trained, step, schedule=alone, mixed=mixed)

    @staticmethod
    def _moment(scheduler: Any, place: int, mixed: bool = False) -> Moment:
        """Before it is set, a scheduler's schedule is all training timesteps: not that of a loop with its own."""
        calls = len(scheduler.timesteps)
        known = calls if calls < _trained(scheduler) else None
        return Moment(*_steps(scheduler, place), place, known, _Schedule(scheduler.timesteps), mixed)

    def _schedule_around(self, timestep: Tensor) -> list[float] | None:
        """The values of the schedule that ``timestep`` is an element of; None where it is no element of one."""
        if not _is_element(timestep) or (memory := timestep.untyped_storage()).nbytes() <= timestep.element_size():
            return None
        values = self._values(torch.empty(0, dtype=timestep.dtype, device=timestep.device).set_(memory))
        ordered = values in (sorted(values), sorted(values, reverse=True))
        return values if ordered and values[0] != values[-1] else None

    def _values(self, timesteps: Tensor) -> list[float]:
        """Read once a schedule."""
        schedule = _Schedule(timesteps)
        for known, values in self._known:
            if known == schedule and len(values) == len(timesteps):
                return values
        self._known = [(schedule, timesteps.tolist()), *self._known[:1]]
        return self._known[0][1]

    def _look_up(self, scheduler: Any, value: float, inexact: float) -> int | None:
        """The place of a value in the schedule. Where it may be several, the scheduler may know which it is.

        Args:
            inexact: of the value, as a share of it.
        """
        off = [abs(known - value) for known in self._values(scheduler.timesteps)]
        places = [place for place, error in enumerate(off) if error <= inexact * abs(value)]
        for expected in (getattr(scheduler, name, None) for name in ("step_index", "begin_index", "counter")):
            if expected in places:
                return int(expected)
        return min(places, key=off.__getitem__) if places else None


class _Schedule:
    """The memory of a schedule, as a key: equal for tensors in the same memory, which it keeps from being reused."""

    def __init__(self, timesteps: Tensor) -> None:
        self._memory = timesteps.untyped_storage()
        self._key = self._memory._cdata

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Schedule) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _is_element(timestep: Tensor) -> bool:
    """Whether it is a single value, be it expanded to a batch."""
    return timestep.numel() == 1 or (timestep.numel() > 1 and not any(timestep.stride()))


def _place_in(timesteps: Tensor, timestep: Tensor | float) -> int | None:
    """Which element of the schedule's memory ``timestep`` is; None where it is none."""
    if not isinstance(timestep, Tensor) or timestep.dtype != timesteps.dtype or not _is_element(timestep):
        return None
    if timestep.untyped_storage()._cdata != timesteps.untyped_storage()._cdata:
        return None
    place, stride = int(timestep.storage_offset() - timesteps.storage_offset()), timesteps.stride(0)
    place, beside = divmod(place, stride) if stride else (0, 0)
    return place if 0 <= place < len(timesteps) and not beside else None


def _at(scheduler: Any) -> int | None:
    """The place of a scheduler's next step, where it counts them in Python."""
    places = (getattr(scheduler, name, None) for name in ("step_index", "begin_index"))
    return next((place for place in places if isinstance(place, int)), None)


def _trained(scheduler: Any) -> int:
    return int(getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000))


def _steps(scheduler: Any, call: int) -> tuple[int, int]:
    """From calls to steps, done and in all.

    A step is ``order`` calls, but PNDM's first step has all the calls that it makes beyond.
    """
    calls, order = len(scheduler.timesteps), scheduler.order
    extra = calls - scheduler.num_inference_steps if isinstance(scheduler, PNDMScheduler) else 0
    if order > 1:
        return call // order, math.ceil(calls / order)
    return max(call - extra, 0), calls - extra
