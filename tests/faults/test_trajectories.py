"""Several pipelines, copies and loops of one's own on one UNet: each image is the one made alone."""

import copy
import functools
import gc
import pickle
from itertools import product

import diffusers
import pytest
import torch
from conftest import embeddings, image, make_img2img, make_pipeline, make_unet, unet_inputs
from situations import (
    KEEPING,
    MAIN,
    SCHEDULERS,
    SETTINGS,
    Stopped,
    cancel,
    fail,
    failing_call,
    full_calls,
    images_alone,
    inputs_of,
    is_one_of,
    pair,
    scheduler,
    sibling,
    sweep,
)

import agentsd

STEPS = 6
SOME = ("agents", "reuse", "balanced")


def until_error(pipe, at):
    with pytest.raises(Stopped):
        image(pipe, steps=STEPS, callback_on_step_end=fail(at))


def until_error_in_a_call(pipe):
    with failing_call(pipe.unet, at=2):
        image(pipe, steps=STEPS)


HAPPENED = {
    "a whole image": lambda pipe: image(pipe, steps=STEPS, seed=9),
    "images of other lengths": lambda pipe: [image(pipe, steps=steps, seed=9) for steps in (4, 9)],
    "cancelled in the first step": lambda pipe: image(pipe, steps=STEPS, seed=9, callback_on_step_end=cancel(0)),
    "cancelled midway": lambda pipe: image(pipe, steps=STEPS, seed=9, callback_on_step_end=cancel(2)),
    "an error midway": lambda pipe: until_error(pipe, 2),
    "an error inside a call": until_error_in_a_call,
    "a schedule that was only set": lambda pipe: pipe.scheduler.set_timesteps(STEPS),
}


@functools.cache
def second_alone(first: str, second: str, name: str) -> list[torch.Tensor]:
    return images_alone(lambda: pair(first, second), lambda _, other: image(other, steps=STEPS), SETTINGS[name])


def in_every_suite(case):
    """A cancelled image with each scheduler, and everything that can happen with one of either sort."""
    kind, name, happened = case
    midway = happened == "cancelled midway" and name == "balanced"
    return midway or (kind, name) in (("Euler", "agents"), ("DDIM", "reuse"))


@pytest.mark.parametrize(("kind", "name", "happened"), sweep(product(SCHEDULERS, SOME, HAPPENED), in_every_suite))
def test_another_pipeline_on_the_unet(kind, name, happened):
    """Its image does not depend on what the patched pipeline did before, nor the patched one's on its."""
    pipe, other = pair(kind)
    agentsd.apply_patch(pipe, **SETTINGS[name])
    HAPPENED[happened](pipe)
    assert is_one_of(image(other, steps=STEPS), second_alone(kind, kind, name))
    HAPPENED[happened](other)
    assert torch.equal(image(pipe, steps=STEPS), first_alone(kind, name))


@functools.cache
def first_alone(kind: str, name: str) -> torch.Tensor:
    return image(agentsd.apply_patch(make_pipeline(scheduler=scheduler(kind)), **SETTINGS[name]), steps=STEPS)


@pytest.mark.parametrize("name", sweep(SOME, ["balanced"]))
@pytest.mark.parametrize("kinds", [("Euler", "DDIM"), ("PNDM", "Heun"), ("Heun", "DPM++ 2M"), ("LCM", "Euler")])
def test_another_pipeline_with_a_scheduler_of_another_kind(kinds, name):
    """Neither the order of the schedulers nor their number of calls a step matters."""
    pipe, other = pair(*kinds)
    agentsd.apply_patch(pipe, **SETTINGS[name])
    image(pipe, steps=STEPS, seed=9, callback_on_step_end=cancel(2))
    assert is_one_of(image(other, steps=STEPS), second_alone(*kinds, name))


@pytest.mark.parametrize("happened", ["a whole image", "cancelled in the first step", "cancelled midway"])
@pytest.mark.parametrize("name", sweep(SOME, ["balanced"]))
@pytest.mark.parametrize("kind", ["DDIM", "Euler"])
def test_patched_through_the_unet(kind, name, happened):
    """Without a scheduler to follow, two pipelines in turn give what each gives alone."""
    pipe, other = pair(kind)
    agentsd.apply_patch(pipe.unet, **SETTINGS[name])
    HAPPENED[happened](pipe)
    assert is_one_of(image(other, steps=STEPS), second_alone(kind, kind, name))
    HAPPENED[happened](other)
    assert is_one_of(image(other, steps=STEPS), second_alone(kind, kind, name))


