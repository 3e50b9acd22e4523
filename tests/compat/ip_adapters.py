"""Tiny IP-Adapters with random weights: each is loaded as from a file, and gives what its pipeline is called with."""

from __future__ import annotations

from typing import Any

import torch
from conftest import TEXT_CHANNELS
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0 as SD3IPAdapter
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

CLIP_CHANNELS = 512
Arguments = dict[str, Any]


def into_unet(pipe) -> Arguments:
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    pipe.register_modules(image_encoder=CLIPVisionModelWithProjection(config))
    cross = [name for name in pipe.unet.attn_processors if "attn2" in name]
    widths = [pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features for name in cross]
    layers = {
        f"{2 * i + 1}.{part}.weight": torch.randn(width, TEXT_CHANNELS) * 0.05
        for i, width in enumerate(widths)
        for part in ("to_k_ip", "to_v_ip")
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": image_projection(), "ip_adapter": layers}])
    return {"ip_adapter_image_embeds": [torch.ones(2, 1, CLIP_CHANNELS)]}


def image_projection() -> dict[str, torch.Tensor]:
    return {
        "proj.weight": torch.randn(4 * TEXT_CHANNELS, CLIP_CHANNELS) * 0.02,
        "proj.bias": torch.zeros(4 * TEXT_CHANNELS),
        "norm.weight": torch.ones(TEXT_CHANNELS),
        "norm.bias": torch.zeros(TEXT_CHANNELS),
    }


def into_sd3(pipe) -> Arguments:
    net = pipe.transformer
    width = net.inner_dim
    projection = IPAdapterTimeImageProjection(8, width, 64, heads=1, num_queries=4, timestep_in_dim=16)
    each = [SD3IPAdapter(width, width, net.config.attention_head_dim, 64) for _ in net.attn_processors]
    layers = {f"{i}.{name}": weight for i, layer in enumerate(each) for name, weight in layer.state_dict().items()}
    net._load_ip_adapter_weights({"image_proj": projection.state_dict(), "ip_adapter": layers})
    return {"ip_adapter_image_embeds": torch.ones(2, 3, 8)}


def into_flux(pipe) -> Arguments:
    net, shapes = pipe.transformer, {"weight": (32, TEXT_CHANNELS), "bias": (32,)}
    layers = {
        f"{i}.{part}.{name}": torch.randn(shape) * 0.05
        for i in range(len(net.transformer_blocks))
        for part in ("to_k_ip", "to_v_ip")
        for name, shape in shapes.items()
    }
    net._load_ip_adapter_weights([{"image_proj": image_projection(), "ip_adapter": layers}])
    image = [torch.ones(1, 1, CLIP_CHANNELS)]
    return {"ip_adapter_image_embeds": image, "negative_ip_adapter_image_embeds": image}
