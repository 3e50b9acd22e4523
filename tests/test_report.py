"""The report says what happens."""

import json
from xml.etree import ElementTree

import pytest
import torch
from conftest import make_unet, unet_inputs
from diffusers.models.attention_processor import AttnProcessor2_0

import agentsd
from agentsd.matching import bipartite_soft_matching, partition
from agentsd.merge import merge, unmerge
from agentsd.planner import BlockPlan


def test_an_unpatched_model():
    report = agentsd.report(make_unet())
    assert str(report) == "agentsd: not patched."
    assert repr(report) == "<agentsd.Report: 0 of 4 transformer blocks patched>"


def test_table():
    unet = agentsd.apply_patch(make_unet())
    report = agentsd.report(unet)
    text = str(report)
    assert "3 of 4 transformer blocks patched, ratio 0.4, for 16x16 latents" in text
    assert "16x16 = 256  154 tokens, 16 agents (attention costs 8%)  154 tokens (attention costs 36%)" in text
    assert "not patched, lower resolution (downsampling 2)" in text
    assert max(map(len, text.splitlines())) < 250
    assert [layer.name.split(".")[0] for layer in report.patched] == ["down_blocks", "up_blocks", "up_blocks"]


def test_it_follows_the_size_of_the_last_call():
    unet = agentsd.apply_patch(make_unet())
    unet(**unet_inputs(height=20, width=28))
    assert agentsd.report(unet).latent_size == (20, 28)
    assert agentsd.report(unet).patched[0].phases["merge"].tokens == 20 * 28


def test_where_agents_cannot_be_used_it_says_so():
    unet = agentsd.apply_patch(make_unet(), agent_ratio=0.5)
    assert "no agents: too few tokens are merged away" in str(agentsd.report(unet))

    class Custom(AttnProcessor2_0):
        pass

    unet = agentsd.apply_patch(make_unet())
    unet.set_attn_processor(Custom())
    text = str(agentsd.report(unet))
    assert "no agents: Custom is kept and gets merged tokens" in text


def test_data():
    unet = agentsd.apply_patch(make_unet(), agent_steps=0)
    data = agentsd.report(unet).to_dict()
    json.dumps(data)
    assert data["settings"]["ratio"] == 0.4
    assert data["layers"][0]["phases"]["merge"] == {"tokens": 256, "merged": 102, "agents": 0, "keys": 0}


def test_cost_is_that_of_the_products():
    phases = agentsd.report(agentsd.apply_patch(make_unet())).patched[0].phases
    assert phases["merge"].attention_cost == 154**2 / 256**2
    assert phases["agent"].attention_cost == 2 * 154 * 16 / 256**2


def test_it_says_what_is_not_merged():
    with pytest.warns(UserWarning, match="changes nothing"):
        unet = agentsd.apply_patch(make_unet(), merge_attn=False)
    assert "0 of 4 transformer blocks patched" in str(agentsd.report(unet))
    text = str(agentsd.report(agentsd.apply_patch(make_unet(), merge_attn=False, merge_mlp=True)))
    assert "merging, first 40% of the steps" in text
    assert "no agents: self-attention is not merged" in text


def test_in_a_notebook_it_is_html():
    """The same words as the text, well-formed, and nothing of them taken for markup."""
    unet = agentsd.apply_patch(make_unet(), cache_interval=2)
    for report in (agentsd.report(unet), agentsd.report(make_unet())):
        root = ElementTree.fromstring(f"<div>{report._repr_html_()}</div>")
        assert "".join("".join(root.itertext()).split()) == "".join(str(report).split())
    assert len(root.findall(".//tr")) == 0

    class Odd(AttnProcessor2_0):
        pass

    Odd.__name__ = "<b>"
    unet = agentsd.apply_patch(make_unet())
    unet.set_attn_processor(Odd())
    assert "&lt;b&gt; is kept" in agentsd.report(unet)._repr_html_()


@pytest.mark.filterwarnings("ignore:agentsd. a layer")
def test_what_a_layer_was_left_alone_for_is_told_until_it_holds_no_longer():
    unet = agentsd.apply_patch(make_unet(), sample_kv=True)
    unet.fuse_qkv_projections()
    unet(**unet_inputs())
    assert "left alone: FusedAttnProcessor2_0 cannot sample" in str(agentsd.report(unet))
    unet.unfuse_qkv_projections()
    unet(**unet_inputs())
    assert "left alone" not in str(agentsd.report(unet))
    assert len(agentsd.report(unet).patched) == 3


def test_what_attention_costs_here_is_measured_when_asked_for(kind):
    """Of the layers that are patched, in each phase that changes them; the denoiser is as before."""
    unet = agentsd.apply_patch(make_unet(kind), ratio=0.4, seed=0)
    inputs = unet_inputs(kind)
    before = unet(**inputs).sample
    assert not any(layer.seconds for layer in agentsd.report(unet).layers)
    measured = agentsd.report(unet, measure=True)
    for layer in measured.layers:
        changed = {name for name, counts in layer.phases.items() if counts.changed}
        assert set(layer.seconds) == ({"unpatched", *changed} if layer.phases else set())
        assert all(seconds > 0 for seconds in layer.seconds.values())
    assert "measured: self-attention takes" in str(measured)
    assert torch.equal(unet(**inputs).sample, before)


def test_what_is_measured_is_what_a_call_computes():
    unet, x = make_unet(), torch.randn(2, 256, 16)
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    plain = attn(x)
    patch = agentsd.apply_patch(unet, ratio=0.4)._agentsd_patch
    block, phase = patch.blocks[0], patch.settings.merge
    plan = BlockPlan(phase.counts(16, 16), partition(16, 16, phase.sy, phase.sx))
    matching = bipartite_soft_matching(x, plan.partition).cut(plan.counts.merged)
    assert torch.equal(block.attend(attn, x, None), plain)
    assert torch.equal(block.attend(attn, x, plan), unmerge(attn(merge(x, matching)), matching))
