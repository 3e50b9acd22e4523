"""The pipelines that are measured: real architectures with random weights, or any text to image of diffusers."""

from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from agentsd.cli.pipelines import from_pretrained

# each the configuration of a denoiser, as diffusers has it in a model's folder
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd15": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "_class_name": "UNet2DConditionModel",
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
    "sd3-medium": {
        "_class_name": "SD3Transformer2DModel",
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    },
    "sd35-large": {
        "_class_name": "SD3Transformer2DModel",
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
    "flux": {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
    "pixart": {"_class_name": "PixArtTransformer2DModel", "use_additional_conditions": False},
}
TINY = {"norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 1, "layers_per_block": 1}
TINY_XL = {
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 56,
    "transformer_layers_per_block": (1, 2, 2),
}
HEADS = {"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 8}
TINY_SD3 = {**HEADS, "joint_attention_dim": 8, "caption_projection_dim": 16, "pooled_projection_dim": 8}
TINY_FLUX = {**HEADS, "joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4)}
# the same layouts with next to no arithmetic: for tests, and for what the host takes
ARCHITECTURES["tiny"] = {**ARCHITECTURES["sd15"], **TINY, "block_out_channels": (8, 8, 8, 8)}
ARCHITECTURES["tiny-xl"] = {**ARCHITECTURES["sdxl"], **TINY, **TINY_XL, "block_out_channels": (8, 8, 8)}
ARCHITECTURES["tiny-sd3"] = {**ARCHITECTURES["sd3-medium"], **TINY_SD3}
ARCHITECTURES["tiny-flux"] = {**ARCHITECTURES["flux"], **TINY_FLUX, "num_single_layers": 2}
ARCHITECTURES["tiny-pixart"] = {**ARCHITECTURES["pixart"], **HEADS, "cross_attention_dim": 16, "caption_channels": 8}

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "flow": "FlowMatchEulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
FLOW: tuple[str, dict[str, Any]] = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
# of a denoiser, the pipeline, and the scheduler with its configuration
PIPELINES = {
    "UNet2DConditionModel": ("StableDiffusionPipeline", "EulerDiscreteScheduler", BETAS),
    "SD3Transformer2DModel": ("StableDiffusion3Pipeline", *FLOW),
    "FluxTransformer2DModel": ("FluxPipeline", *FLOW),
    "PixArtTransformer2DModel": ("PixArtSigmaPipeline", "DPMSolverMultistepScheduler", {}),
}
TEXT_TOKENS = {"SD3Transformer2DModel": 77 + 256, "FluxTransformer2DModel": 512, "PixArtTransformer2DModel": 300}


def load_pipeline(model: str, dtype: torch.dtype, device: str, scheduler: str | None = None) -> Any:
    """An architecture by name, with random weights, or else what diffusers finds; None: with its own scheduler."""
    if model in ARCHITECTURES:
        pipe = random_pipeline(ARCHITECTURES[model], dtype, device)
    else:
        pipe = from_pretrained(model, dtype).to(device)
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser(pipe: Any) -> Any:
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def random_pipeline(config: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    """The pipeline of a denoiser of this configuration, with random weights and nothing else but a scheduler."""
    torch.manual_seed(0)
    with torch.device("meta"):
        net = getattr(diffusers, config["_class_name"]).from_config(config)
    net = nn.Module.to(net, dtype).to_empty(device=device).eval()  # that of diffusers warns
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if "norm" in name:
            nn.init.constant_(tensor, float(name.endswith("weight")))
        else:
            nn.init.normal_(tensor, std=0.02)
    name, scheduler, options = PIPELINES[config["_class_name"]]
    if config.get("addition_embed_type") == "text_time":
        name = "StableDiffusionXLPipeline"
    kind = getattr(diffusers, name)
    parts, more = kind._get_signature_keys(kind)
    given = dict.fromkeys(parts) | dict.fromkeys(
        {"requires_safety_checker", "add_watermarker"}.intersection(more), False
    )
    given["scheduler"] = getattr(diffusers, scheduler)(**options)
    return kind(**given | {"transformer" if "transformer" in parts else "unet": net})


def shapes(net: Any, size: int) -> dict[str, tuple[int, ...]]:
    """Of the latents and the embedded text of an image of ``size`` x ``size`` pixels, as a pipeline calls them."""
    config, side, tokens = net.config, size // 8, TEXT_TOKENS.get(type(net).__name__, 77)
    given: dict[str, tuple[int, ...]] = {"latents": (config.in_channels, side, side)}
    if type(net).__name__ == "FluxTransformer2DModel":
        given["latents"] = ((side // 2) ** 2, config.in_channels)
    widths = [config.get(name) for name in ("joint_attention_dim", "caption_channels", "cross_attention_dim")]
    given["prompt_embeds"] = (tokens, next(filter(None, widths)))
    pooled = config.get("pooled_projection_dim")
    if config.get("addition_embed_type") == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    if pooled:
        given["pooled_prompt_embeds"] = (pooled,)
    return given


def random_inputs(pipe: Any, samples: int, size: int) -> dict[str, Any]:
    """Arguments of a call of the pipeline that draws latents of ``size`` x ``size`` pixels.

    Its denoiser calls have so many ``samples``: two an image, or 1, which is without guidance. Flux has learnt what
    guidance does, and has one sample an image.
    """
    net = denoiser(pipe)
    kind, like = type(net).__name__, next(net.parameters())
    distilled = kind == "FluxTransformer2DModel"
    guided = samples > 1 and not distilled
    images = samples // 2 if guided else samples
    inputs: dict[str, Any] = {"height": size, "width": size, "output_type": "latent"}
    inputs["guidance_scale"] = 7.5 if guided else 3.5 if distilled else 1.0
    for name, shape in shapes(net, size).items():
        inputs[name] = torch.randn(images, *shape).to(like)
        if guided and name != "latents":
            inputs[f"negative_{name}"] = torch.randn(images, *shape).to(like)
    if kind == "PixArtTransformer2DModel":
        masks = [f"{name}prompt_attention_mask" for name in ("", "negative_")[: 1 + guided]]
        inputs |= {name: torch.ones(images, TEXT_TOKENS[kind], device=like.device) for name in masks}
        inputs |= {"negative_prompt": None, "use_resolution_binning": False}
    return inputs


def denoiser_inputs(net: Any, size: int, timestep: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call of the denoiser itself with one sample, by position and by name: tensors without data."""
    given = {name: torch.empty(1, *shape, device="meta") for name, shape in shapes(net, size).items()}
    latents, text, pooled = given["latents"], given["prompt_embeds"], given.get("pooled_prompt_embeds")
    kind, named = type(net).__name__, {"encoder_hidden_states": text, "timestep": timestep.expand(1)}
    if kind == "UNet2DConditionModel":
        added = {} if pooled is None else {"text_embeds": pooled, "time_ids": torch.empty(1, 6, device="meta")}
        return (latents, timestep), {"encoder_hidden_states": text, "added_cond_kwargs": added}
    if kind == "PixArtTransformer2DModel":
        return (latents,), {**named, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    named["pooled_projections"] = pooled
    if kind == "FluxTransformer2DModel":
        side = torch.arange(size / 16)
        named |= {
            "img_ids": torch.cartesian_prod(torch.zeros(1), side, side),
            "txt_ids": torch.zeros(text.shape[1], 3),
        }
        named |= {"timestep": named["timestep"] / 1000, "guidance": torch.ones(1)}
    return (latents,), named
