"""The token grids predicted for each block against those that a forward pass shows."""

import pytest
import torch
from conftest import make_unet
from diffusers import ControlNetModel, UNet2DConditionModel

import agentsd
from agentsd.hosts import UNet
from agentsd.processor import AgentAttnProcessor

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD21 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SIZES = [(512, 512), (768, 768), (1024, 1024), (832, 1216), (520, 712)]


def real_unet(config) -> UNet2DConditionModel:
    """A UNet of real size on the meta device: shapes without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, **config).eval()


def agents_of(attn) -> int:
    """How many agents the coming call of an attention layer has."""
    return attn.processor._now.running.handed.shape[1] if isinstance(attn.processor, AgentAttnProcessor) else 0


def call(unet, height, width, batch=2):
    with torch.device("meta"):
        inputs = {
            "sample": torch.empty(batch, 4, height, width),
            "timestep": 601,
            "encoder_hidden_states": torch.empty(batch, 77, unet.config.cross_attention_dim),
        }
        if unet.config.addition_embed_type:
            added = {"text_embeds": torch.empty(batch, 1280), "time_ids": torch.empty(batch, 6)}
            inputs["added_cond_kwargs"] = added
        return unet(**inputs).sample


@pytest.mark.parametrize(
    "config, patched, downsample", [(SD15, 5, 1), (SD21, 5, 1), (SDXL, 10, 2)], ids=["1.5", "2.1", "XL"]
)
@pytest.mark.parametrize("agent_steps", [0.0, 1.0], ids=["merge", "agent"])
def test_real_configurations_at_real_sizes(config, patched, downsample, agent_steps):
    unet = real_unet(config)
    agentsd.apply_patch(unet, agent_steps=agent_steps)
    layers = agentsd.report(unet).patched
    assert len(layers) == patched
    seen = {}
    for layer in layers:
        attn = unet.get_submodule(layer.name).attn1
        attn.register_forward_pre_hook(
            lambda m, args, name=layer.name: seen.update({name: (args[0].shape[1], agents_of(m))})
        )
    for height, width in SIZES:
        height, width = height // 8, width // 8
        assert call(unet, height, width).shape == (2, 4, height, width)
        for layer in agentsd.report(unet).patched:
            assert layer.grid == (-(-height // downsample), -(-width // downsample))
            (counts,) = layer.phases.values()
            tokens, agents = seen[layer.name]
            assert tokens == counts.remaining < layer.grid[0] * layer.grid[1]
            assert agents == (counts.agents if agent_steps else 0)


@pytest.mark.parametrize("padding", [1, 0])
@pytest.mark.parametrize("size", [(16, 16), (17, 23), (9, 30), (5, 5)])
def test_grids_are_those_of_a_forward_pass(size, padding):
    types = {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    unet = make_unet("sd15", downsample_padding=padding, **types)
    sites, seen = UNet().sites(unet), {}
    for site in sites:
        block = unet.get_submodule(site.name)
        block.register_forward_pre_hook(lambda m, args, name=site.name: seen.update({name: args[0].shape[1]}))
    if padding == 0 and size != (16, 16):
        size = (size[0] // 4 * 4, size[1] // 4 * 4)  # diffusers itself needs whole sizes there
    unet(torch.zeros(1, 4, *size), 1, torch.zeros(1, 5, 16))
    level_grids = UNet().grids(unet, *size)
    assert seen == {site.name: level_grids[site.level][0] * level_grids[site.level][1] for site in sites}
    assert [site.downsample for site in sites] == [1, 2, 4, 2, 2, 1, 1]


def test_sites_without_self_attention_are_named():
    unet = make_unet("sd15", only_cross_attention=(True, False))
    skipped = {site.name.split(".")[0]: site.skip for site in UNet().sites(unet)}
    assert skipped["down_blocks"] == "no self-attention"


def test_control_nets_have_sites():
    unet = make_unet()
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8,))
    assert [site.downsample for site in UNet().sites(controlnet)] == [1, 2]
