"""Which denoiser calls are under agent attention, through real pipelines and schedulers."""

import copy
from collections import Counter
from types import SimpleNamespace

import diffusers
import pytest
import torch
from conftest import ONE_LEVEL, image, make_img2img, make_pipeline, make_scheduler, unet_inputs
from diffusers import StableDiffusionPipeline

import agentsd
from agentsd.processor import AgentAttnProcessor
from agentsd.schedule import Moment
from agentsd.trajectory import Trajectory

SCHEDULERS = {
    "DDIM": (diffusers.DDIMScheduler, {}),
    "DDPM": (diffusers.DDPMScheduler, {}),
    "PNDM": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "Euler": (diffusers.EulerDiscreteScheduler, {}),
    "Euler ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "Heun": (diffusers.HeunDiscreteScheduler, {}),
    "KDPM2": (diffusers.KDPM2DiscreteScheduler, {}),
    "DPM++ 2M": (diffusers.DPMSolverMultistepScheduler, {}),
    "DPM++ 2M SDE Karras": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "DPM++ SDE": (diffusers.DPMSolverSDEScheduler, {}),
    "DPM++ singlestep": (diffusers.DPMSolverSinglestepScheduler, {"lower_order_final": True}),
    "UniPC": (diffusers.UniPCMultistepScheduler, {}),
    "LCM": (diffusers.LCMScheduler, {}),
    "LMS": (diffusers.LMSDiscreteScheduler, {}),
}
CALLS_OF_A_STEP = {"Heun": 2, "KDPM2": 2, "DPM++ SDE": 2}


class Recorder:
    """The phase of every denoiser call, seen from inside the first patched attention layer."""

    def __init__(self, pipe, tokens: int = 256):
        self.phases: list[str] = []
        self.tokens = tokens
        attn = next(module for name, module in pipe.unet.named_modules() if name.endswith("attn1"))
        attn.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, attn, args, kwargs):
        merged = args[0].shape[1] < self.tokens
        agents = isinstance(attn.processor, AgentAttnProcessor)
        self.phases.append("agent" if agents else "merge" if merged else "plain")

    def take(self) -> Counter:
        """The phases since the last take; raises if they are not first agents, then merging."""
        phases, self.phases = self.phases, []
        assert phases == sorted(phases), "agent steps must come first"
        return Counter(phases)


def patched_pipeline(name, make=make_pipeline, **kwargs):
    cls, config = SCHEDULERS[name]
    pipe = make(scheduler=make_scheduler(cls, **config), **ONE_LEVEL)
    agentsd.apply_patch(pipe, **kwargs)
    return pipe, Recorder(pipe)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_fifty_steps_are_twenty_and_thirty(name):
    pipe, recorder = patched_pipeline(name)
    for _ in range(2):  # and again for the next image
        image(pipe, steps=50)
        calls = CALLS_OF_A_STEP.get(name, 1)
        expected = {"agent": 20 * calls, "merge": 30 * calls}
        if name == "PNDM":
            expected["agent"] += 1  # its first step evaluates two timesteps
        if calls == 2:
            expected["merge"] -= 1  # the last step is of first order
        assert recorder.take() == expected


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.95, 0.9, 0.5, 0.2])
def test_img2img_runs_what_is_left_of_the_trajectory(name, strength):
    pipe, recorder = patched_pipeline(name, make_img2img)
    steps = 20
    start = steps - int(steps * strength)
    sample = torch.zeros(1, 3, 16, 16)
    image(pipe, steps=steps, image=sample, strength=strength)
    calls = CALLS_OF_A_STEP.get(name, 1)
    agent, merge = max(8 - start, 0) * calls, min(12, steps - start) * calls - (calls - 1)
    if name == "PNDM":  # diffusers cuts a list with one timestep twice, so that one more step is left
        agent, merge = (agent + 1, merge) if start < 9 else (agent, merge + 1)
    assert recorder.take() == Counter({"agent": agent, "merge": merge})


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_interrupted_image_leaves_nothing_behind(name):
    pipe, recorder = patched_pipeline(name)

    def interrupt(pipe, step, timestep, kwargs):
        if step == 3:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt):
        image(pipe, steps=10, callback_on_step_end=interrupt)
    recorder.take()
    image(pipe, steps=10)
    after = recorder.take()
    image(pipe, steps=10)
    assert recorder.take() == after
    assert 0 < after["agent"] < after["merge"]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 30])
def test_any_number_of_steps(steps):
    pipe, recorder = patched_pipeline("Euler")
    image(pipe, steps=10)
    recorder.take()
    image(pipe, steps=steps)  # the number changes between calls
    agent = round(0.4 * steps)
    assert recorder.take() == Counter({"agent": agent, "merge": steps - agent})


