"""Every pipeline with a transformer of the compatibility table, tiny and with random weights."""

from __future__ import annotations

import diffusers
import torch
from conftest import POOLED_CHANNELS, TEXT_CHANNELS, TEXT_LENGTH, make_scheduler
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    SD3ControlNetModel,
)
from tiny_transformers import SD3, make_transformer
from zoo import MASK, PIPELINES, SIZE, make_vae, picture, runner

TEXTS = {"StableDiffusion3": ("", "_2", "_3"), "Flux": ("", "_2"), "PixArt": ("",)}


def _embeddings(*names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {name: (1, POOLED_CHANNELS) if "pooled" in name else (1, TEXT_LENGTH, TEXT_CHANNELS) for name in names}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


BOTH = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def _build(name: str, transformer, **parts):
    family = next(family for family in TEXTS if name.startswith(family))
    vae = make_vae(4 if family == "Flux" else transformer.config.in_channels)
    vae.register_to_config(shift_factor=0.1, scaling_factor=0.5)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    if family == "PixArt":
        scheduler = make_scheduler(DPMSolverMultistepScheduler)
    texts = dict.fromkeys(f"{part}{which}" for which in TEXTS[family] for part in ("text_encoder", "tokenizer"))
    shared = {"vae": vae, "transformer": transformer, "scheduler": scheduler, **texts}
    pipe = getattr(diffusers, name)(**shared | parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _sd3(name: str, kind: str = "sd35", parts=None, channels: int = 4, **arguments):
    pipe = _build(name, make_transformer(kind, in_channels=channels, out_channels=channels), **parts or {})
    return pipe, runner(pipe, prompt=None, **_embeddings(*BOTH), **arguments)


def _flux(name: str, parts=None, channels: int = 16, guided: bool = False, **arguments):
    pipe = _build(name, make_transformer("flux", in_channels=channels, out_channels=16), **parts or {})
    names = BOTH if guided else BOTH[::2]
    arguments |= {"true_cfg_scale": 3.0} if guided else {}
    return pipe, runner(pipe, prompt=None, **_embeddings(*names), **{"height": SIZE, "width": SIZE} | arguments)


def _pixart(name: str, **arguments):
    pipe = _build(name, make_transformer("pixart"))
    masks = {f"{name}prompt_attention_mask": torch.ones(1, TEXT_LENGTH) for name in ("", "negative_")}
    texts = {**_embeddings(*BOTH[:2]), **masks, "negative_prompt": None}
    return pipe, runner(pipe, prompt=None, use_resolution_binning=False, **texts, **arguments)


def seen(controlnet):
    """Its last layers start at zero."""
    torch.manual_seed(1)
    for name, parameter in controlnet.named_parameters():
        if "controlnet_" in name or name.startswith("pos_embed_input"):
            torch.nn.init.normal_(parameter, std=0.05)
    return controlnet.eval()


def sd3_controlnet(extra: int = 0) -> SD3ControlNetModel:
    net = make_transformer("sd3")
    return SD3ControlNetModel.from_transformer(net, num_layers=2, num_extra_conditioning_channels=extra)


def sd3_controlnet_of_tokens() -> SD3ControlNetModel:
    """As Stability's own for 3.5 large: it embeds no latents, reads no text, and its attention is over the image."""
    without = {"use_pos_embed": False, "pos_embed_type": None, "joint_attention_dim": None}
    return SD3ControlNetModel(**SD3 | without | {"num_layers": 2, "force_zeros_for_pooled_projection": False})


def _sd3_controlnet(name: str, net: SD3ControlNetModel, **arguments):
    pipe, run = _sd3(name, "sd3", {"controlnet": seen(net)}, **arguments)

    def seeded(**changes) -> torch.Tensor:
        """The pipeline draws the control image's latents from the global generator."""
        with torch.random.fork_rng():
            torch.manual_seed(4)
            return run(**changes)

    return pipe, seeded


def _flux_controlnet(name: str, **arguments):
    net = FluxControlNetModel.from_transformer(
        make_transformer("flux"), num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    )
    return _flux(name, {"controlnet": seen(net)}, control_image=picture(), **arguments)


IMAGE = {"image": picture(), "strength": 0.8}
INPAINTED = {**IMAGE, "mask_image": MASK}
CONTROL = {"channels": 32, "control_image": picture()}
TRANSFORMERS = {
    "Stable Diffusion 3": lambda: _sd3("StableDiffusion3Pipeline", "sd3"),
    "Stable Diffusion 3.5": lambda: _sd3("StableDiffusion3Pipeline"),
    "skip-layer guidance": lambda: _sd3(
        "StableDiffusion3Pipeline", skip_guidance_layers=[2], skip_layer_guidance_stop=0.9
    ),
    "SD 3 image to image": lambda: _sd3("StableDiffusion3Img2ImgPipeline", **IMAGE),
    "SD 3 inpainting": lambda: _sd3("StableDiffusion3InpaintPipeline", channels=16, **INPAINTED),
    "SD 3 ControlNet": lambda: _sd3_controlnet(
        "StableDiffusion3ControlNetPipeline", sd3_controlnet(), control_image=picture()
    ),
    "SD 3 ControlNet, without text": lambda: _sd3_controlnet(
        "StableDiffusion3ControlNetPipeline", sd3_controlnet_of_tokens(), control_image=picture()
    ),
    "SD 3 ControlNet, inpainting": lambda: _sd3_controlnet(
        "StableDiffusion3ControlNetInpaintingPipeline", sd3_controlnet(1), control_image=picture(), control_mask=MASK
    ),
    "Flux": lambda: _flux("FluxPipeline"),
    "Flux, true guidance": lambda: _flux("FluxPipeline", guided=True),
    "Flux image to image": lambda: _flux("FluxImg2ImgPipeline", **IMAGE),
    "Flux inpainting": lambda: _flux("FluxInpaintPipeline", **INPAINTED),
    "Flux Fill": lambda: _flux("FluxFillPipeline", channels=36, image=picture(), mask_image=MASK),
    "Flux Kontext": lambda: _flux("FluxKontextPipeline", image=picture(), max_area=SIZE * SIZE, _auto_resize=False),
    "Flux Control": lambda: _flux("FluxControlPipeline", **CONTROL),
    "Flux Control, image to image": lambda: _flux("FluxControlImg2ImgPipeline", **IMAGE, **CONTROL),
    "Flux Control, inpainting": lambda: _flux("FluxControlInpaintPipeline", **INPAINTED, **CONTROL),
    "Flux ControlNet": lambda: _flux_controlnet("FluxControlNetPipeline"),
    "Flux ControlNet, image to image": lambda: _flux_controlnet("FluxControlNetImg2ImgPipeline", **IMAGE),
    "Flux ControlNet, inpainting": lambda: _flux_controlnet("FluxControlNetInpaintPipeline", **INPAINTED),
    "PixArt-Sigma": lambda: _pixart("PixArtSigmaPipeline"),
    "PixArt-alpha": lambda: _pixart("PixArtAlphaPipeline"),
}
MODELS = {
    "UNet": PIPELINES["text to image"],
    "SD 3": TRANSFORMERS["Stable Diffusion 3.5"],
    "Flux": TRANSFORMERS["Flux"],
    "PixArt": TRANSFORMERS["PixArt-Sigma"],
}
