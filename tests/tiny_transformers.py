"""Tiny transformers of the real architectures, with random weights, and what a call of each is given."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import torch
import torch.nn.functional as F
from conftest import POOLED_CHANNELS, TEXT_CHANNELS, TEXT_LENGTH
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel

KINDS = ("sd3", "sd35", "flux", "pixart")
JOINT = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": TEXT_CHANNELS, "in_channels": 16}
# those whose attention is left as it is, by their classes
REUSED = {
    "qwen": ("QwenImageTransformer2DModel", JOINT | {"out_channels": 4, "num_layers": 4, "axes_dims_rope": (4, 6, 6)}),
    "flux2": (
        "Flux2Transformer2DModel",
        JOINT | {"num_layers": 2, "num_single_layers": 3, "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False},
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        JOINT
        | {"num_layers": 2, "num_single_layers": 3, "axes_dims_rope": (4, 6, 6)}
        | {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1},
    ),
    "sana": (
        "SanaTransformer2DModel",
        {"sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 4, "caption_channels": TEXT_CHANNELS}
        | {"attention_head_dim": 8, "num_attention_heads": 2, "cross_attention_head_dim": 8}
        | {"num_cross_attention_heads": 2, "cross_attention_dim": 16},
    ),
}
REUSED = {kind: made for kind, made in REUSED.items() if hasattr(diffusers, made[0])}
PACKED = ("flux", "qwen", "flux2", "chroma")  # latents are tokens, and timesteps are divided
SD3 = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_CHANNELS,
    "caption_projection_dim": 16,
    "pooled_projection_dim": POOLED_CHANNELS,
    "pos_embed_max_size": 24,
}
FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_CHANNELS,
    "pooled_projection_dim": POOLED_CHANNELS,
    "axes_dims_rope": (4, 6, 6),
}
PIXART = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "cross_attention_dim": 16,
    "caption_channels": TEXT_CHANNELS,
    "use_additional_conditions": False,
}


def make_transformer(kind: str, **overrides):
    torch.manual_seed(0)
    if kind in REUSED:
        name, config = REUSED[kind]
        net = getattr(diffusers, name)(**config | overrides)
    elif kind == "flux":
        net = FluxTransformer2DModel(**FLUX | overrides)
    elif kind == "pixart":
        net = PixArtTransformer2DModel(**PIXART | overrides)
    else:
        newer = {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"} if kind == "sd35" else {}
        net = SD3Transformer2DModel(**SD3 | newer | overrides)
    return net.eval()


def image_ids(rows: int, columns: int, image: int = 0) -> torch.Tensor:
    """Flux's positions of the tokens of an image, (N, 3)."""
    return torch.cartesian_prod(torch.tensor([image]), torch.arange(rows), torch.arange(columns)).float()


def transformer_inputs(kind: str, batch: int = 2, height: int = 16, width: int = 16) -> dict:
    """Keyword arguments of a call, but for the timestep; every sample differs."""
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(batch, *shape, generator=generator)
    inputs = {"hidden_states": draw(4, height, width), "encoder_hidden_states": draw(TEXT_LENGTH, TEXT_CHANNELS)}
    if kind in ("sd3", "sd35", "flux"):
        inputs["pooled_projections"] = draw(POOLED_CHANNELS)
    rows, columns, mask = height // 2, width // 2, torch.ones(batch, TEXT_LENGTH)
    if kind in PACKED:
        inputs["hidden_states"] = draw(rows * columns, 16)
    if kind == "qwen":
        inputs |= {"img_shapes": [[(1, rows, columns)]] * batch, "encoder_hidden_states_mask": mask.long()}
        if diffusers.__version__ < "0.37":
            inputs["txt_seq_lens"] = [TEXT_LENGTH] * batch
    elif kind in PACKED:
        ids = image_ids(rows, columns)
        axes = 4 if kind == "flux2" else 3
        inputs |= {"img_ids": F.pad(ids, (0, axes - 3)), "txt_ids": torch.zeros(TEXT_LENGTH, axes)}
    if kind == "sana":
        inputs["encoder_attention_mask"] = mask
    return inputs


def residuals(kind: str, batch: int = 2, tokens: int = 64, each: bool = False) -> dict:
    """What ControlNets add between the blocks: after each, or fewer than there are blocks, so each after several."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda count, width: [torch.randn(batch, tokens, width, generator=generator) for _ in range(count)]
    if kind in ("qwen", "sana"):
        tokens, width = (tokens, 32) if kind == "qwen" else (4 * tokens, 16)
        return {"controlnet_block_samples": draw(2, width)}
    if kind in ("flux", "chroma"):
        double, single = (2, 3) if each else (1, 2)
        return {"controlnet_block_samples": draw(double, 32), "controlnet_single_block_samples": draw(single, 32)}
    return {"block_controlnet_hidden_states": draw(4 if each else 2, 16)}


class Trajectory:
    """A pipeline's denoiser and its schedule, of steps so small that the inputs of all calls are the same."""

    def __init__(self, net, kind: str, steps: int = 8, calls: int = 1) -> None:
        timesteps = 601 - 1e-9 * torch.arange(steps, dtype=torch.float64)
        config = SimpleNamespace(num_train_timesteps=1000)
        self.scheduler = SimpleNamespace(timesteps=timesteps, order=1, num_inference_steps=steps, config=config)
        self.transformer, self.kind = net, kind

    def run(self, *calls: dict) -> list[list[torch.Tensor]]:
        """Each step makes these ``calls``: the outputs of a step, step by step."""
        return [[self.call(i, inputs) for inputs in calls] for i in range(len(self.scheduler.timesteps))]

    def call(self, step: int, inputs: dict) -> torch.Tensor:
        timestep = self.scheduler.timesteps[step].expand(len(inputs["hidden_states"]))
        return self.transformer(**inputs, timestep=timestep / 1000 if self.kind in PACKED else timestep).sample
