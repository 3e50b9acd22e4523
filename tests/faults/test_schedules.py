"""Schedules that the patch must recognise, or say that nothing is gained: copied, upwards, in one batch, all steps."""

import copy

import diffusers
import pytest
import torch
from conftest import image, make_pipeline, make_scheduler, make_unet, unet_inputs
from diffusers.models.attention_processor import AttnProcessor2_0
from situations import REUSING, full_calls, inputs_of, scheduler, sweep, warned
from zoo import build, runner

import agentsd

REUSE = {"ratio": 0, "cache_interval": 2}


def stepped(pipe, after=lambda scheduler: None) -> torch.Tensor:
    """A loop of one's own over the pipeline's scheduler; ``after`` is done to it in each step."""
    pipe.scheduler.set_timesteps(8)
    inputs = inputs_of(0)
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.scale_model_input(inputs["sample"], t)
        noise = pipe.unet(**{**inputs, "sample": x, "timestep": t}).sample
        inputs["sample"] = pipe.scheduler.step(noise, t, inputs["sample"]).prev_sample
        after(pipe.scheduler)
    return inputs["sample"]


def copied_back(scheduler):
    scheduler.__dict__.update(copy.deepcopy(scheduler.__dict__))


def other_timesteps(scheduler):
    scheduler.timesteps = scheduler.timesteps.clone()


@pytest.mark.parametrize("after", sweep([copied_back, other_timesteps], [copied_back]))
@pytest.mark.parametrize("name", sweep(REUSING))
@pytest.mark.parametrize("kind", ["DDIM", "PNDM", "Euler", "DPM++ 2M"])
def test_a_scheduler_that_is_copied_in_each_step(kind, name, after):
    """Equal timesteps are one schedule, whichever tensor holds them."""
    found = []
    for change in (lambda scheduler: None, after):
        pipe = agentsd.apply_patch(make_pipeline(scheduler=scheduler(kind)), **REUSING[name])
        calls = full_calls(pipe.unet)
        found.append((stepped(pipe, change), calls))
    assert found[0][1] == found[1][1] and not all(found[0][1])
    assert torch.equal(found[0][0], found[1][0])


def panorama(views: int):
    pipe = build("StableDiffusionPanoramaPipeline", image_encoder=None)
    return pipe, runner(pipe, height=64, width=64 + 8 * (views - 1), output_type="latent")


def cached_or_said(unet, run) -> None:
    """Some calls are cached, or one warning says that none is, however many images are made."""
    calls = full_calls(unet)
    with warned() as messages:
        run(), run()
    messages = [message for message in messages if "agentsd" in message]
    assert not all(calls) or len(messages) == 1


@pytest.mark.parametrize("views", sweep([1, 2, 6], [1, 2]))
def test_a_panorama_reuses_or_says_so(views):
    """The pipeline puts its scheduler's state back for each view."""
    pipe, run = panorama(views)
    agentsd.apply_patch(pipe, **REUSE)
    cached_or_said(pipe.unet, run)


def inverted(pipe, inverse) -> torch.Tensor:
    inverse.set_timesteps(8)
    inputs = inputs_of(0)
    for t in inverse.timesteps:
        noise = pipe.unet(**{**inputs, "timestep": t}).sample
        inputs["sample"] = inverse.step(noise, t, inputs["sample"]).prev_sample
    return inputs["sample"]


INVERSIONS = {
    "DDIM": (diffusers.DDIMScheduler, diffusers.DDIMInverseScheduler),
    "DPM++": (diffusers.DPMSolverMultistepScheduler, diffusers.DPMSolverMultistepInverseScheduler),
}


@pytest.mark.parametrize("before", ["nothing", "an image", "half an image"])
@pytest.mark.parametrize("kind", INVERSIONS)
def test_inversion_reuses_or_says_so(kind, before):
    """Upwards through the timesteps, with a scheduler that the patched pipeline does not have."""
    forward, backward = INVERSIONS[kind]
    pipe = agentsd.apply_patch(make_pipeline(scheduler=make_scheduler(forward)), **REUSE)
    if before == "an image":
        image(pipe, steps=8)
    if before == "half an image":
        image(pipe, steps=8, denoising_end=0.5)
    inverse = backward.from_config(pipe.scheduler.config)
    cached_or_said(pipe.unet, lambda: inverted(pipe, inverse))


@pytest.mark.parametrize("name", sweep(REUSING))
@pytest.mark.parametrize("kind", INVERSIONS)
def test_an_image_before_an_inversion_does_not_show_in_it(kind, name):
    """A cancelled image, then an inversion that begins below it."""
    found, (forward, backward) = [], INVERSIONS[kind]
    for seed in (1, 2):
        pipe = agentsd.apply_patch(make_pipeline(scheduler=make_scheduler(forward)), **REUSING[name])
        image(pipe, steps=8, seed=seed)
        found.append(inverted(pipe, backward.from_config(pipe.scheduler.config)))
    assert torch.equal(*found)


def test_a_loop_upwards_on_a_bare_unet_reuses_or_says_so():
    unet = agentsd.apply_patch(make_unet(), **REUSE)
    cached_or_said(unet, lambda: [unet(**unet_inputs(timestep=t)) for t in range(10, 900, 100)])


def streamed(unet, timesteps, frames: int = 6):
    return [unet(**inputs_of(frame, batch=4) | {"timestep": timesteps}).sample for frame in range(frames)]


