"""Pipelines with a transformer in use: several at once, cancelled images, batches, tuning, graphs."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import diffusers
import pytest
import torch
from checks import distance
from test_capture import Recorder
from zoo_transformers import MODELS, TRANSFORMERS

import agentsd
from agentsd import capture
from agentsd.patch import patch_of

SETTINGS = {
    "agents": {"seed": 0},
    "kept": {"seed": 0, "match_interval": 3},
    "balanced": {"seed": 0, "preset": "balanced"},
}
TRANSFORMED = tuple(model for model in MODELS if model != "UNet")


@pytest.fixture(params=TRANSFORMED)
def model(request) -> str:
    return request.param


@pytest.fixture(params=SETTINGS)
def settings(request) -> dict:
    return SETTINGS[request.param]


def sibling(pipe):
    """Another pipeline on its parts, with a scheduler of its own."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other = type(pipe)(**{**pipe.components, "scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    return other


def on(pipe, run):
    """``run``, a zoo's function, as of another pipeline of the same class."""

    def image(seed: int = 0, **changes) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.as_tensor(pipe(**run.arguments | changes, generator=generator).images)

    return image


def test_threads_and_pipelines_on_one_transformer(model, settings):
    """Each image is the one made alone. Flux's calls do not say whose schedule they follow, and may be full."""
    pipe, run = MODELS[model]()
    pipes = [pipe, sibling(pipe)]
    draws = [on(one, run) for one in pipes]
    agentsd.apply_patch(pipe, **settings)
    alone = [draw(seed) for seed, draw in enumerate(draws)]
    with ThreadPoolExecutor() as pool:
        found = [*pool.map(lambda draw, seed: draw(seed), draws, range(2))]
    for image, expected, other in zip(found, alone, alone[::-1], strict=True):
        near = distance(image, expected) < 0.1 * distance(image, other)
        assert torch.equal(image, expected) or (model == "Flux" and near)
    assert not torch.equal(*alone)


@pytest.mark.parametrize("model", ["SD 3", "Flux"])
def test_an_image_made_in_the_callback_of_another(model, settings):
    """Nothing of it shows there."""
    pipe, run = MODELS[model]()
    draw, draw_other = on(pipe, run), on(sibling(pipe), run)
    agentsd.apply_patch(pipe, **settings)
    alone, previews = draw(0), [draw_other(seed) for seed in (1, 2)]

    def preview(seed, pipe, step, timestep, tensors):
        if step == 1:
            assert torch.equal(draw_other(seed), previews[seed - 1])
        return tensors

    images = [draw(0, callback_on_step_end=partial(preview, seed)) for seed in (1, 2)]
    assert torch.equal(*images) and not torch.equal(*previews)
    assert torch.equal(images[0], alone)


def flux_loop(pipe, run, seed: int, remade: bool = False, scheduler=None, more: int = 0):
    """A transformer call of an image, with a scheduler of its own, for each `next`; ``more`` come after the last."""
    scheduler = scheduler or type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(8)
    generator = torch.Generator().manual_seed(seed)
    x, ids = pipe.prepare_latents(1, 4, 64, 64, torch.float32, "cpu", generator)
    text = run.arguments["prompt_embeds"]
    given = {"encoder_hidden_states": text, "pooled_projections": run.arguments["pooled_prompt_embeds"]}
    given["txt_ids"] = text.new_zeros(text.shape[1], 3)
    for t in scheduler.timesteps:
        ids = ids.clone() if remade else ids
        with torch.no_grad():
            noise = pipe.transformer(x, timestep=t.expand(1) / 1000, img_ids=ids, **given).sample
        x = scheduler.step(noise, t, x, return_dict=False)[0]
        yield x
    for _ in range(more):
        with torch.no_grad():
            yield pipe.transformer(x.clone(), timestep=0 * t.expand(1), img_ids=ids, **given).sample


