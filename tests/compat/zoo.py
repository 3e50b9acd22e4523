"""Every pipeline of the compatibility table, tiny and with random weights, as a function that makes one image."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from conftest import POOLED_CHANNELS, ROOT, TEXT_CHANNELS, make_scheduler, make_unet
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    MotionAdapter,
    T2IAdapter,
    UNetMotionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SIZE = 16  # of the images, and with a VAE of factor 1 of the latents
TOKENIZER = ROOT / "examples" / "demo_model" / "tokenizer"
Run = Callable[[], torch.Tensor]


def text_parts(*, projected: bool = False, length: int = 24) -> tuple[CLIPTextModel, CLIPTokenizer]:
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_CHANNELS,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=POOLED_CHANNELS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    cls = CLIPTextModelWithProjection if projected else CLIPTextModel
    return cls(config).eval(), tokenizer


def make_vae(channels: int = 4, levels: int = 1) -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": (8,) * levels,
    }
    return AutoencoderKL(**blocks, norm_num_groups=4, latent_channels=channels, sample_size=SIZE).eval()


def build(name: str, unet=None, **parts):
    """A Stable Diffusion 1.x or 2.x pipeline by the name of its class."""
    text_encoder, tokenizer = text_parts()
    shared = {
        "vae": make_vae(),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "unet": unet or make_unet(),
        "scheduler": make_scheduler(DDIMScheduler),
    }
    unsafe = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    cls = getattr(diffusers, name)
    return _ready(_construct(cls, shared | parts, unsafe))


def build_xl(name: str, unet=None, **parts):
    """A Stable Diffusion XL pipeline by the name of its class."""
    first, tokenizer = text_parts()
    second, _ = text_parts(projected=True)
    shared = {
        "vae": make_vae(),
        "text_encoder": first,
        "text_encoder_2": second,
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "unet": unet or make_unet("sdxl", cross_attention_dim=2 * TEXT_CHANNELS),
        "scheduler": make_scheduler(EulerDiscreteScheduler),
    }
    return _ready(_construct(getattr(diffusers, name), shared | parts, {"add_watermarker": False}))


def _construct(cls, parts, optional):
    accepted = cls.__init__.__code__.co_varnames
    return cls(**{key: value for key, value in optional.items() if key in accepted} | parts)


def _ready(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(channels: int = 3, size: int = SIZE) -> torch.Tensor:
    return torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(3))


def runner(pipe, **arguments) -> Run:
    """A function that makes the same image each time it is called."""
    accepted = pipe.__call__.__code__.co_varnames if not hasattr(pipe.__call__, "__wrapped__") else None
    accepted = accepted or pipe.__call__.__wrapped__.__code__.co_varnames
    wanted = {"prompt": "red apple", "num_inference_steps": 5, "output_type": "pt"}
    wanted |= {"guidance_scale": 5.0} if "guidance_scale" in accepted else {}
    if "height" in accepted and "image" not in arguments:
        wanted |= {"height": SIZE, "width": SIZE}

    def run(**changes) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        embedded = {n: x.to(pipe.dtype) for n, x in arguments.items() if n.endswith("_embeds")}
        output = pipe(**wanted | arguments | embedded | changes, generator=generator)
        return torch.as_tensor(getattr(output, "images", getattr(output, "frames", None)))

    run.arguments = wanted | arguments
    return run


def make_controlnet(unet) -> ControlNetModel:
    torch.manual_seed(1)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8,)).eval()
    for parameter in controlnet.controlnet_down_blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.05)  # they start at zero, and would not be seen
    return controlnet


def _controlnet(build, name, unet, count: int = 1):
    nets = [make_controlnet(unet) for _ in range(count)]
    pipe = build(name, unet, controlnet=nets if count > 1 else nets[0])
    return pipe, runner(pipe, image=[picture()] * count if count > 1 else picture())


def _adapter(build, name, unet, kind="full_adapter", factor=1):
    torch.manual_seed(1)
    adapter = T2IAdapter(channels=(16, 32), num_res_blocks=1, downscale_factor=factor, adapter_type=kind).eval()
    pipe = build(name, unet, adapter=adapter)
    return pipe, runner(pipe, image=picture(), height=SIZE, width=SIZE)


def _upscale():
    unet = make_unet("sd21", in_channels=7, num_class_embeds=50)
    pipe = build("StableDiffusionUpscalePipeline", unet, low_res_scheduler=DDPMScheduler(), max_noise_level=40)
    return pipe, runner(pipe, image=picture(), noise_level=10)


def _gligen():
    unet = make_unet(attention_type="gated")
    pipe = build("StableDiffusionGLIGENPipeline", unet)
    return pipe, runner(pipe, gligen_phrases=["apple"], gligen_boxes=[[0.1, 0.1, 0.6, 0.6]])


def _animate():
    torch.manual_seed(1)
    adapter = MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
    )
    unet = UNetMotionModel.from_unet2d(make_unet(), adapter.eval()).eval()
    pipe = build("AnimateDiffPipeline", unet, motion_adapter=adapter)
    return pipe, runner(pipe, num_frames=3)


def _ldm():
    text_encoder, tokenizer = text_parts(length=77)  # the pipeline pads its captions to this
    scheduler = make_scheduler(DDIMScheduler)
    pipe = diffusers.LDMTextToImagePipeline(make_vae(), text_encoder, tokenizer, make_unet(), scheduler)
    return _ready(pipe), runner(pipe, output_type="np")


def simple(build, name, unet=None, **arguments):
    pipe = build(name, unet)
    return pipe, runner(pipe, **arguments)


WIDE = {"cross_attention_dim": 2 * TEXT_CHANNELS}
MASK = (torch.arange(SIZE) < SIZE // 2).float().expand(1, 1, SIZE, SIZE)
PIPELINES = {
    "text to image": lambda: simple(build, "StableDiffusionPipeline"),
    "image to image": lambda: simple(build, "StableDiffusionImg2ImgPipeline", image=picture(), strength=0.8),
    "inpainting": lambda: simple(
        build, "StableDiffusionInpaintPipeline", make_unet(in_channels=9), image=picture(), mask_image=MASK
    ),
    "upscaling x4": _upscale,
    "InstructPix2Pix": lambda: simple(
        build, "StableDiffusionInstructPix2PixPipeline", make_unet(in_channels=8), image=picture()
    ),
    "depth to image": lambda: simple(
        lambda name, unet: build(name, unet, depth_estimator=None, feature_extractor=None),
        "StableDiffusionDepth2ImgPipeline",
        make_unet("sd21", in_channels=5),
        image=picture(),
        depth_map=picture(1)[0],
    ),
    "Stable Diffusion 2.x": lambda: simple(build, "StableDiffusionPipeline", make_unet("sd21")),
    "SDXL": lambda: simple(build_xl, "StableDiffusionXLPipeline"),
    "SDXL image to image, refiner": lambda: simple(
        build_xl, "StableDiffusionXLImg2ImgPipeline", image=picture(), strength=0.8
    ),
    "SDXL inpainting": lambda: simple(
        build_xl, "StableDiffusionXLInpaintPipeline", image=picture(), mask_image=MASK, strength=0.9
    ),
    "ControlNet": lambda: _controlnet(build, "StableDiffusionControlNetPipeline", make_unet()),
    "several ControlNets": lambda: _controlnet(build, "StableDiffusionControlNetPipeline", make_unet(), 2),
    "SDXL ControlNet": lambda: _controlnet(build_xl, "StableDiffusionXLControlNetPipeline", make_unet("sdxl", **WIDE)),
    "T2I-Adapter": lambda: _adapter(build, "StableDiffusionAdapterPipeline", make_unet()),
    "SDXL T2I-Adapter": lambda: _adapter(
        build_xl, "StableDiffusionXLAdapterPipeline", make_unet("sdxl", **WIDE), "full_adapter_xl", 2
    ),
    "GLIGEN": _gligen,
    "LDM text to image": _ldm,
    "AnimateDiff": _animate,
    "PAG": lambda: simple(build, "StableDiffusionPAGPipeline", pag_scale=2.0),
    "SDXL PAG": lambda: simple(build_xl, "StableDiffusionXLPAGPipeline", pag_scale=2.0),
}