def img2img(pipe, strength=0.5, **arguments):
    return image(pipe, steps=8, image=torch.zeros(1, 3, 16, 16), strength=strength, **arguments)


def text_and_image(kind):
    pipe = make_pipeline(scheduler=scheduler(kind))
    return pipe, sibling(pipe, scheduler(kind), diffusers.StableDiffusionImg2ImgPipeline)


@functools.cache
def img2img_alone(kind: str, name: str, strength: float) -> list[torch.Tensor]:
    draw = lambda _, other: img2img(other, strength)
    return images_alone(lambda: text_and_image(kind), draw, SETTINGS[name])


@pytest.mark.parametrize("through", ["pipeline", "UNet"])
@pytest.mark.parametrize("strength", sweep([1.0, 0.5], [0.5]))
@pytest.mark.parametrize("name", ["agents", "reuse"])
@pytest.mark.parametrize("kind", ["DDIM", "Euler"])
def test_image_to_image_where_a_cancelled_image_left_off(kind, name, strength, through):
    """Its timesteps go on where the other image's stopped, and it takes nothing from that one."""
    pipe, other = text_and_image(kind)
    agentsd.apply_patch(pipe if through == "pipeline" else pipe.unet, **SETTINGS[name])
    image(pipe, steps=8, seed=9, callback_on_step_end=cancel(2))
    assert is_one_of(img2img(other, strength), img2img_alone(kind, name, strength))


def base_and_refiner(kind: str, own: bool):
    base = make_pipeline("sdxl", scheduler(kind))
    optional = {"requires_aesthetics_score": False, "force_zeros_for_empty_prompt": False, "add_watermarker": False}
    its = scheduler(kind) if own else base.scheduler
    return base, sibling(base, its, diffusers.StableDiffusionXLImg2ImgPipeline, **optional)


def first_stage(base, _=None):
    return image(base, steps=8, denoising_end=0.4)


def second_stage(refiner, latents):
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": 8, "denoising_start": 0.4, "output_type": "latent", "generator": generator}
    return refiner(**embeddings(pooled=True), image=latents, **arguments).images


