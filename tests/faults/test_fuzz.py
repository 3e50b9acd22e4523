"""Random sequences on one UNet with two pipelines: every image is the one that a UNet of its own gives."""

import copy
import functools
import pickle
import random

import pytest
import torch
from conftest import image
from situations import SETTINGS, Stopped, cancel, fail, inputs_of, is_one_of, pair

import agentsd

ORDINARY, LONG = 20, 500
KINDS = [("DDIM", "Euler"), ("Euler", "Euler"), ("DDIM", "DDIM"), ("PNDM", "DPM++ 2M"), ("Heun", "DDIM")]
STEPS = [3, 4, 6]
CALLBACKS = {"": lambda at: None, "cancelled": cancel, "failed": fail}


def draw(pipe, steps: int, end: str = "", at: int = 0) -> torch.Tensor | None:
    """Latents, of a cancelled image, too; None after an error."""
    callback = CALLBACKS[end](at)
    arguments = {} if callback is None else {"callback_on_step_end": callback}
    pipe._interrupt = False
    try:
        return image(pipe, steps=steps, **arguments)
    except Stopped:
        return None


@functools.cache
def alone(kinds, settings: str | None, which: int, steps: int, end: str, at: int) -> list[torch.Tensor | None]:
    """The same of a fresh UNet: patched through either pipeline or alone."""
    found = []
    for through in range(3 if settings else 1):
        pipes = pair(*kinds)
        if settings:
            agentsd.apply_patch([*pipes, pipes[0].unet][through], **SETTINGS[settings])
        found.append(draw(pipes[which], steps, end, at))
    return found


class World:
    """Two pipelines on one UNet, what is done to them, and the settings of the patch that should be there."""

    def __init__(self, kinds) -> None:
        self.kinds = kinds
        self.pipes = pair(*kinds)
        self.settings: str | None = None
        self.story: list[str] = []

    def handle(self, rng: random.Random):
        return rng.choice([*self.pipes, self.pipes[0].unet])

    def patch(self, rng) -> None:
        self.settings = rng.choice(list(SETTINGS))
        agentsd.apply_patch(self.handle(rng), **SETTINGS[self.settings])

    def remove(self, rng) -> None:
        self.settings = None
        agentsd.remove_patch(self.handle(rng))

    def image(self, rng, end: str = "") -> None:
        which, steps = rng.randrange(2), rng.choice(STEPS)
        at = rng.randrange(steps - 1) if end else 0
        self.story[-1] += f" of {self.kinds[which]}, {steps} steps, {at}"
        found, expected = draw(self.pipes[which], steps, end, at), None
        expected = alone(self.kinds, self.settings, which, steps, end, at)
        assert (found is None) == (expected[0] is None)
        assert found is None or is_one_of(found, expected), f"{self.settings}: " + "; ".join(self.story)

    def cancelled(self, rng) -> None:
        self.image(rng, "cancelled")

    def failed(self, rng) -> None:
        self.image(rng, "failed")

    def call(self, rng) -> None:
        timesteps = self.pipes[0].scheduler.timesteps  # PNDM has none before they are set
        timestep = rng.choice([*(timesteps[:2] if timesteps is not None else ()), 951, 301])
        self.pipes[0].unet(**inputs_of(rng.randrange(3), timestep=timestep))

    def copy(self, rng) -> None:
        copied = rng.choice([copy.deepcopy, lambda pipes: pickle.loads(pickle.dumps(pipes))])
        self.pipes = copied(self.pipes)
        for pipe in self.pipes:
            pipe.set_progress_bar_config(disable=True)

    def copy_unet(self, rng) -> None:
        unet = copy.deepcopy(self.pipes[0].unet)
        for pipe in self.pipes:
            pipe.unet = unet

    def temporarily(self, rng) -> None:
        before, self.settings = self.settings, rng.choice(list(SETTINGS))
        with agentsd.patched(self.handle(rng), **SETTINGS[self.settings]):
            self.image(rng)
        self.settings = before


OPERATIONS = [
    World.patch, World.patch, World.image, World.image, World.image, World.cancelled, World.cancelled, World.failed,
    World.call, World.copy, World.copy_unet, World.remove, World.temporarily,
]  # fmt: skip


def seeds() -> list:
    return [*range(ORDINARY), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(ORDINARY, LONG))]


@pytest.mark.parametrize("seed", seeds())
def test_any_sequence_is_that_of_separate_unets(seed):
    """Patched, called, cancelled, copied, and removed in any order, the images are bit-equal to those made alone."""
    rng = random.Random(seed)
    world = World(KINDS[seed % len(KINDS)])
    for operation in [World.patch, *rng.choices(OPERATIONS, k=6), World.image, World.remove, World.image]:
        world.story.append(operation.__name__)
        operation(world, rng)
