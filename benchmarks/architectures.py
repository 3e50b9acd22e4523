"""The pipelines that are measured: real architectures with random weights, or any Stable Diffusion of diffusers."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
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
TINY = {"norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 1, "layers_per_block": 1}
TINY_XL = {
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 56,
    "transformer_layers_per_block": (1, 2, 2),
}
# the same layouts with next to no arithmetic: for tests, and for what the host takes
ARCHITECTURES["tiny"] = {**ARCHITECTURES["sd15"], **TINY, "block_out_channels": (8, 8, 8, 8)}
ARCHITECTURES["tiny-xl"] = {**ARCHITECTURES["sdxl"], **TINY, **TINY_XL, "block_out_channels": (8, 8, 8)}

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def load_pipeline(model: str, dtype: torch.dtype, device: str, scheduler: str | None = None) -> Any:
    """An architecture by name, with random weights, or else what diffusers finds; None: with its own scheduler."""
    if model in ARCHITECTURES:
        pipe = random_pipeline(ARCHITECTURES[model], dtype, device)
    else:
        pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype).to(device)
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_pipeline(config: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    """An architecture by its name, with random weights, or else what diffusers finds; with its own scheduler."""
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    unet = torch.nn.Module.to(unet, dtype).to_empty(device=device).eval()  # that of diffusers warns
    for name, parameter in unet.named_parameters():
        if "norm" in name:
            torch.nn.init.constant_(parameter, float(name.endswith("weight")))
        else:
            torch.nn.init.normal_(parameter, std=0.02)
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS)
    if unet.config.addition_embed_type == "text_time":
        return StableDiffusionXLPipeline(None, None, None, None, None, unet, scheduler, add_watermarker=False)
    return StableDiffusionPipeline(None, None, None, unet, scheduler, None, None, requires_safety_checker=False)


def pooled_width(config: Any) -> int:
    """Of the pooled text embedding that SDXL takes beside six numbers; 0 where there is none."""
    if config.addition_embed_type != "text_time":
        return 0
    return int(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)


def random_inputs(pipe: Any, images: int, size: int, guidance: float) -> dict[str, Any]:
    """Arguments of a call of the pipeline that draws ``images`` latents of ``size`` x ``size`` pixels."""
    config, like = pipe.unet.config, next(pipe.unet.parameters())
    draw = lambda *shape: torch.randn(images, *shape).to(like)
    inputs: dict[str, Any] = {"height": size, "width": size, "guidance_scale": guidance, "output_type": "latent"}
    inputs["latents"] = draw(config.in_channels, size // 8, size // 8)
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        inputs[name] = draw(77, config.cross_attention_dim)
        if width := pooled_width(config):
            inputs[name.replace("prompt", "pooled_prompt")] = draw(width)
    return inputs
