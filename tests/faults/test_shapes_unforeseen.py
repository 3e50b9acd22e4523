"""Layers that see other tokens than their place predicts are left alone, and it is said once."""

import pytest
import torch
import torch.nn.functional as F
from conftest import image, make_pipeline, make_scheduler, make_unet, unet_inputs
from diffusers import EulerDiscreteScheduler
from diffusers.models.attention import BasicTransformerBlock
from situations import SETTINGS, distance, sweep, warned

import agentsd

THREE_LEVELS = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
}


def deep_shrink(unet, until: float = 600, block: int = 1) -> None:
    """High-resolution fix: early on, features are halved behind the first down block and enlarged on the way up."""
    state = {}

    def read(unet, args, kwargs):
        state["t"] = float(args[1] if len(args) > 1 else kwargs["timestep"])

    def shrink(module, args, kwargs):
        if state["t"] <= until:
            return None
        half = lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear")
        if args:
            return (half(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": half(kwargs["hidden_states"])}

    def grow(module, args, kwargs):
        skips = kwargs["res_hidden_states_tuple"]
        size = skips[0].shape[-2:]
        fit = lambda x: x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear")
        fitted = {"hidden_states": fit(kwargs["hidden_states"]), "res_hidden_states_tuple": tuple(map(fit, skips))}
        return args, {**kwargs, **fitted}

    unet.register_forward_pre_hook(read, with_kwargs=True)
    unet.down_blocks[block].register_forward_pre_hook(shrink, with_kwargs=True)
    for up in unet.up_blocks:
        up.register_forward_pre_hook(grow, with_kwargs=True)


@pytest.mark.parametrize("most", sweep([None, 2], [None]))
@pytest.mark.parametrize("name", sweep(SETTINGS))
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_deep_shrink(kind, name, most):
    """Images are made, near the unpatched ones, and twice the same; no warning comes twice."""
    overrides = THREE_LEVELS if kind == "sd15" else {}
    pipe = make_pipeline(kind, make_scheduler(EulerDiscreteScheduler), **overrides)
    deep_shrink(pipe.unet)
    draw = lambda: image(pipe, steps=6, height=24, width=24)
    plain = draw()
    agentsd.apply_patch(pipe, **SETTINGS[name], max_downsample=most)
    with warned() as messages:
        found = [draw(), draw()]
    assert torch.equal(*found) and distance(found[0], plain) < 0.5
    assert len(messages) == len(set(messages))
    agentsd.remove_patch(pipe)
    assert torch.equal(draw(), plain)


def longer_attention(unet) -> None:
    """Try-on and garment transfer: self-attention is given a second image's tokens behind the first's."""
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):

            def forward(hidden_states, attention_mask=None, encoder_hidden_states=None, block=block, **_):
                x = block.norm1(hidden_states)
                x = hidden_states + block.attn1(torch.cat([x, x.flip(1)], 1))[:, : x.shape[1]]
                x = x + block.attn2(block.norm2(x), encoder_hidden_states=encoder_hidden_states)
                return x + block.ff(block.norm3(x))

            block.forward = forward


@pytest.mark.parametrize("order", ["before the patch", "after the patch"])
@pytest.mark.parametrize("name", sweep(SETTINGS, ["agents", "sampling"]))
def test_attention_over_more_tokens_than_the_block_has(name, order):
    """Such a layer runs unpatched, and one warning a layer says so."""
    unet, bare = make_unet(), make_unet()
    longer_attention(bare)
    calls = [unet_inputs(timestep=t) for t in (801, 780, 101)]
    plain = torch.cat([bare(**call).sample for call in calls])
    if order == "before the patch":
        longer_attention(unet)
    agentsd.apply_patch(unet, **SETTINGS[name])
    if order == "after the patch":
        longer_attention(unet)
    with warned() as messages:
        found = torch.cat([unet(**call).sample for call in calls])
    assert distance(found, plain) < 0.5 and len(messages) == len(set(messages))
    if name in ("agents", "sampling"):  # self-attention alone would have changed
        assert torch.equal(found, plain) and messages


SHAPES = {
    "another way of downsampling": {
        "down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "downsampling without padding": {
        "downsample_padding": 0,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    },
    "three levels": THREE_LEVELS,
}


@pytest.mark.parametrize(("height", "width"), sweep([(16, 16), (17, 17), (17, 19), (15, 18)], [(17, 19)]))
@pytest.mark.parametrize("name", sweep(SETTINGS))
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_latents(shape, name, height, width):
    """Whatever the layers make of an odd size, the grid is theirs or they are left alone."""
    unet = make_unet(**SHAPES[shape])
    calls = [unet_inputs(timestep=t, height=height, width=width) for t in (900, 880, 100)]
    plain = torch.cat([unet(**call).sample for call in calls])
    agentsd.apply_patch(unet, **SETTINGS[name], max_downsample=4)
    with warned() as messages:
        found = torch.cat([unet(**call).sample for call in calls])
    assert 0 < distance(found, plain) < 0.5
    assert len(messages) == len(set(messages))
    agentsd.remove_patch(unet)
    assert torch.equal(torch.cat([unet(**call).sample for call in calls]), plain)


def test_a_warning_names_the_layer_and_what_it_got():
    """It asks nobody to report a UNet that is only used in another way."""
    unet = make_unet()
    longer_attention(unet)
    agentsd.apply_patch(unet, agent_steps=0)
    with warned() as messages:
        unet(**unet_inputs())
    assert messages and all("down_blocks" in m or "up_blocks" in m for m in messages)
    assert not any("Feed-forward chunking" in m or "report it" in m for m in messages)


def test_layers_left_alone_for_a_call_are_patched_in_the_next():
    """A layer that stood aside once is patched again where its tokens are those of its place."""
    unet = make_unet("sdxl")
    inputs = {**unet_inputs("sdxl"), "timestep": 100}
    expected = agentsd.apply_patch(make_unet("sdxl"), seed=0)(**inputs).sample
    deep_shrink(unet)
    agentsd.apply_patch(unet, seed=0)
    unet(**{**unet_inputs("sdxl", height=24, width=24), "timestep": 900})
    assert torch.equal(unet(**inputs).sample, expected)