@pytest.mark.parametrize(
    "agent_steps, expected", [(0.0, {"merge": 10}), (1.0, {"agent": 10}), (0.3, {"agent": 3, "merge": 7})]
)
def test_share_of_agent_steps(agent_steps, expected):
    pipe, recorder = patched_pipeline("DDIM", agent_steps=agent_steps)
    image(pipe, steps=10)
    assert recorder.take() == expected


def test_the_scheduler_may_be_exchanged_after_patching():
    pipe, recorder = patched_pipeline("DDIM")
    pipe.scheduler = make_scheduler(diffusers.EulerDiscreteScheduler)
    image(pipe, steps=10)
    assert recorder.take() == {"agent": 4, "merge": 6}


def test_a_copied_pipeline_follows_its_own_scheduler():
    pipe, _ = patched_pipeline("Euler")
    image(pipe, steps=4)
    copied = copy.deepcopy(pipe)
    copied.set_progress_bar_config(disable=True)
    recorder = Recorder(copied)
    image(copied, steps=10)
    assert recorder.take() == {"agent": 4, "merge": 6}


@pytest.mark.parametrize("name", ["DDPM", "Euler", "DPM++ 2M", "LCM", "Heun"])
def test_custom_timesteps_after_a_plain_image(name):
    pipe, recorder = patched_pipeline(name)
    image(pipe, steps=50)
    recorder.take()
    image(pipe, steps=None, timesteps=[999, 850, 700, 610, 400, 300, 200, 150, 60, 10])
    calls = CALLS_OF_A_STEP.get(name, 1)
    assert recorder.take() == {"agent": 4 * calls, "merge": 6 * calls - (calls - 1)}


@pytest.mark.parametrize("name", ["DDIM", "Euler", "Heun"])
def test_sdxl_and_a_part_of_its_trajectory(name):
    cls, config = SCHEDULERS[name]
    pipe = make_pipeline("sdxl", make_scheduler(cls, **config))
    agentsd.apply_patch(pipe)
    recorder = Recorder(pipe, tokens=64)
    calls = CALLS_OF_A_STEP.get(name, 1)
    image(pipe, steps=10)
    assert recorder.take() == {"agent": 4 * calls, "merge": 6 * calls - (calls - 1)}
    image(pipe, steps=10, denoising_end=0.5)  # a base model that leaves the rest to a refiner
    seen = recorder.take()
    assert seen["agent"] == 4 * calls
    assert 0 < seen["merge"] <= 2 * calls


def test_a_pipeline_that_takes_over_the_parts():
    pipe, _ = patched_pipeline("DPM++ 2M")
    pipe = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    recorder = Recorder(pipe)
    image(pipe, steps=None, timesteps=[999, 850, 700, 610, 400, 300, 200, 150, 60, 10])
    assert recorder.take() == {"agent": 4, "merge": 6}


def test_a_bare_unet_goes_by_the_timestep():
    pipe, recorder = patched_pipeline("DDIM")
    unet = agentsd.apply_patch(pipe.unet, agent_steps=0.4)
    recorder = Recorder(SimpleNamespace(unet=unet))
    for timestep in (999, 600, 599, 0, torch.tensor(600), torch.tensor([599.0, 599.0])):
        unet(**unet_inputs(timestep=timestep))
    assert recorder.phases == ["agent", "agent", "merge", "merge", "agent", "merge"]


def test_a_direct_call_after_an_image_goes_by_the_timestep():
    for name in SCHEDULERS:
        pipe, recorder = patched_pipeline(name)
        image(pipe, steps=5)
        recorder.take()
        pipe.unet(**unet_inputs(timestep=901.5))
        assert recorder.take() == {"agent": 1}, name


@pytest.mark.parametrize("name", SCHEDULERS)
def test_device_reads(name, monkeypatch):
    """At most one a call, and after the first call none where the scheduler keeps an index in Python."""
    pipe, _ = patched_pipeline(name)
    reads, counts, locate = [], [], Trajectory.locate
    item, tolist = torch.Tensor.item, torch.Tensor.tolist

    def counted_locate(self, *timestep):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "item", lambda x: reads.append(x) or item(x))
            patch.setattr(torch.Tensor, "tolist", lambda x: reads.append(x) or tolist(x))
            moment = locate(self, *timestep)
        counts.append(len(reads))
        reads.clear()
        return moment

    monkeypatch.setattr(Trajectory, "locate", counted_locate)
    image(pipe, steps=6)
    assert max(counts) <= 1
    if name not in ("DDIM", "DDPM"):
        assert sum(counts[1:]) == 0


def test_steps_of_a_moment():
    assert [Moment(i, 50).within_first(0.4) for i in (0, 19, 20, 49)] == [True, True, False, False]
    shares = [i / 20 for i in range(21)]
    for steps in range(1, 60):
        for share in shares:
            inside = sum(Moment(i, steps).within_first(share) for i in range(steps))
            assert abs(inside - share * steps) <= 0.5 + 1e-9
            assert share not in (0, 1) or inside == share * steps
