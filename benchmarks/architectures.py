"""The UNets whose speed is measured: real configurations with random weights, or any model of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "sample_size": 64,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def load_unet(model: str, dtype: torch.dtype, device: str) -> UNet2DConditionModel:
    """By the name of an architecture, with random weights, or else as diffusers finds it."""
    if model not in ARCHITECTURES:
        return UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=dtype).to(device).eval()
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**ARCHITECTURES[model])
    unet = unet.to(dtype).to_empty(device=device).eval()
    for name, parameter in unet.named_parameters():
        if "norm" in name:
            torch.nn.init.constant_(parameter, float(name.endswith("weight")))
        else:
            torch.nn.init.normal_(parameter, std=0.02)
    return unet


def random_inputs(unet: UNet2DConditionModel, batch: int, size: int) -> dict[str, Any]:
    like = next(unet.parameters())
    draw = lambda *shape: torch.randn(batch, *shape).to(like)
    channels = unet.config.cross_attention_dim
    inputs: dict[str, Any] = {
        "sample": draw(unet.config.in_channels, size // 8, size // 8),
        "encoder_hidden_states": draw(77, channels),
    }
    if unet.config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {"text_embeds": draw(1280), "time_ids": draw(6)}
    return inputs


def flops(unet: UNet2DConditionModel, batch: int, size: int) -> dict[str, float]:
    """Of an unpatched call, by torch's own counter: all of it, and the self-attention's products at each token count.

    Counted without computing, on a copy without memory.
    """
    with torch.device("meta"):
        empty = UNet2DConditionModel.from_config(unet.config).eval()
        inputs = random_inputs(empty, batch, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        empty(timestep=torch.zeros((), device="meta"), **inputs)
    attention: dict[str, float] = {}
    for name, module in empty.named_modules():
        if name.endswith("attn1"):
            key = f"{type(empty).__name__}.{name}"
            ops = counter.get_flop_counts().get(key, {})
            products = sum(count for op, count in ops.items() if "bmm" in str(op) or "attention" in str(op))
            level = f"self-attention, {module.to_q.in_features} channels"
            attention[level] = attention.get(level, 0.0) + products
    return {"total": float(counter.get_total_flops()), **attention}