@pytest.mark.parametrize("through", ["pipeline", "UNet"])
def test_several_timesteps_in_one_batch(through):
    """Each call is full, since every row would need features of the row before it, and one warning says so."""
    pipe = make_pipeline(scheduler=scheduler("LCM"))
    pipe.scheduler.set_timesteps(8)
    timesteps = pipe.scheduler.timesteps[[0, 3, 5, 7]]
    expected = streamed(pipe.unet, timesteps)
    agentsd.apply_patch(pipe if through == "pipeline" else pipe.unet, **REUSE)
    with warned() as messages:
        found = streamed(pipe.unet, timesteps)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(messages) == 1


class Own(AttnProcessor2_0):
    """A processor of a user's own."""


@pytest.mark.parametrize("later", [False, True], ids=["before the patch", "after the patch"])
def test_keys_are_sampled_nowhere_where_every_processor_is_foreign(later):
    """Nothing changes, one warning says so, and the report claims nothing."""
    unet, inputs = make_unet(), unet_inputs()
    expected = unet(**inputs).sample
    with warned() as messages:
        if not later:
            unet.set_attn_processor(Own())
        agentsd.apply_patch(unet, preset="few_steps")
        if later:
            unet.set_attn_processor(Own())
        found = [unet(**inputs).sample for _ in range(3)]
    assert all(torch.equal(image, expected) for image in found)
    assert len(messages) == 1 and "Own" in messages[0]
    assert not agentsd.report(unet).patched and "Own" in str(agentsd.report(unet))


def test_processors_that_a_pipeline_puts_in_place_for_the_call():
    """Text-to-video zero has cross-frame attention: keys of the first frame, which nobody samples."""
    pipe = build("TextToVideoZeroPipeline")
    run = lambda: torch.as_tensor(
        pipe(
            prompt="red apple", video_length=2, height=16, width=16, num_inference_steps=6, t0=3, t1=4,
            output_type="latent", generator=torch.Generator().manual_seed(0),
        ).images
    )  # fmt: skip
    plain = run()
    agentsd.apply_patch(pipe, preset="few_steps", seed=0)
    with warned() as messages:
        found = run()
    assert torch.equal(found, plain) and not agentsd.report(pipe).patched
    assert len([message for message in messages if "agentsd" in message]) == 1


# A share of the trajectory


OFFSET = ("DDIM", "DDPM", "PNDM", "Euler", "Heun", "UniPC", "DPM++ 2M")  # the last timestep would be one too many


def with_all_timesteps(kind: str, trained: int):
    """A scheduler of few training timesteps, so that a trajectory can take them all."""
    spacing = {"timestep_spacing": "trailing"} if kind in ("DDIM", "DDPM") else {}  # pipelines insist on their offset
    offset = {"steps_offset": 0} if kind in OFFSET else {}
    return scheduler(kind, num_train_timesteps=trained, **offset, **spacing)


ALL = [
    ("DDIM", 20, 20), ("DDPM", 20, 20), ("Euler", 20, 20), ("UniPC", 20, 20), ("LCM", 20, 20), ("Heun", 20, 11),
    ("Heun", 20, 19), ("PNDM", 20, 19), ("DPM++ 2M", 20, 20),
]  # fmt: skip


@pytest.mark.parametrize("order", sweep([0, 1], [1]))
@pytest.mark.parametrize(("kind", "trained", "steps"), ALL)
def test_a_share_where_calls_are_as_many_as_training_timesteps(kind, trained, steps, order):
    """A schedule is one that was set, however long: the full calls are those of the same interval in calls."""
    pipe = make_pipeline(scheduler=with_all_timesteps(kind, trained))
    extra = {"original_inference_steps": steps} if kind == "LCM" else {}
    if extra:
        pipe.scheduler.register_to_config(**extra)
    calls = full_calls(pipe.unet)
    agentsd.apply_patch(pipe, 0, cache_interval=0.25, cache_order=order)
    image(pipe, steps=steps)
    share, count = calls.copy(), len(calls)
    calls.clear()
    agentsd.apply_patch(pipe, 0, cache_interval=round(0.25 * count + 1e-9), cache_order=order)
    image(pipe, steps=steps)
    assert share == calls and sum(calls) <= 7


@pytest.mark.parametrize("kind", ["DDIM", "Heun"])
def test_a_share_of_a_schedule_that_was_never_set_stays_that_of_a_usual_trajectory(kind):
    """A loop with a scheduler of its own, over all timesteps of few: the pipeline's own schedule is not meant."""
    pipe = agentsd.apply_patch(make_pipeline(scheduler=with_all_timesteps(kind, 1000)), 0, cache_interval=0.2)
    calls = full_calls(pipe.unet)
    for timestep in range(999, 500, -20):
        pipe.unet(**unet_inputs(timestep=timestep))
    assert [call for call, full in enumerate(calls) if full] == list(range(0, 25, 5))


@pytest.mark.long
@pytest.mark.parametrize(("kind", "steps"), [("DDIM", 1000), ("Heun", 501), ("PNDM", 999)])
def test_a_share_of_a_thousand_calls(kind, steps):
    """With 1,000 training timesteps, as published models have."""
    pipe = agentsd.apply_patch(make_pipeline(scheduler=with_all_timesteps(kind, 1000)), preset="balanced")
    calls = full_calls(pipe.unet)
    image(pipe, steps=steps)
    assert 8 <= sum(calls) <= 10
