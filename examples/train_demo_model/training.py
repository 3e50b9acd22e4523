"""What the trainers of the denoisers share: latents with their captions, text encoders, averaged weights, saving."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image
from safetensors.torch import load_file, save_file
from scenes import BACKGROUNDS, CANVAS, PLACES, SIZES, Scene, Scenes, to_tensor
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTokenizer, PreTrainedModel

MAX_TOKENS = 24
PREVIEW = [
    "red apple on a blue background",
    "small rocket on a yellow background, left",
    "cat on a pink background",
    "pizza on a white background, right, mirrored",
    "small frog on a purple background, top",
    "house on an orange background",
    "hamburger on a gray background, bottom",
    "blue heart on a yellow background",
    "penguin on a white background",
    "small rainbow on a green background, right",
    "robot on a blue background",
    "strawberry on a pink background, top",
    "banana on a purple background",
    "small dog on a green background, bottom",
    "sailboat on a white background",
    "ice cream on a blue background, left",
    "owl on an orange background, mirrored",
    "small palm tree on a pink background",
    "sun on a gray background, right",
    "guitar on a yellow background",
    "cactus on a white background, top",
    "small red car on a blue background, mirrored",
    "sunflower on a green background",
    "cup of coffee on a purple background, left",
]


@dataclass
class Data:
    """Scaled latents of every trained scene, (S, 4, h, w), and the token ids of its two captions and of no caption."""

    latents: torch.Tensor
    captions: torch.Tensor
    names: torch.Tensor
    empty: torch.Tensor

    @classmethod
    @torch.no_grad()
    def load(
        cls, scenes: Scenes, vae: AutoencoderKL, tokenizer: CLIPTokenizer, canvas: int, cache: Path | None = None
    ) -> Data:
        """Everything on the autoencoder's device. ``cache``: a file to keep the latents in, read where it exists."""
        places = PLACES if canvas == CANVAS else ("",)
        every = [Scene(*x) for x in product(scenes.things, BACKGROUNDS, places, SIZES, (False, True))]
        trained = [scene for scene in every if not scene.held_out]
        if cache and cache.exists():
            latents = torch.load(cache, map_location=vae.device)
        else:
            chunks = []
            for i in tqdm(range(0, len(trained), 64), "latents", mininterval=10):
                images = to_tensor([scenes.render(scene, canvas) for scene in trained[i : i + 64]]).to(vae.device)
                chunks.append(vae.encode(images).latent_dist.mode().mul(vae.config.scaling_factor).half())
            latents = torch.cat(chunks)
            if cache:
                torch.save(latents, cache)
        ids = lambda texts: tokenizer(texts, padding="max_length", return_tensors="pt").input_ids.to(vae.device)
        return cls(latents, ids([s.caption for s in trained]), ids([s.thing for s in trained]), ids([""]))

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """A quarter mirrored; a tenth without a caption, for guidance, and a tenth with the thing's name alone."""
        where = {"generator": generator, "device": generator.device}
        mirrored = torch.rand(size, **where) < 0.25
        picked = 2 * torch.randint(len(self.latents) // 2, (size,), **where) + mirrored
        kind = torch.rand(size, 1, **where)
        ids = torch.where(kind < 0.8, self.captions[picked], self.names[picked])
        return self.latents[picked].float(), torch.where(kind < 0.9, ids, self.empty)


def text_encoder_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def spread_words(text_encoder: PreTrainedModel) -> PreTrainedModel:
    """transformers' CLIP initialisation assumes pretraining at scale: its word vectors are too small to learn from."""
    torch.nn.init.normal_(text_encoder.get_input_embeddings().weight, std=0.5)
    return text_encoder


@torch.no_grad()
def update_average(average: torch.nn.Module, nets: torch.nn.Module, step: int) -> None:
    """Exponentially averaged weights, of fewer steps at the start: after step 0 those of ``nets``."""
    decay = min(0.999, 1 - (1 + step) ** -0.75)
    torch._foreach_lerp_(list(average.parameters()), list(nets.parameters()), 1 - decay)


def write_checkpoint(state: dict[str, Any], path: Path) -> None:
    """In one stroke, so that an interruption leaves the previous one."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def save(pipe: DiffusionPipeline, folder: Path) -> None:
    """As diffusers does it, and such that transformers 4 finds the words and the text encoders' weights, too."""
    pipe.save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        if name in pipe.components:
            tokenizer = pipe.components[name]
            if hasattr(tokenizer, "backend_tokenizer"):
                tokenizer.backend_tokenizer.model.save(os.fspath(folder / name))
            else:  # before transformers 5
                tokenizer.save_vocabulary(os.fspath(folder / name))
    for name in ("text_encoder", "text_encoder_2"):
        if name in pipe.components:
            weights = folder / name / "model.safetensors"
            kept = ("text_model.", "text_projection.")
            prefixed = {n if n.startswith(kept) else f"text_model.{n}": w for n, w in load_file(weights).items()}
            save_file(prefixed, weights, metadata={"format": "pt"})


def preview(pipe: DiffusionPipeline, prompts: list[str], **call: Any) -> Image.Image:
    """A grid of two rows, the noise of each prompt its own."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    images = pipe(prompts, generator=generators, **call).images
    return make_image_grid(images, 2, len(prompts) // 2)
