"""Sampled keys and values: every token attends to one token of each cell."""

import warnings

import pytest
import torch
from conftest import image, make_pipeline, make_unet, unet_inputs
from diffusers.models.attention_processor import Attention

import agentsd
from agentsd.hosts import UNet
from agentsd.schedule import Counts, Phase
from agentsd.settings import Settings

SAMPLED = {"sample_kv": True, "sx": 2, "sy": 2, "agent_sx": 2, "agent_sy": 4}


def first_attention(unet) -> Attention:
    site = next(s for s in UNet().sites(unet) if s.name in {layer.name for layer in agentsd.report(unet).patched})
    return unet.get_submodule(site.name).attn1


def test_every_token_attends_to_the_top_left_token_of_each_cell(kind):
    unet = agentsd.apply_patch(make_unet(kind), **SAMPLED, use_rand=False)
    attn, seen = first_attention(unet), []
    attn.register_forward_hook(lambda _, args, kwargs, output: seen.append((args[0], output)), with_kwargs=True)
    unet(**unet_inputs(kind, timestep=1))
    x, output = seen[0]
    side = int(x.shape[1] ** 0.5)
    keys = x.unflatten(1, (side, side))[:, ::2, ::2].flatten(1, 2)
    agentsd.remove_patch(unet)
    torch.testing.assert_close(output, attn(x, encoder_hidden_states=keys))


def test_a_cell_of_one_token_changes_nothing():
    unet = make_unet()
    expected = unet(**unet_inputs()).sample
    agentsd.apply_patch(unet, sample_kv=True, sx=1, sy=1, agent_sx=1, agent_sy=1)
    with pytest.warns(UserWarning, match="changes nothing at this size"):
        assert torch.equal(unet(**unet_inputs()).sample, expected)


def test_the_draw_differs_between_steps_and_not_between_runs():
    pipe = make_pipeline()
    plain = image(pipe)
    agentsd.apply_patch(pipe, **SAMPLED, seed=0)
    first = image(pipe)
    assert not torch.equal(first, plain)
    assert torch.equal(first, image(pipe))
    agentsd.remove_patch(pipe)
    assert torch.equal(image(pipe), plain)


def test_each_token_of_a_cell_is_the_key_in_turn():
    """What one step leaves out, the next ones see: the noise of the draw cancels over them."""
    pipe, keys = make_pipeline(), []
    patch = agentsd.apply_patch(pipe, **SAMPLED | {"agent_sy": 2}, seed=0).unet._agentsd_patch
    look = lambda *_: keys.append([plan.partition.dst for plan in patch._now.call.blocks.values()])
    with pipe.unet.conv_in.register_forward_hook(look):
        image(pipe, num_inference_steps=8)
    for in_block in zip(*keys, strict=True):
        for four in (in_block[:4], in_block[4:]):
            assert torch.equal(torch.cat(four).sort().values, torch.arange(256, dtype=torch.int32))
        assert len({tuple(dst.tolist()) for dst in in_block}) == 8, "each round has a draw of its own"
    assert not torch.equal(keys[0][0], keys[0][1]), "and so has each block"


def test_cached_calls_take_turns_beside_merging_in_the_same_cells():
    """What is drawn for merging is not taken for theirs, though cells, blocks and steps are the same."""
    settings = {"ratio": 0.4, "agent_steps": 0, "cache_interval": 2, "cache_branch": 2, "seed": 0}
    drawn: dict[int, list] = {}
    for cell in (1, 2):
        pipe, drawn[cell] = make_pipeline(), []
        patch = agentsd.apply_patch(pipe, **settings, cache_cell=cell).unet._agentsd_patch
        look = lambda *_, c=cell, p=patch: drawn[c].append([b.partition.dst for b in p._now.call.blocks.values()])
        with pipe.unet.conv_in.register_forward_hook(look):
            image(pipe, steps=8)
    merging, sampling = drawn[1], drawn[2]
    assert all(
        torch.equal(a, b)
        for a, b in zip(merging[0::2], sampling[0::2], strict=True)
        for a, b in zip(a, b, strict=True)
    )
    for one, three in zip(sampling[1], sampling[3], strict=True):  # two turns of one round
        assert not set(one.tolist()) & set(three.tolist())


def test_a_fused_projection_is_left_alone_and_the_report_says_so():
    unet = make_unet()
    unet.fuse_qkv_projections()
    expected = unet(**unet_inputs()).sample
    agentsd.apply_patch(unet, **SAMPLED)
    assert torch.equal(unet(**unet_inputs()).sample, expected)
    assert "FusedAttnProcessor2_0 cannot sample keys and values" in str(agentsd.report(unet))


def test_a_mask_over_the_image_tokens_is_obeyed():
    unet = make_unet()
    block = agentsd.apply_patch(unet, **SAMPLED)._agentsd_patch.blocks[0]
    assert block._has_mask({"attention_mask": None}) is False
    with pytest.warns(UserWarning, match="attention_mask is made for all tokens"):
        assert block._has_mask({"attention_mask": torch.ones(1, 256)})
    assert not block._has_mask({"attention_mask": torch.ones(1, 5), "encoder_hidden_states": torch.ones(1, 5, 16)})


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["merging", "sampling"])
def test_masks_of_an_ip_adapter_are_none_of_self_attention_s(settings):
    """diffusers hands them to every attention layer, and all but cross-attention drop them."""
    unet = make_unet()
    masks = {"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 16, 16)]}}
    agentsd.apply_patch(unet, **settings, seed=0)
    expected = unet(**unet_inputs()).sample
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(unet(**unet_inputs(), **masks).sample, expected)


def test_counts():
    phase = Phase("merge", 2, 2, 0.4, sample_kv=True)
    assert phase.counts(8, 6) == Counts(48, 0, 0, keys=12)
    assert phase.counts(1, 6) == Counts(6, 0, 0)


def test_settings_of_merging_are_errors_beside_it():
    with pytest.raises(ValueError, match=r"ratio=0.5 is not allowed: .*sample_kv merges no token"):
        agentsd.apply_patch(make_unet(), 0.5, sample_kv=True)


def test_small_layers_are_left_alone():
    unet = agentsd.apply_patch(make_unet(), max_downsample=2, min_tokens=200)
    by_tokens = {layer.grid[0] * layer.grid[1]: layer for layer in agentsd.report(unet).layers}
    assert by_tokens[256].phases["merge"].merged > 0 and not by_tokens[256].note
    assert by_tokens[64].phases["merge"].merged == 0
    assert by_tokens[64].note == "unchanged: fewer tokens than min_tokens=200"


def test_by_default_layers_of_fewer_than_1024_tokens_are():
    unet, inputs = make_unet(), unet_inputs()
    plain = unet(**inputs).sample
    agentsd.apply_patch(unet, min_tokens=Settings().min_tokens)
    with pytest.warns(UserWarning, match=r"have 256 tokens and fewer, .* below min_tokens=1024 .* min_tokens=0"):
        assert torch.equal(unet(**inputs).sample, plain)
    assert not torch.equal(unet(**unet_inputs(height=32, width=32)).sample, plain)
    assert agentsd.report(unet).patched[0].phases["merge"].merged == int(0.4 * 1024)


def test_with_feature_reuse_small_layers_are_no_cause_to_warn():
    unet = agentsd.apply_patch(make_unet(), min_tokens=1024, cache_interval=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unet(**unet_inputs())
