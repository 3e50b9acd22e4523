"""Where in the denoising trajectory a denoiser call is."""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any, NamedTuple

import torch
from diffusers import PNDMScheduler
from torch import Tensor


class Moment(NamedTuple):
    """``step`` of the trajectory's ``steps`` are behind us, and ``call`` denoiser calls: Heun makes two a step.

    Guidance that takes two calls makes both at the same moment. ``run`` counts the trajectories of the scheduler;
    ``left`` calls of this one come after, which is None where no schedule says.
    """

    step: int
    steps: int
    call: int = 0
    run: int = 0
    left: int | None = None

    def within_first(self, share: float) -> bool:
        """Whether this step belongs to the first ``share`` of the trajectory, rounded to whole steps."""
        return self.step < round(share * self.steps)


class Trajectory:
    """Locates denoiser calls in the trajectory of a pipeline's scheduler, whichever scheduler it holds at the time.

    The scheduler's own index tells where a call is, and the device is asked for nothing. Schedulers without one (DDIM,
    DDPM) have the timestep looked up, which reads one value from its device. Without a scheduler, or for a timestep
    that its schedule does not hold, the trajectory is that of the training timesteps.
    """

    def __init__(self, pipeline: Any = None) -> None:
        # weak: a pipeline owns its UNet, and the UNet this; a cycle would keep both alive after `del pipeline`
        self._pipeline = weakref.ref(pipeline) if pipeline is not None else None
        self._scheduler: Any = getattr(pipeline, "scheduler", None)
        self._timesteps: Tensor | None = None  # the schedule last looked into, and its values
        self._values: list[float] = []
        self._start = 0  # the position at which PNDM's count began, and whether the timesteps seen so far prove it
        self._settled = False
        self._schedule: Tensor | None = None  # that of the last call, and how many there have been
        self._run = 0

    @property
    def pipeline(self) -> Any:
        """The pipeline that was patched, while it lives."""
        return self._pipeline() if self._pipeline is not None else None

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler, or the last one it had, where another pipeline has taken over its parts."""
        self._scheduler = getattr(self.pipeline, "scheduler", self._scheduler)
        return self._scheduler

    def __getstate__(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Trajectory.__init__(self)
        self._scheduler = state["scheduler"]

    def __deepcopy__(self, memo: dict[int, Any]) -> Trajectory:
        """Follows the copy of the pipeline where that is what is being copied."""
        copied = Trajectory(memo.get(id(self.pipeline)))
        copied._scheduler = copy.deepcopy(self.scheduler, memo)
        return copied

    def locate(self, timestep: Tensor | float) -> Moment:
        """The moment of a call with ``timestep``, in the scheduler's state before it. Of a batch, the first counts."""
        scheduler = self.scheduler
        trained = getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000)
        if getattr(scheduler, "timesteps", None) is not None:
            position = self._position(scheduler, timestep)
            if self._schedule is not scheduler.timesteps:  # set anew for every image
                self._schedule, self._run = scheduler.timesteps, self._run + 1
            if position is not None and position < len(scheduler.timesteps):
                step, steps = _steps(scheduler, position)
                # before it is set, a scheduler's schedule is all training timesteps: not that of a loop with its own
                is_set = len(scheduler.timesteps) < trained
                left = len(scheduler.timesteps) - 1 - position if is_set else None
                return Moment(step, steps, position, self._run, left)
        step = max(trained - 1 - math.floor(_first(timestep)), 0)
        return Moment(step, trained, step, self._run)

    def _position(self, scheduler: Any, timestep: Tensor | float) -> int | None:
        """The index of this call in ``scheduler.timesteps``."""
        if getattr(scheduler, "step_index", None) is not None:
            return int(scheduler.step_index)
        # PNDM counts the calls since the trajectory began, wherever it began
        done = scheduler.counter if isinstance(scheduler, PNDMScheduler) else 0
        if done > 0 and self._settled and self._timesteps is scheduler.timesteps:
            return self._start + done
        begin = getattr(scheduler, "begin_index", None)
        if begin is not None:
            return int(begin)
        matches = self._look_up(scheduler.timesteps, timestep)
        if not matches:
            return None
        position = self._start + done if done and self._start + done in matches else matches[0]
        self._start, self._settled = position - done, len(matches) == 1
        return position

    def _look_up(self, timesteps: Tensor, timestep: Tensor | float) -> list[int]:
        """Every index of a timestep in a schedule: PNDM has its second timestep twice."""
        if self._timesteps is timesteps:
            value = _first(timestep)
        else:  # a new schedule: its values and this one in a single read
            one = torch.as_tensor(timestep, device=timesteps.device).flatten()[:1]
            *self._values, value = torch.cat((timesteps.float(), one.float())).tolist()
            self._timesteps = timesteps
        return [index for index, known in enumerate(self._values) if known == value]


def _first(timestep: Tensor | float) -> float:
    return timestep.flatten()[0].float().item() if isinstance(timestep, Tensor) else timestep


def _steps(scheduler: Any, position: int) -> tuple[int, int]:
    """From calls to steps, done and in all.

    A step is ``order`` calls, but PNDM's first step has all the calls that it makes beyond.
    """
    calls, order = len(scheduler.timesteps), scheduler.order
    extra = calls - scheduler.num_inference_steps if isinstance(scheduler, PNDMScheduler) else 0
    if order > 1:
        return position // order, math.ceil(calls / order)
    return max(position - extra, 0), calls - extra