@pytest.mark.parametrize("order", [[0, 1] * 8, [0, 1, 1, 0] * 4, [0] * 3 + [0, 1] * 5 + [1] * 3], ids=str)
def test_loops_in_turns_on_flux(order, settings):
    """Its calls do not say whose schedule they follow: the ids of a loop's image tokens tell it from others."""
    pipe, run = MODELS["Flux"]()
    agentsd.apply_patch(pipe, **settings)
    alone = [[*flux_loop(pipe, run, seed)][-1] for seed in (0, 1)]
    loops, found = [flux_loop(pipe, run, seed) for seed in (0, 1)], [None, None]
    for which in order:
        found[which] = next(loops[which])
    assert all(torch.equal(x, expected) for x, expected in zip(found, alone, strict=True))


def test_a_loop_that_makes_its_ids_anew_for_each_call_is_followed_all_the_same():
    pipe, run = MODELS["Flux"]()
    agentsd.apply_patch(pipe, preset="balanced")
    once, anew = ([*flux_loop(pipe, run, 0, remade)][-1] for remade in (False, True))
    assert torch.equal(once, anew) and patch_of(pipe).calls["cached"] > 0


def test_calls_beyond_the_end_of_a_schedule(settings):
    """Of a loop that refines what it has: at a timestep that is none of the schedule."""
    pipe, run = MODELS["Flux"]()
    agentsd.apply_patch(pipe, **settings)
    loop = flux_loop(pipe, run, 0, scheduler=pipe.scheduler, more=3)
    assert all(x.isfinite().all() for x in loop) and len([*flux_loop(pipe, run, 0, more=3)]) == 11


def test_the_image_after_one_that_was_cut_off_takes_nothing_from_it(model, settings):
    pipe, run = MODELS[model]()
    agentsd.apply_patch(pipe, **settings)
    draw = on(pipe, run)
    expected = draw(1)

    def fail(*_):
        raise KeyboardInterrupt

    calls = iter(range(99))
    handle = pipe.transformer.proj_out.register_forward_pre_hook(lambda *_: fail() if next(calls) == 2 else None)
    with pytest.raises(KeyboardInterrupt):
        draw(0)
    handle.remove()
    assert torch.equal(draw(1), expected)


@pytest.mark.parametrize("model", ["SD 3", "Flux"])
def test_the_image_after_one_that_was_cancelled_takes_nothing_from_it(model, settings):
    pipe, run = MODELS[model]()
    agentsd.apply_patch(pipe, **settings)
    draw = on(pipe, run)
    expected = draw(1)

    def cancel(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return tensors

    draw(0, callback_on_step_end=cancel)
    assert torch.equal(draw(1), expected)


def test_several_images_of_a_prompt(model, settings):
    pipe, run = MODELS[model]()
    texts = {name: value for name, value in run.arguments.items() if "prompt" in name}
    three = {name: torch.cat([text] * 3) for name, text in texts.items() if isinstance(text, torch.Tensor)}
    plain = run(**three)
    agentsd.apply_patch(pipe, **settings)
    images = run(**three)
    assert images.shape == plain.shape == (3, *plain.shape[1:])
    assert 0 < distance(images, plain) < 0.5
    assert torch.equal(run(**three), images)


def without_guidance_from(at: int):
    """A callback that ends guidance, and with it half of the batch, as diffusers' documentation shows it."""

    def callback(pipe, step, timestep, tensors):
        if step == at:
            pipe._guidance_scale = 0.0
            tensors = {name: value[-1:] for name, value in tensors.items()}
        return tensors

    names = ["prompt_embeds", "pooled_prompt_embeds"]
    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}


ENDS = {
    "guidance": ("Stable Diffusion 3.5", without_guidance_from(3)),
    "skip-layer guidance": ("skip-layer guidance", {"skip_layer_guidance_stop": 0.4}),
    "SD 3 ControlNet": ("SD 3 ControlNet", {"control_guidance_end": 0.4}),
    "Flux ControlNet": ("Flux ControlNet", {"control_guidance_end": 0.4}),
}


