"""What the examples share: their arguments, a loaded pipeline, and the arguments of its call."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import agentsd
from agentsd.cli.pipelines import default_device, precision

EXAMPLES = Path(__file__).parent
DEVICE = default_device()
DTYPE = torch.float32 if DEVICE == "cpu" else torch.float16


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every example takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EXAMPLES / "demo_model"), help="model id or folder")
    parser.add_argument("--prompt", default="red apple on a blue background")
    parser.add_argument("--preset", default="balanced", choices=agentsd.PRESETS, help="default: balanced")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (default: 25)")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out.png"), help="the picture (default: out.png)")
    return parser


def load(pipeline: Any, args: argparse.Namespace, **components: Any) -> Any:
    """The pipeline of ``--model``, on the fastest device there is."""
    return pipeline.from_pretrained(args.model, **precision(DTYPE), **components).to(DEVICE)


def call(args: argparse.Namespace) -> dict[str, Any]:
    """What every call of a pipeline takes. A generator of the CPU gives the same image on every device."""
    return {
        "prompt": args.prompt,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "generator": torch.Generator().manual_seed(args.seed),
    }


def save(image: Any, args: argparse.Namespace) -> None:
    image.save(args.out)
    print(f"-> {args.out}")


def small_sdxl() -> StableDiffusionXLPipeline:
    """Every part of SDXL, small: the demo model's autoencoder and words, the rest with random weights."""
    torch.manual_seed(0)
    demo = EXAMPLES / "demo_model"
    tokenizer = CLIPTokenizer.from_pretrained(demo, subfolder="tokenizer")
    text = CLIPTextConfig.from_pretrained(demo, subfolder="text_encoder", projection_dim=64)
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=2 * text.hidden_size,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=64 + 6 * 16,
    )
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(demo, subfolder="vae"),
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler.from_pretrained(demo, subfolder="scheduler"),
    ).to(DEVICE, torch.float32)
