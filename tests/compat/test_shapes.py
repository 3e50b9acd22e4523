"""Batches, guidance, and sizes that no stride divides."""

import pytest
import torch
from checks import distance
from conftest import make_unet, unet_inputs
from zoo import build, runner

import agentsd

SETTINGS = {"agents": {}, "sampling": {"sample_kv": True}, "reuse": {"cache_interval": 2}}
CALLS = {
    "batch 1, no guidance": {"guidance_scale": 1.0},
    "three prompts": {"prompt": ["red apple", "cat", "frog"]},
    "several images a prompt": {"num_images_per_prompt": 3},
    "not square": {"height": 16, "width": 40},
    "larger than trained": {"height": 32, "width": 32},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("call", CALLS)
def test_close_to_unpatched(call, settings):
    pipe = build("StableDiffusionPipeline")
    run = runner(pipe, **CALLS[call])
    plain = run()
    agentsd.apply_patch(pipe, seed=0, **settings)
    patched = run()
    assert patched.shape == plain.shape and patched.isfinite().all()
    assert 0 < distance(patched, plain) < 0.5
    assert torch.equal(run(), patched)
    agentsd.remove_patch(pipe)
    assert torch.equal(run(), plain)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_no_stride_divides_the_size(settings):
    pipe = build("StableDiffusionPipeline")
    run = runner(pipe, height=24, width=40)
    plain = run()
    agentsd.apply_patch(pipe, seed=0, sx=3, sy=7, agent_sx=7, agent_sy=5, **settings)
    assert 0 < distance(run(), plain) < 0.5


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_guidance_in_one_call_or_in_two(settings):
    """The draw is that of the step, not of the call: conditional and unconditional halves merge alike."""
    inputs = unet_inputs(batch=2)
    one = agentsd.apply_patch(make_unet(), seed=0, **settings)(**inputs).sample
    unet = agentsd.apply_patch(make_unet(), seed=0, **settings)
    halves = [
        unet(**{k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}).sample
        for i in range(2)
    ]
    torch.testing.assert_close(torch.cat(halves), one)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_size_changes_between_images(settings):
    pipe = agentsd.apply_patch(build("StableDiffusionPipeline"), seed=0, **settings)
    run = runner(pipe)
    first = run()
    assert run(height=24, width=16).shape[-2:] == (24, 16)
    assert torch.equal(run(), first)


@pytest.mark.filterwarnings("ignore:agentsd changes nothing at this size")
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 3), (2, 9)])
def test_latents_smaller_than_a_cell(size):
    unet = agentsd.apply_patch(make_unet(down_block_types=("CrossAttnDownBlock2D",) * 2), seed=0)
    assert unet(**unet_inputs(height=size[0], width=size[1])).sample.isfinite().all()