@functools.cache
def stages_alone(kind: str, own: bool, name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    make = lambda: base_and_refiner(kind, own)
    first = images_alone(make, first_stage, SETTINGS[name])
    # in the order of the handles: the second stage goes on from what the first gave through the same
    through_base = first[0]
    return first, images_alone(make, lambda _, refiner: second_stage(refiner, through_base), SETTINGS[name])


@pytest.mark.parametrize("own", [True, False], ids=["schedulers of their own", "one scheduler"])
@pytest.mark.parametrize("name", sweep(MAIN, ["balanced"]))
@pytest.mark.parametrize("kind", ["DDIM", "Heun", "Euler"])
def test_base_and_refiner_on_one_unet(kind, name, own):
    """Both stages of SDXL, twice, are what they are on a UNet of their own."""
    base, refiner = base_and_refiner(kind, own)
    agentsd.apply_patch(base, **SETTINGS[name])
    first, second = stages_alone(kind, own, name)
    for _ in range(2):
        latents = first_stage(base)
        assert torch.equal(latents, first[0])
        assert is_one_of(second_stage(refiner, latents), second)


@pytest.mark.parametrize("name", sweep(MAIN, ["balanced"]))
@pytest.mark.parametrize("kind", ["DDIM", "Euler"])
def test_two_patched_unets_that_share_a_scheduler(kind, name):
    """A cancelled image of one leaves nothing to the other, whose scheduler it is as well."""
    pipe, other = make_pipeline(scheduler=scheduler(kind)), make_pipeline()
    other.scheduler = pipe.scheduler
    for patched in (pipe, other):
        agentsd.apply_patch(patched, **SETTINGS[name])
    image(pipe, steps=STEPS, seed=9, callback_on_step_end=cancel(2))
    assert torch.equal(image(other, steps=STEPS), first_alone(kind, name))
    image(other, steps=STEPS, seed=9, callback_on_step_end=cancel(1))
    assert torch.equal(image(pipe, steps=STEPS), first_alone(kind, name))


@pytest.mark.parametrize("name", sweep(SOME, ["agents"]))
@pytest.mark.parametrize("kind", ["DDIM", "Euler"])
def test_a_pipeline_that_outlives_the_patched_one(kind, name):
    """The patched pipeline is cancelled and deleted; its scheduler's position is nobody's any more."""
    pipe, other = pair(kind)
    agentsd.apply_patch(pipe, **SETTINGS[name])
    image(pipe, steps=STEPS, seed=9, callback_on_step_end=cancel(2))
    del pipe
    gc.collect()
    assert is_one_of(image(other, steps=STEPS), second_alone(kind, kind, name))


@pytest.mark.parametrize("happened", sweep(HAPPENED, ["cancelled midway"]))
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_image_starts_with_a_full_call(kind, happened):
    """Whatever came before it, in either pipeline, and reuse goes on."""
    pipe, other = pair(kind)
    agentsd.apply_patch(pipe, ratio=0, cache_interval=3)
    calls = full_calls(pipe.unet)
    HAPPENED[happened](pipe)
    for following in (other, pipe):
        calls.clear()
        image(following, steps=STEPS)
        assert calls[0] and not all(calls)


# Calls before a trajectory, from the same timestep


TIMESTEPS = (900, 700, 500, 300, 100)


def loop(unet, user: int, timesteps=TIMESTEPS) -> list[torch.Tensor]:
    """A trajectory of one's own: what each call gives, for inputs that do not depend on it."""
    return [unet(**inputs_of(user, timestep=timestep)).sample for timestep in timesteps]


def warmed_up(unet, user):
    unet(**inputs_of(user, timestep=TIMESTEPS[0]))


def warmed_up_twice(unet, user):
    warmed_up(unet, user)
    warmed_up(unet, user + 10)


def interrupted_in_the_first_call(unet, user):
    with failing_call(unet, at=0):
        warmed_up(unet, user)


def interrupted_in_the_second_call(unet, user):
    with failing_call(unet, at=1):
        loop(unet, user)


BEFORE = {
    "a warm-up call": warmed_up,
    "two warm-up calls": warmed_up_twice,
    "an error in the first call": interrupted_in_the_first_call,
    "an error in the second call": interrupted_in_the_second_call,
    "the first two calls of an image": lambda unet, user: loop(unet, user, TIMESTEPS[:2]),
    "a whole image": loop,
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("name", sweep(SETTINGS, ["reuse", "balanced"]))
def test_what_ran_before_a_trajectory_does_not_show_in_it(name, before):
    """Calls of one image, then those of another from the same timestep: the first one's content is in none of them."""
    found = []
    for user in (1, 2):
        unet = agentsd.apply_patch(make_unet(), **SETTINGS[name])
        BEFORE[before](unet, user)
        found.append(loop(unet, 0))
    alone = loop(agentsd.apply_patch(make_unet(), **SETTINGS[name]), 0)
    assert torch.equal(found[0][0], alone[0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["DDIM", "PNDM", "Euler"])
@pytest.mark.parametrize("name", sweep(KEEPING, ["reuse"]))
def test_a_warm_up_of_a_pipeline_s_unet_does_not_show(kind, name):
    """A direct call at the first timestep of the schedule, which is set, then a loop of one's own over it."""
    found = []
    for user in (1, 2):
        pipe = make_pipeline(scheduler=scheduler(kind))
        pipe.scheduler.set_timesteps(5)
        agentsd.apply_patch(pipe, **SETTINGS[name])
        pipe.unet(**inputs_of(user, timestep=pipe.scheduler.timesteps[0]))
        found.append(stepped(pipe))
    assert torch.equal(*found)


def stepped(pipe) -> torch.Tensor:
    inputs = inputs_of(0)
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.scale_model_input(inputs["sample"], t)
        noise = pipe.unet(**{**inputs, "sample": x, "timestep": t}).sample
        generator = torch.Generator().manual_seed(0)
        accepts = "generator" in pipe.scheduler.step.__code__.co_varnames
        extra = {"generator": generator} if accepts else {}
        inputs["sample"] = pipe.scheduler.step(noise, t, inputs["sample"], **extra).prev_sample
    return inputs["sample"]


@pytest.mark.parametrize("name", KEEPING)
def test_a_warm_up_before_guidance_in_two_calls_does_not_show(name):
    """One call of somebody else at the first timestep, then two at every timestep."""
    twice = [timestep for timestep in TIMESTEPS for _ in range(2)]
    found = []
    for user in (1, 2):
        unet = agentsd.apply_patch(make_unet(), **SETTINGS[name])
        warmed_up(unet, user)
        found.append([unet(**inputs_of(i % 2 + 5, timestep=t)).sample for i, t in enumerate(twice)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Copies


COPIED = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize("copied", COPIED.values(), ids=COPIED)
@pytest.mark.parametrize("name", sweep(SOME, ["balanced"]))
@pytest.mark.parametrize("kind", ["DDIM", "Euler"])
def test_a_copied_pipeline_and_its_original(kind, name, copied):
    """After a whole image and in the middle of one, a copy's first image is right, and so is the original's."""
    pipe = agentsd.apply_patch(make_pipeline(scheduler=scheduler(kind)), **SETTINGS[name])
    expected = first_alone(kind, name)
    image(pipe, steps=STEPS, seed=9)
    twins = [copied(pipe)]

    def copy_midway(pipe, step, timestep, tensors):
        if step == 1:
            twins.append(copied(pipe))
        return tensors

    assert torch.equal(image(pipe, steps=STEPS, callback_on_step_end=copy_midway), expected)
    for twin in twins:
        twin.set_progress_bar_config(disable=True)
        assert torch.equal(image(twin, steps=STEPS), expected)
    assert torch.equal(image(pipe, steps=STEPS), expected)


@pytest.mark.parametrize("copied", COPIED.values(), ids=COPIED)
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("name", sweep(SOME, ["reuse"]))
def test_a_copied_unet_starts_an_image_of_its_own(name, calls, copied):
    """Copied after some calls of an image, it keeps nothing of that image, and the original loses nothing."""
    alone = loop(agentsd.apply_patch(make_unet(), **SETTINGS[name]), 1)
    unet = agentsd.apply_patch(make_unet(), **SETTINGS[name])
    begun = loop(unet, 1, TIMESTEPS[:calls])
    twin = copied(unet)
    found = loop(twin, 0)
    rest = loop(unet, 1, TIMESTEPS[calls:])
    assert all(torch.equal(a, b) for a, b in zip(begun + rest, alone, strict=True))
    expected = loop(agentsd.apply_patch(make_unet(), **SETTINGS[name]), 0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("copied", COPIED.values(), ids=COPIED)
@pytest.mark.parametrize("name", KEEPING)
def test_a_copied_unet_that_starts_where_the_original_was(name, copied):
    """The copy's timesteps go on from those of the original's image, but the image is another: none of it shows."""
    found = []
    for user in (1, 2):
        unet = agentsd.apply_patch(make_unet(), **SETTINGS[name])
        loop(unet, user, TIMESTEPS[:2])
        found.append(loop(copied(unet), 0, TIMESTEPS[2:]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("copied", COPIED.values(), ids=COPIED)
@pytest.mark.parametrize("name", sweep(SOME, ["agents"]))
@pytest.mark.parametrize("kind", ["DDIM", "Euler"])
def test_a_unet_copied_into_another_pipeline(kind, name, copied):
    """The copy follows no scheduler of the pipeline that it came from."""
    pipe, other = pair(kind)
    agentsd.apply_patch(pipe, **SETTINGS[name])
    image(pipe, steps=STEPS, seed=9, callback_on_step_end=cancel(2))
    other.unet = copied(pipe.unet)
    assert is_one_of(image(other, steps=STEPS), second_alone(kind, kind, name))


@pytest.mark.parametrize("name", sweep(SETTINGS))
def test_a_shallow_copy_shares_the_unet(name):
    """`copy.copy` and `from_pipe` make another pipeline on the same UNet and scheduler: one patch, the same image."""
    pipe = agentsd.apply_patch(make_pipeline(), **SETTINGS[name])
    image(pipe, steps=STEPS, seed=9, callback_on_step_end=cancel(2))
    for other in (copy.copy(pipe), type(pipe).from_pipe(pipe)):
        other.set_progress_bar_config(disable=True)
        assert torch.equal(image(other, steps=STEPS), first_alone("DDIM", name))
        image(other, steps=STEPS, seed=9, callback_on_step_end=cancel(1))
    assert torch.equal(image(pipe, steps=STEPS), first_alone("DDIM", name))


def test_an_img2img_pipeline_copied_midway():
    """Of an image that starts in the middle, too."""
    pipe = agentsd.apply_patch(make_img2img(), **SETTINGS["balanced"])
    expected, twins = img2img(pipe), []

    def copy_midway(pipe, step, timestep, tensors):
        if step == 1:
            twins.append(copy.deepcopy(pipe))
        return tensors

    img2img(pipe, callback_on_step_end=copy_midway)
    twins[0].set_progress_bar_config(disable=True)
    assert torch.equal(img2img(twins[0]), expected)


@pytest.mark.parametrize("through", ["pipeline", "UNet"])
@pytest.mark.parametrize("name", ["reuse", "balanced", "adaptive"])
@torch.no_grad()
def test_calls_at_random_timesteps_are_full(name, through):
    """As a loss of validation has them, or distillation of scores: of one prompt, with noise anew in each."""
    pipe, plain = make_pipeline(), make_unet()
    agentsd.apply_patch(pipe if through == "pipeline" else pipe.unet, **SETTINGS[name] | {"ratio": 0, "cache_cell": 1})
    generator, inputs = torch.Generator().manual_seed(0), inputs_of(0)
    scene = inputs["sample"].clone()  # and that is where each call's latents are written to
    for _ in range(200):
        inputs["timestep"] = torch.randint(20, 980, (1,), generator=generator)
        noise = torch.randn(scene.shape, generator=generator)
        inputs["sample"].copy_(pipe.scheduler.add_noise(scene, noise, inputs["timestep"]))
        assert torch.equal(pipe.unet(**inputs).sample, plain(**inputs).sample)


def calls_of(unet, inputs, timesteps) -> list[torch.Tensor]:
    return [unet(**{**inputs, "timestep": t}).sample for t in timesteps]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_text_that_changes_within_an_image(in_place):
    """The features are of another prompt from then on, be it in the memory of the first."""
    pipe, inputs = make_pipeline(), unet_inputs()
    pipe.scheduler.set_timesteps(6)
    first, *rest = pipe.scheduler.timesteps
    other = {**inputs, "encoder_hidden_states": -inputs["encoder_hidden_states"]}
    expected = calls_of(pipe.unet, other, rest[:1])
    agentsd.apply_patch(pipe, 0, cache_interval=3)
    text = inputs["encoder_hidden_states"].clone()
    calls_of(pipe.unet, {**inputs, "encoder_hidden_states": text}, [first])
    text = text.neg_() if in_place else other["encoder_hidden_states"]
    found = calls_of(pipe.unet, {**inputs, "encoder_hidden_states": text}, rest)
    assert torch.equal(found[0], expected[0]) and agentsd.report(pipe).last == {"full": 3, "cached": 3}


@pytest.mark.filterwarnings("ignore:agentsd reuses no features")
@pytest.mark.parametrize("views", [1, 2, 3, 6])
def test_the_report_counts_all_calls_of_an_image(views):
    """As a panorama makes them, several of one prompt in a step."""
    pipe = make_pipeline()
    pipe.scheduler.set_timesteps(8)
    each = [unet_inputs() | {"sample": torch.randn(2, 4, 16, 16)} for _ in range(views)]
    agentsd.apply_patch(pipe, 0, cache_interval=3)
    for t in pipe.scheduler.timesteps:
        for inputs in each:
            pipe.unet(**{**inputs, "timestep": t})
    assert sum(agentsd.report(pipe).last.values()) == 8 * views
