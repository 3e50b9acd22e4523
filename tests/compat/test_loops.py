"""Loops that divide their timesteps, as Flux's: where their calls are, with few values read from the device."""

import random

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from zoo_transformers import TRANSFORMERS

import agentsd
from agentsd.loops import Loop
from agentsd.trajectory import Trajectory

FLUX = [name for name in TRANSFORMERS if name.startswith("Flux")]


class Pipeline:
    def __init__(self, steps: int = 12, begin: int | None = 0, cls=FlowMatchEulerDiscreteScheduler) -> None:
        self.scheduler = cls(shift=3.0)
        self.reset(steps, begin)

    def reset(self, steps: int = 12, begin: int | None = 0) -> None:
        self.scheduler.set_timesteps(steps)
        self.scheduler.set_begin_index(begin)


class Turns:
    """A pipeline's loop, call by call, on a denoiser that was patched through ``patched``.

    Each moment is found as usual, and by reading alone.
    """

    def __init__(self, pipe, schedules, begin: int = 0, dtype=torch.float32) -> None:
        self.scheduler, self.schedules, self.place = pipe.scheduler, schedules, begin
        self.x, self.ids = torch.zeros(2, 4, dtype=dtype), torch.zeros(4, 3)

    def call(self, copied: bool = False, off=0.0) -> tuple:
        t = self.scheduler.timesteps[self.place] + off
        timestep, x = t.expand(2).to(self.x.dtype) / 1000, self.x.clone() if copied else self.x
        usual, reading = self.schedules
        return usual.locate(timestep, 1000.0, x, self.ids), reading.locate(timestep, 1000.0)

    def step(self) -> None:
        self.x = self.scheduler.step(torch.zeros_like(self.x), self.scheduler.timesteps[self.place], self.x)[0]
        self.place += 1

    @property
    def ended(self) -> bool:
        return self.place >= len(self.scheduler.timesteps)


@pytest.fixture
def reads(monkeypatch) -> list:
    """The calls of known loops whose timestep was read."""
    seen, read = [], Loop.read

    def noted(loop, schedule, place, at, sample):
        if sample is not None:
            seen.append(place)
        read(loop, schedule, place, at, sample)

    monkeypatch.setattr(Loop, "read", noted)
    return seen


@pytest.mark.parametrize("name", FLUX)
def test_an_image_is_read_in_its_first_steps_alone(name, reads, monkeypatch):
    """Three where the pipeline does not tell its scheduler where it begins, and otherwise two."""
    pipe, run = TRANSFORMERS[name]()
    agentsd.apply_patch(pipe, preset="balanced", seed=0)
    image = run(num_inference_steps=12)
    few = len(reads)
    assert 2 <= few <= 3
    assert torch.equal(run(num_inference_steps=12), image) and len(reads) == 2 * few
    monkeypatch.setattr(Loop, "expected", lambda *_: None)
    assert torch.equal(run(num_inference_steps=12), image) and len(reads) > 2 * few + 8


@pytest.mark.parametrize("cls", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("begin", [0, 5, None])
@pytest.mark.parametrize("guidance", ["one call", "two calls", "two calls of copies"])
def test_moments_are_those_that_are_read(cls, dtype, begin, guidance, reads):
    pipe = Pipeline(begin=begin, cls=cls)
    schedules = Trajectory(pipe), Trajectory(pipe)
    for image in (1, 2):
        loop = Turns(pipe, schedules, begin or 0, dtype)
        while not loop.ended:
            for again in (False, True)[: 1 if guidance == "one call" else 2]:
                found, expected = loop.call(again and guidance == "two calls of copies")
                assert found == expected and found.call == loop.place
            loop.step()
        if guidance != "two calls of copies":  # of whose latents nothing says that they are no step further
            assert len(reads) <= image * 3 * (1 + (guidance == "two calls"))
        pipe.reset(begin=begin)


@pytest.mark.parametrize("steps", [12, 20], ids="the other of {} steps".format)
@pytest.mark.parametrize("seed", range(8))
def test_loops_in_any_order(steps, seed, reads):
    """One with the scheduler that is followed, the other with its own: in step for a while, and then not."""
    draw = random.Random(seed)
    pipe, other = Pipeline(), Pipeline(steps)
    schedules = Trajectory(pipe), Trajectory(pipe)
    loops = [Turns(pipe, schedules), Turns(other, schedules)]
    turns = [(1, 0), (0, 1)][seed % 2] * draw.randrange(8)
    while not all(loop.ended for loop in loops):
        which = turns[0] if turns else draw.randrange(2)
        turns = turns[1:]
        if not (loop := loops[which]).ended:
            found, expected = loop.call()
            assert found == expected
            loop.step()
    assert 0 in reads


@pytest.mark.parametrize("off", [-30.0, torch.tensor([0.0, -30.0])], ids=["elsewhere", "at several"])
def test_a_loop_that_goes_elsewhere_is_read_again(off):
    """Its latents and its scheduler say nothing of it: it is noticed when the values that were sent for are there."""
    pipe = Pipeline()
    loop, seen = Turns(pipe, (Trajectory(pipe), Trajectory(pipe))), []
    while not loop.ended:
        found, expected = loop.call(off=off if loop.place >= 5 else 0.0)
        seen.append(found._replace(schedule=None) == expected._replace(schedule=None))
        loop.step()
    assert seen[:5] == [True] * 5 and not seen[5]
    assert seen[7:] == [True] * 5
