"""After any fault the next image is right."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_unet, sweep, unet_inputs
from diffusers import StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from zoo import build, picture, runner

import agentsd

SETTINGS = {
    "agents": {},
    "sampling": {"sample_kv": True},
    "reuse": {"cache_interval": 2},
    "cheap": {"merge_attn": False, "merge_crossattn": True, "cache_interval": 2, "cache_cell": 2},
}
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYERS = [f"{BLOCK}.attn1", f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_q", "mid_block", "conv_out"]


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS)
def settings(request) -> dict:
    return {"seed": 0, **request.param}


def patched_pipe(settings):
    pipe = build("StableDiffusionPipeline")
    run = runner(pipe)
    plain = run()
    agentsd.apply_patch(pipe, **settings)
    return pipe, run, plain, run()


@pytest.mark.parametrize("error", sweep([KeyboardInterrupt], [RuntimeError]))
@pytest.mark.parametrize("layer", LAYERS)
def test_an_exception_anywhere(settings, error, layer):
    pipe, run, plain, expected = patched_pipe(settings)
    for call in (0, 1, 3):
        calls = iter(range(99))

        def fail(*_, call=call, calls=calls):
            if next(calls) == call:
                raise error("on purpose")

        handle = pipe.unet.get_submodule(layer).register_forward_pre_hook(fail)
        try:
            with pytest.raises(error):
                for _ in range(4):  # a skipped layer gets to its call in a later image
                    run()
        finally:
            handle.remove()
        assert torch.equal(run(), expected), f"after an error in call {call}"
    agentsd.remove_patch(pipe)
    assert torch.equal(run(), plain)


def test_removed_right_after_an_exception(settings):
    pipe, run, plain, _ = patched_pipe(settings)

    def fail(*_):
        raise RuntimeError("on purpose")

    handle = pipe.unet.get_submodule(LAYERS[0]).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        run()
    handle.remove()
    agentsd.remove_patch(pipe)
    assert torch.equal(run(), plain)


def test_removed_in_a_callback(settings):
    _, run, plain, _ = patched_pipe(settings)
    remove = lambda pipe, step, timestep, tensors: agentsd.remove_patch(pipe) and {}
    half = run(callback_on_step_end=remove)
    assert half.isfinite().all() and not torch.equal(half, plain)
    assert torch.equal(run(), plain)


def test_applied_in_a_callback(settings):
    pipe, run, plain, expected = patched_pipe(settings)
    agentsd.remove_patch(pipe)
    apply = lambda pipe, step, timestep, tensors: (agentsd.apply_patch(pipe, **settings) if step == 1 else None) or {}
    half = run(callback_on_step_end=lambda *a: apply(*a) and {})
    assert half.isfinite().all() and not torch.equal(half, plain)
    assert torch.equal(run(), expected)


def test_copies_and_pickles(settings):
    pipe, run, plain, expected = patched_pipe(settings)
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        twin.set_progress_bar_config(disable=True)
        assert torch.equal(runner(twin)(), expected)
        agentsd.remove_patch(twin)
        assert torch.equal(runner(twin)(), plain)
    assert torch.equal(run(), expected)


def test_two_pipelines_side_by_side(settings):
    _, run_first, _, expected_first = patched_pipe(settings)
    _, run_second, _, expected_second = patched_pipe({"seed": 1, "ratio": 0.6})
    assert torch.equal(run_first(), expected_first)
    assert torch.equal(run_second(), expected_second)
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda run: run(), [run_first, run_second]))
    assert torch.equal(images[0], expected_first) and torch.equal(images[1], expected_second)


def test_from_pipe_shares_the_unet(settings):
    """Patched once, removed once; each pipeline's own scheduler says where it is."""
    pipe, run, plain, expected = patched_pipe(settings)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    run_other = runner(other, image=picture(), strength=0.8)
    patched = run_other()
    assert agentsd.report(other).patched
    assert torch.equal(run(), expected)
    assert torch.equal(run_other(), patched)
    agentsd.remove_patch(other)
    assert torch.equal(run(), plain)
    assert not torch.equal(run_other(), patched)


def test_bad_input_gives_the_error_it_gives_unpatched(settings):
    inputs = unet_inputs()
    broken = [{"sample": inputs["sample"][0, 0]}, {"encoder_hidden_states": torch.ones(2, 5, 3)}, {"sample": None}]
    for change in broken:
        with pytest.raises(Exception) as plain:
            make_unet()(**inputs | change)
        with pytest.raises(type(plain.value)):
            agentsd.apply_patch(make_unet(), **settings)(**inputs | change)


def test_a_unet_of_another_kind_is_refused():
    """That of the latent upscaler: attention without transformer blocks."""
    unet = UNet2DConditionModel(
        block_out_channels=(16, 16),
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("KCrossAttnUpBlock2D", "KUpBlock2D"),
        norm_num_groups=None,
        attention_head_dim=8,
        cross_attention_dim=16,
        only_cross_attention=False,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        act_fn="gelu",
        conv_in_kernel=1,
        conv_out_kernel=1,
    )
    for settings in ({}, {"preset": "balanced"}):
        with pytest.raises(ValueError, match="UNet2DConditionModel has no self-attention to patch"):
            agentsd.apply_patch(unet, **settings)


def test_nan_latents_stay_nan(settings):
    unet, inputs = agentsd.apply_patch(make_unet(), **settings), unet_inputs()
    assert unet(**inputs | {"sample": inputs["sample"] * torch.nan}).sample.isnan().all()
    assert torch.equal(unet(**inputs).sample, agentsd.apply_patch(make_unet(), **settings)(**inputs).sample)
