"""A pipeline that several people use at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock
from typing import Any

import agentsd


class Cancelled(Exception):
    """The owner of a job has cancelled it."""


Advance = Callable[[], None]


class SharedPipeline:
    """Gives a pipeline to one job at a time, and takes it back unpatched."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._turn = Lock()
        self._jobs: list[tuple[str, Event]] = []  # waiting, and the one whose turn it is

    @contextmanager
    def turn(self, owner: str, advance: Advance) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Waits until the pipeline is free, and gives it with arguments for its calls.

        These call ``advance`` after each denoising step, and end the job there if it has been cancelled.

        Raises:
            Cancelled: before the job began, or in the middle of an image.
        """
        cancelled = Event()
        job = owner, cancelled

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if cancelled.is_set():
                raise Cancelled
            advance()
            return tensors

        self._jobs.append(job)
        try:
            with self._turn:
                if cancelled.is_set():
                    raise Cancelled
                try:
                    yield self._pipe, {"callback_on_step_end": after_step}
                finally:
                    agentsd.remove_patch(self._pipe)
        finally:
            self._jobs.remove(job)

    def cancel(self, owner: str) -> bool:
        """All jobs of ``owner``: the one under way within a denoising step, those that wait before they begin.

        Whether there was one.
        """
        of_owner = [cancelled for name, cancelled in tuple(self._jobs) if name == owner]
        for cancelled in of_owner:
            cancelled.set()
        return bool(of_owner)
