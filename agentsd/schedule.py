"""Where in the denoising trajectory a denoiser call is."""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Moment(NamedTuple):
    """``step`` of the trajectory's ``steps`` are behind us. A step may be several denoiser calls (Heun's two)."""

    step: int
    steps: int

    def within_first(self, share: float) -> bool:
        """Whether this step belongs to the first ``share`` of the trajectory, rounded to whole steps."""
        return self.step < round(share * self.steps)


class Trajectory:
    """Locates denoiser calls in the trajectory of a pipeline's scheduler, whichever scheduler it holds at the time.

    Nothing is counted here, so an interrupted image leaves nothing behind. A scheduler that keeps an index in Python
    is asked for that, and the device for nothing; with the others (DDIM, DDPM) the timestep is looked up, which reads
    one value from its device. Without a scheduler, or for a timestep that its schedule does not hold, the trajectory
    is that of the training timesteps.
    """

    def __init__(self, pipeline: Any = None) -> None:
        # weak: a pipeline owns its UNet, and the UNet this; a strong cycle would keep both from being freed at `del`
        self._pipeline = weakref.ref(pipeline) if pipeline is not None else None
        self._start = 0  # the position at which PNDM's count began, and whether the timesteps seen so far prove it
        self._settled = False
        self._timesteps: Tensor | None = None
        self._values: list[float] = []

    @property
    def pipeline(self) -> Any:
        return self._pipeline() if self._pipeline is not None else None

    def __getstate__(self) -> dict[str, Any]:
        return {"pipeline": self.pipeline}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Trajectory.__init__(self, state["pipeline"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Trajectory:
        """Follows the copy of the pipeline; in the copy of a UNet alone there is no pipeline to follow."""
        return Trajectory(memo.get(id(self.pipeline)) if self.pipeline is not None else None)

    def locate(self, timestep: Tensor | float) -> Moment:
        """The moment of a call with ``timestep``, in the scheduler's state before it. Of a batch, the first counts."""
        scheduler: Any = getattr(self.pipeline, "scheduler", None)
        if getattr(scheduler, "timesteps", None) is not None:
            position = self._position(scheduler, timestep)
            if position is not None and position < len(scheduler.timesteps):
                return _steps(scheduler, position)
        trained = getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000)
        return Moment(max(trained - 1 - math.floor(_first(timestep)), 0), trained)

    def _position(self, scheduler: Any, timestep: Tensor | float) -> int | None:
        """The index of this call in ``scheduler.timesteps``."""
        if getattr(scheduler, "step_index", None) is not None:
            return int(scheduler.step_index)
        done = getattr(scheduler, "counter", 0)  # PNDM's: the calls since the trajectory began, wherever it began
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
            one = torch.as_tensor(timestep, device=timesteps.device).flatten()[:1].to(timesteps.dtype)
            *self._values, value = torch.cat((timesteps, one)).tolist()
            self._timesteps = timesteps
        return [index for index, known in enumerate(self._values) if known == value]


def _first(timestep: Tensor | float) -> float:
    return timestep.flatten()[0].item() if isinstance(timestep, Tensor) else timestep


def _steps(scheduler: Any, position: int) -> Moment:
    """From calls to steps: of ``order`` calls each, or one each where all calls beyond the steps belong to the first.

    The second is PNDM, which evaluates its second timestep twice.
    """
    calls, order = len(scheduler.timesteps), scheduler.order
    if order > 1:
        return Moment(position // order, math.ceil(calls / order))
    steps = min(getattr(scheduler, "num_inference_steps", None) or calls, calls)
    return Moment(max(position - (calls - steps), 0), steps)
