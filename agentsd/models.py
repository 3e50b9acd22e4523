"""The networks of a pipeline that can be patched."""

from __future__ import annotations

from typing import Any

from torch import nn

SUPPORTED = (
    "a diffusers pipeline with a UNet of Stable Diffusion 1.x, 2.x or XL (StableDiffusionPipeline, "
    "StableDiffusionXLPipeline), with a transformer of Stable Diffusion 3, 3.5, Flux or PixArt, or for feature reuse "
    "alone of Qwen-Image, Flux.2, Chroma or Sana, their img2img, inpaint and ControlNet variants, or its denoiser "
    "alone, such as a UNet2DConditionModel"
)


def denoiser_of(model: Any) -> nn.Module:
    """The UNet or transformer of a pipeline, or the model itself; without what torch and PEFT put around it.

    Raises:
        TypeError: ``model`` is neither.
    """
    parts = (getattr(model, name, None) for name in ("unet", "transformer"))
    net = next((part for part in parts if part is not None), model)
    net = getattr(net, "_orig_mod", net)
    if hasattr(net, "get_base_model"):  # of `peft.get_peft_model`
        net = net.get_base_model()
    if not isinstance(net, nn.Module):
        raise TypeError(f"cannot patch a {type(model).__name__}: expected {SUPPORTED}.")
    return net


def controlnets_of(model: Any) -> dict[str, nn.Module]:
    """The ControlNets of a pipeline, by name, each once; without what ``torch.compile`` puts around them."""
    net = getattr(model, "controlnet", None)
    net = getattr(net, "_orig_mod", net)
    if not isinstance(net, nn.Module):
        return {}
    nets = getattr(net, "nets", None)
    named = {f"controlnet.nets.{i}": n for i, n in enumerate(nets)} if nets is not None else {"controlnet": net}
    names: dict[nn.Module, str] = {}
    for name, n in named.items():
        names.setdefault(getattr(n, "_orig_mod", n), name)  # two images may have one net between them
    return {name: n for n, name in names.items()}
