"""Pipelines of transformers whose features alone are reused, tiny and with random weights."""

from __future__ import annotations

from functools import partial

import diffusers
import torch
from conftest import TEXT_LENGTH
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny_transformers import make_transformer
from zoo import make_vae, picture, runner
from zoo_transformers import BOTH, _embeddings

MASK = torch.ones(1, TEXT_LENGTH)
PHOTO = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
BLOCKS = {"encoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 8)}


def _vae(kind: str):
    torch.manual_seed(0)
    if kind == "qwen":
        sizes = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
        return diffusers.AutoencoderKLQwenImage(**sizes, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    if kind == "flux2":
        blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
        sizes = {"block_out_channels": (8,), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
        return diffusers.AutoencoderKLFlux2(**blocks, **sizes, mid_block_add_attention=False)
    if kind == "sana":
        both = BLOCKS | {"encoder_qkv_multiscales": ((), (5,)), "encoder_layers_per_block": (1, 1)}
        both |= {name.replace("encoder", "decoder"): value for name, value in both.items()}
        return diffusers.AutoencoderDC(**both, latent_channels=4, attention_head_dim=2, downsample_block_type="conv")
    vae = make_vae(4)
    vae.register_to_config(shift_factor=0.1, scaling_factor=0.5)
    return vae


def _made(name: str, kind: str, guided: bool = True, **arguments):
    cls = getattr(diffusers, name)
    parts = dict.fromkeys(cls._get_signature_keys(cls)[0]) | {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    pipe = cls(**parts | {"transformer": make_transformer(kind), "vae": _vae(kind).eval()})
    pipe.set_progress_bar_config(disable=True)
    texts = _embeddings(*BOTH[: 1 + guided])
    if kind == "qwen":
        texts |= {f"{name}_mask": MASK.long() for name in texts} | {"true_cfg_scale": 3.0, "guidance_scale": None}
    if kind in ("chroma", "sana"):
        texts |= {name.replace("embeds", "attention_mask"): MASK for name in texts}
    if kind == "sana":
        texts |= {"negative_prompt": None, "use_resolution_binning": False}
    return pipe, runner(pipe, **{"prompt": None} | texts | arguments)


QWEN = {"height": 32, "width": 32, "output_type": "latent"}
REUSED = {  # older versions of diffusers do not have all of them
    "Qwen-Image": partial(_made, "QwenImagePipeline", "qwen", **QWEN),
    "Qwen-Image image to image": partial(_made, "QwenImageImg2ImgPipeline", "qwen", image=PHOTO, strength=0.8, **QWEN),
    "Qwen-Image Edit": partial(_made, "QwenImageEditPipeline", "qwen", image=PHOTO, **QWEN),
    "FLUX.2": partial(_made, "Flux2Pipeline", "flux2", guided=False),
    "FLUX.2, reference images": partial(_made, "Flux2Pipeline", "flux2", guided=False, image=PHOTO),
    "FLUX.2 klein": partial(_made, "Flux2KleinPipeline", "flux2"),
    "FLUX.2 klein, reference images": partial(_made, "Flux2KleinPipeline", "flux2", image=PHOTO),
    "FLUX.2 klein, kept keys": partial(_made, "Flux2KleinKVPipeline", "flux2", guided=False, image=PHOTO),
    "Chroma": partial(_made, "ChromaPipeline", "chroma"),
    "Chroma image to image": partial(_made, "ChromaImg2ImgPipeline", "chroma", image=picture(), strength=0.8),
    "Sana": partial(_made, "SanaPipeline", "sana", height=32, width=32),
}
