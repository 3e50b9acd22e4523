"""`patch_controlnet=True` patches the ControlNets' own attention."""

import pytest
import torch
from checks import distance
from conftest import POOLED_CHANNELS
from tiny_transformers import make_transformer
from zoo import PIPELINES
from zoo_transformers import TRANSFORMERS, sd3_controlnet_of_tokens, seen

import agentsd
from agentsd.models import controlnets_of


@pytest.mark.parametrize("name", ["ControlNet", "several ControlNets", "SDXL ControlNet"])
def test_patched_and_removed_with_the_unet(name):
    pipe, run = PIPELINES[name]()
    plain = run()
    agentsd.apply_patch(pipe, seed=0)
    unet_alone = run()
    assert "patch_controlnet=True" in str(agentsd.report(pipe))
    agentsd.apply_patch(pipe, seed=0, patch_controlnet=True)
    both = run()
    assert not torch.equal(both, unet_alone)
    assert distance(both, plain) < 0.5
    names = {layer.name.split(".")[0] for layer in agentsd.report(pipe).patched}
    assert names >= {"controlnet", "down_blocks"}
    agentsd.remove_patch(pipe)
    assert torch.equal(run(), plain)
    assert not any(module._forward_pre_hooks for net in controlnets_of(pipe).values() for module in net.modules())


@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if "ControlNet" in name])
def test_patched_and_removed_with_the_transformer(name):
    pipe, run = TRANSFORMERS[name]()
    plain = run()
    agentsd.apply_patch(pipe, seed=0)
    transformer_alone = run()
    agentsd.apply_patch(pipe, seed=0, patch_controlnet=True)
    both = run()
    assert not torch.equal(both, transformer_alone)
    assert distance(both, plain) < 0.5
    assert not any(layer.note for layer in agentsd.report(pipe).patched)
    agentsd.remove_patch(pipe)
    assert torch.equal(run(), plain)


def test_a_controlnet_that_is_given_tokens_has_the_grid_of_its_condition():
    """Without a pipeline, which gives it the transformer's positions, it is the caller who embeds latents."""
    net, generator = seen(sd3_controlnet_of_tokens()), torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(2, *shape, generator=generator)
    latents, embed = draw(4, 16, 24), make_transformer("sd3").pos_embed
    inputs = {"controlnet_cond": draw(4, 16, 24), "timestep": torch.tensor([601.0, 601.0])}
    inputs["pooled_projections"] = draw(POOLED_CHANNELS)
    outputs = {}
    for positions, x in ((None, embed(latents)), (embed, latents)):
        net.pos_embed = positions
        plain = net(x, **inputs).controlnet_block_samples
        agentsd.apply_patch(net, seed=0)
        outputs[positions] = net(x, **inputs).controlnet_block_samples
        assert agentsd.report(net).latent_size == (16, 24)
        agentsd.remove_patch(net)
        assert not any(torch.equal(x, y) for x, y in zip(outputs[positions], plain, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(*outputs.values(), strict=True))


def test_one_net_for_two_images():
    pipe, run = PIPELINES["several ControlNets"]()
    pipe.controlnet.nets[1] = pipe.controlnet.nets[0]
    plain = run()
    agentsd.apply_patch(pipe, seed=0, patch_controlnet=True)
    assert not torch.equal(run(), plain)
    agentsd.remove_patch(pipe)
    assert torch.equal(run(), plain)
    assert not any(module._forward_pre_hooks for module in pipe.controlnet.modules())


def test_where_whole_calls_are_left_alone_a_controlnet_is_and_it_is_said():
    pipe, _ = PIPELINES["ControlNet"]()
    with pytest.warns(UserWarning, match="patch_controlnet=True changes nothing"):
        agentsd.apply_patch(pipe, preset="balanced", cache_tolerance=0.3, cache_budget=0.5, patch_controlnet=True)
    assert not any(module._forward_pre_hooks for module in pipe.controlnet.modules())


def test_a_pipeline_without_one():
    pipe, _ = PIPELINES["text to image"]()
    with pytest.raises(ValueError, match="has no ControlNet"):
        agentsd.apply_patch(pipe, patch_controlnet=True)


def test_a_compiled_controlnet_notices_the_patch():
    pipe, run = PIPELINES["ControlNet"]()
    agentsd.apply_patch(pipe, seed=0, patch_controlnet=True)
    expected = run()
    agentsd.remove_patch(pipe)
    pipe.controlnet.compile(backend="eager")
    run()
    agentsd.apply_patch(pipe, seed=0, patch_controlnet=True)
    torch.testing.assert_close(run(), expected)
    agentsd.remove_patch(pipe)
    torch._dynamo.reset()
