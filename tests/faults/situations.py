"""Two pipelines on one UNet, images that stop early, and what a UNet of its own would have given."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import diffusers
import pytest
import torch
from conftest import ROOT, make_pipeline, make_scheduler, unet_inputs
from diffusers import StableDiffusionPipeline

import agentsd

sys.path.insert(0, str(ROOT / "tests" / "compat"))  # the zoo
import checks

SETTINGS = {
    "agents": {"seed": 0},
    "kept": {"seed": 0, "match_interval": 3},
    "sampling": {"seed": 0, "preset": "few_steps"},
    "reuse": {"seed": 0, "ratio": 0, "cache_interval": 2},
    "balanced": {"seed": 0, "preset": "balanced"},
    "balanced, merging": {"seed": 0, "preset": "balanced", "ratio": 0.4, "merge_mlp": True},
    "adaptive": {"seed": 0, "preset": "adaptive", "cache_tolerance": 0.05},
}
REUSING = {name: SETTINGS[name] for name in ("reuse", "balanced", "balanced, merging", "adaptive")}
KEEPING = {"kept": SETTINGS["kept"], **REUSING}  # anything from one call to the next
SCHEDULERS = {
    "DDIM": diffusers.DDIMScheduler,
    "DDPM": diffusers.DDPMScheduler,
    "PNDM": diffusers.PNDMScheduler,
    "Heun": diffusers.HeunDiscreteScheduler,
    "DPM++ 2M": diffusers.DPMSolverMultistepScheduler,
    "UniPC": diffusers.UniPCMultistepScheduler,
    "LCM": diffusers.LCMScheduler,
    "Euler": diffusers.EulerDiscreteScheduler,
    "Euler a": diffusers.EulerAncestralDiscreteScheduler,
}

distance = checks.distance


MAIN = ("agents", "balanced")


def sweep(cases, ordinary=MAIN) -> list:
    """Parameters, of which those that are not ``ordinary`` (a collection, or a test of one) wait for the long run."""
    is_ordinary = ordinary if callable(ordinary) else ordinary.__contains__
    as_tuple = lambda case: case if isinstance(case, tuple) else (case,)
    return [case if is_ordinary(case) else pytest.param(*as_tuple(case), marks=pytest.mark.long) for case in cases]


def scheduler(name: str, **config):
    usual = {"skip_prk_steps": True} if name == "PNDM" else {}  # as Stable Diffusion has it
    return make_scheduler(SCHEDULERS[name], **usual | config)


def sibling(pipe, scheduler, cls=None, **optional):
    """Another pipeline on the parts of ``pipe``, with a scheduler of its own."""
    optional |= {"requires_safety_checker": False} if isinstance(pipe, StableDiffusionPipeline) else {}
    other = (cls or type(pipe))(**{**pipe.components, "scheduler": scheduler}, **optional)
    other.set_progress_bar_config(disable=True)
    return other


def pair(first: str = "DDIM", second: str | None = None):
    """Two pipelines on one UNet."""
    pipe = make_pipeline(scheduler=scheduler(first))
    return pipe, sibling(pipe, scheduler(second or first))


def images_alone(make: Callable[[], tuple], draw: Callable[..., torch.Tensor], settings: dict) -> list[torch.Tensor]:
    """What ``draw`` gives on parts of its own, nothing else having run: patched through each of them, and the UNet."""
    found = []
    for through in range(len(make()) + 1):
        parts = make()
        agentsd.apply_patch([*parts, parts[0].unet][through], **settings)
        found.append(draw(*parts))
    return found


def is_one_of(image: object, images: list[torch.Tensor]) -> bool:
    """Bit by bit. Which of them depends on whose scheduler the patch can know, and each of them is right."""
    return isinstance(image, torch.Tensor) and any(torch.equal(image, other) for other in images)


def cancel(at: int):
    """A callback that cancels an image as user interfaces do: the loop ends without further UNet calls."""

    def callback(pipe, step, timestep, tensors):
        pipe._interrupt = pipe.interrupt or step == at
        return tensors

    return callback


class Stopped(Exception):
    """Of a user who has seen enough."""


def fail(at: int):
    """A callback that ends an image by an error."""

    def callback(pipe, step, timestep, tensors):
        if step == at:
            raise Stopped
        return tensors

    return callback


@contextmanager
def failing_call(unet, at: int, layer: str = "conv_out") -> Iterator[None]:
    """The ``at``-th run of a layer raises, and so does the block around this."""
    calls = iter(range(10_000))

    def hook(*_):
        if next(calls) == at:
            raise Stopped

    handle = unet.get_submodule(layer).register_forward_pre_hook(hook)
    try:
        yield
    except Stopped:
        pass
    finally:
        handle.remove()


def full_calls(unet) -> list[bool]:
    """Fills up, call by call, with whether the middle of ``unet`` ran."""
    calls: list[bool] = []
    unet.register_forward_pre_hook(lambda *_: calls.append(False))
    unet.mid_block.resnets[0].register_forward_pre_hook(lambda *_: calls.__setitem__(-1, True))
    return calls


@contextmanager
def warned() -> Iterator[list[str]]:
    """Collects the text of every warning, also of those given before."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
        messages += [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def inputs_of(user: int, **changes) -> dict:
    """Inputs of a UNet call that differ from user to user."""
    generator = torch.Generator().manual_seed(100 + user)
    inputs = unet_inputs(**changes)
    drawn = {k: torch.randn(v.shape, generator=generator) for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    return inputs | drawn


def hooks_and_attributes(net) -> dict:
    """Whatever a patch could leave in a module."""
    counts = lambda module: (sorted(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks))
    return {name: counts(module) for name, module in net.named_modules()}