@pytest.mark.parametrize("which", ENDS)
def test_guidance_that_ends_before_the_image(which, settings):
    name, ending = ENDS[which]
    pipe, run = TRANSFORMERS[name]()
    draw = lambda: run(num_inference_steps=8, **ending)
    plain = draw()
    assert not torch.equal(plain, run(num_inference_steps=8))
    agentsd.apply_patch(pipe, **settings)
    image = draw()
    assert 0 < distance(image, plain) < 0.5
    assert torch.equal(draw(), image)


def test_tune_finds_settings_for_a_pipeline_without_text_encoders(model):
    """Prompts are given as embeddings, once for all images."""
    pipe, run = MODELS[model]()
    inputs = {name: value for name, value in run.arguments.items() if name not in ("prompt", "output_type")}
    found = agentsd.tune(pipe, seconds=0, progress=False, prompts=["", ""], **inputs | {"num_inference_steps": 20})
    assert [trial.name for trial in found.trials][2:] == ["balanced", "quality"]  # adaptive is balanced there
    assert patch_of(pipe) is None


def test_errors_decide_nothing_and_adaptive_is_balanced(model):
    """Evenly spread full calls are nearer there (benchmarks/NOTES.md)."""
    pipe, run = MODELS[model]()
    drawn = {}
    for preset in ("balanced", "adaptive"):
        agentsd.apply_patch(pipe, preset=preset)
        drawn[preset] = run(num_inference_steps=24)
    assert torch.equal(drawn["balanced"], drawn["adaptive"])
    assert "of 50 calls are full" in str(agentsd.report(pipe))
    with pytest.warns(UserWarning, match="nothing comes of cache_tolerance=0.01, cache_budget=0.5"):
        agentsd.apply_patch(pipe, preset="adaptive", cache_tolerance=0.01, cache_budget=0.5)
    with pytest.warns(UserWarning, match="nothing comes of cache_budget=0.4"):
        agentsd.apply_patch(pipe, preset="adaptive", cache_budget=0.4)
    assert torch.equal(run(num_inference_steps=24), drawn["balanced"])
    measured = str(agentsd.report(pipe, measure=True))
    assert ("measured: self-attention" if model == "PixArt" else "not timed: its attention is joint") in measured


def test_cuda_graphs_are_refused_on_a_cpu_in_one_line(model):
    pipe, run = MODELS[model]()
    expected = run()
    agentsd.apply_patch(pipe, 0, cuda_graphs=True)
    with pytest.warns(UserWarning, match="agentsd replays no CUDA graph here: the latents are on cpu"):
        assert torch.equal(run(), expected)


@pytest.mark.parametrize("settings", ["agents", "balanced"], indirect=True)
@pytest.mark.parametrize("name", ["Stable Diffusion 3.5", "skip-layer guidance", "Flux", "SD 3 ControlNet"])
def test_recorded_calls_are_the_same_image(name, settings, monkeypatch):
    """By a recorder that calls again; kinds of calls are recorded once, in the first image."""
    monkeypatch.setattr(capture, "CudaGraphs", Recorder)
    pipe, run = TRANSFORMERS[name]()
    agentsd.apply_patch(pipe, **settings)
    expected = run()
    agentsd.apply_patch(pipe, **settings, cuda_graphs=True)
    assert torch.equal(run(), expected)
    captured = patch_of(pipe).capture.captured
    assert captured >= 2
    assert torch.equal(run(), expected) and patch_of(pipe).capture.captured == captured


UNKNOWN = {
    "AuraFlowTransformer2DModel": {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "num_attention_heads": 1},
    "CogView4Transformer2DModel": {"num_layers": 1, "num_attention_heads": 1},
    "ZImageTransformer2DModel": {"dim": 32, "n_layers": 1, "n_heads": 2, "axes_dims": [4, 6, 6], "cap_feat_dim": 16},
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("preset", [None, "balanced"])
def test_transformers_that_are_not_known_are_refused(name, preset):
    with torch.device("meta"):
        net = getattr(diffusers, name)(**UNKNOWN[name])
    with pytest.raises(ValueError, match=f"{name} has no self-attention to patch .*Stable Diffusion 3, 3.5, Flux or"):
        agentsd.apply_patch(net, preset=preset)
    assert patch_of(net) is None
