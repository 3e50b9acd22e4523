"""What a method is, and those that are not ours: a further peer is one function more, and one line in `methods.py`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.hooks import hooks
from torch import nn

Undo = Callable[[], Any]
UNET = ("UNet2DConditionModel",)
TRANSFORMERS = ("SD3", "Flux", "PixArt")
# by MagCache's own calibration: two images of examples/demo_model_sd3 in 28 steps, guidance 4, seeds 20000 and 20001
SD3_MAG_RATIOS = [1.0, 1.0292, 0.9641, 1.0015, 1.0257, 1.0199, 1.0134, 0.9947, 0.988, 1.0001, 0.9966, 0.9863, 0.9901]
SD3_MAG_RATIOS += [0.9901, 0.9966, 0.9853, 0.9868, 0.9888, 0.982, 0.9811, 0.9828, 0.9727, 0.9846, 0.9683, 0.9545]
SD3_MAG_RATIOS += [0.9375, 0.914, 1.2167]
LIMIT = "no self-attention at the top (the limit)"


@dataclass(frozen=True)
class Method:
    """One row of a table.

    Attributes:
        apply: takes the pipeline, returns how to undo it.
        ratio: share of the tokens merged, for the table; None where none is.
        settings: by which images of before are known to be of the same method.
        share: of the steps that are asked for: what is not patched may take fewer.
        call: draws images with a pipeline and its arguments, where the method has a loop of its own.
        packages: that must be installed.
        kinds: the denoisers that it is for, as the names of their classes begin; all where there are none.
        counts: whether its operations can be counted without computing anything.
    """

    apply: Callable[[Any], Undo]
    ratio: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    call: Callable[..., Any] | None = None
    packages: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    counts: bool = True

    def steps(self, asked: int) -> int:
        return max(1, round(self.share * asked))

    def images(self, pipe: Any, *prompts: Any, num_inference_steps: int, **inputs: Any) -> Any:
        """What a call of the pipeline gives."""
        inputs["num_inference_steps"] = self.steps(num_inference_steps)
        return self.call(pipe, *prompts, **inputs) if self.call else pipe(*prompts, **inputs)


def top_attention(unet: nn.Module) -> tuple[int, list[nn.Module]]:
    """The highest level that has self-attention (0 in Stable Diffusion 1.x and 2.x, 1 in SDXL), and its layers."""
    ups = list(reversed(unet.up_blocks))
    for level, down in enumerate(unet.down_blocks):
        modules = [module for block in (down, ups[level]) for module in block.modules()]
        blocks = [module for module in modules if type(module).__name__ == "BasicTransformerBlock"]
        if layers := [block.attn1 for block in blocks if not block.only_cross_attention]:
            return level, layers
    raise ValueError(f"{type(unet).__name__} has no self-attention")


def tome(ratio: float) -> Method:
    """Token Merging for Stable Diffusion (tomesd on PyPI), at the highest resolution with self-attention as ours."""

    def apply(pipe: Any) -> Undo:
        import tomesd  # noqa: PLC0415

        level, _ = top_attention(pipe.unet)
        tomesd.apply_patch(pipe.unet, ratio=ratio, max_downsample=2**level)
        return lambda: tomesd.remove_patch(pipe.unet)

    return Method(apply, ratio, {"tomesd": ratio}, packages=("tomesd",), kinds=UNET)


def deepcache(interval: int) -> Method:
    """DeepCache (PyPI), at its outermost branch."""

    def apply(pipe: Any) -> Undo:
        from DeepCache import DeepCacheSDHelper  # noqa: PLC0415

        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=interval, cache_branch_id=0)
        helper.enable()
        return helper.disable

    return Method(apply, settings={"DeepCache": interval}, packages=("DeepCache",), kinds=UNET)


def tgate(gate: float = 0.4, interval: int = 5) -> Method:
    """T-GATE 2 (tgate on PyPI), as its page has it: cross-attention and guidance end at step 10 of 25."""

    def apply(pipe: Any) -> Undo:
        layers = [module for module in pipe.unet.modules() if type(module).__name__ == "Attention"]
        return lambda: [vars(layer).pop(name, None) for layer in layers for name in ("forward", "cache")]

    def call(pipe: Any, *prompts: Any, num_inference_steps: int, **inputs: Any) -> Any:
        import tgate  # noqa: PLC0415

        load = tgate.TgateSDXLLoader if "XL" in type(pipe).__name__ else tgate.TgateSDLoader
        schedule = {"gate_step": round(gate * num_inference_steps), "sp_interval": interval, "fi_interval": 1}
        inputs |= schedule | {"warm_up": 2, "num_inference_steps": num_inference_steps}
        return load(pipe).tgate(*prompts, **inputs)

    settings = {"T-GATE": [gate, interval]}
    return Method(apply, settings=settings, call=call, packages=("tgate",), kinds=UNET, counts=False)


def cache_of_diffusers(name: str, config: Callable[[Any, int], Any], settings: dict[str, Any], **about: Any) -> Method:
    """One of the caches in diffusers. ``config`` is that of a denoiser and so many steps: each has a cache anew.

    They want a context, which not every pipeline sets: that of Flux is called as here. A step is one denoiser call.
    """

    def apply(pipe: Any) -> Undo:
        net, left = pipe.transformer, 0
        registry = hooks.HookRegistry.check_if_exists_or_initialize(net)

        def remove() -> None:
            for module in net.modules():
                if (found := getattr(module, "_diffusers_hook", None)) is not None:
                    for hook in list(found.hooks):
                        found.remove_hook(hook, recurse=False)
            registry.invalidate_child_registries_cache()

        def begin(*_: Any) -> None:
            nonlocal left
            if not left:
                left = len(pipe.scheduler.timesteps)
                remove()
                getattr(diffusers.hooks, f"apply_{name}")(net, config(net, left))
                hooks._set_cache_context(net, hooks.CacheContext("cond"))
            left -= 1

        handle = net.register_forward_pre_hook(begin)
        return lambda: (handle.remove(), remove())

    return Method(apply, settings={name: settings}, **about)


def first_block_cache(threshold: float = 0.05) -> Method:
    """It wants the text that the last block gives back, and Stable Diffusion 3's gives none."""
    config = lambda net, steps: diffusers.FirstBlockCacheConfig(threshold)
    settings = {"threshold": threshold}
    return cache_of_diffusers("first_block_cache", config, settings, kinds=("Flux", "PixArt"), counts=False)


def mag_cache(threshold: float = 0.06) -> Method:
    """MagCache, whose ratios are those of one trained model: of Flux, as diffusers has them, and of our demo model."""

    def config(net: Any, steps: int) -> Any:
        from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS  # noqa: PLC0415

        ratios = SD3_MAG_RATIOS if type(net).__name__.startswith("SD3") else FLUX_MAG_RATIOS
        return diffusers.MagCacheConfig(threshold, num_inference_steps=steps, mag_ratios=ratios)

    return cache_of_diffusers("mag_cache", config, {"threshold": threshold}, kinds=("Flux", "SD3"))


def taylor_seer(interval: int) -> Method:
    """TaylorSeer of attention alone, as diffusers has it unless told otherwise, in float32."""
    options = {"cache_interval": interval, "taylor_factors_dtype": torch.float32}
    config = lambda net, steps: diffusers.TaylorSeerCacheConfig(**options)
    return cache_of_diffusers("taylorseer_cache", config, {"N": interval}, kinds=("SD3", "Flux"))


def cache_dit(threshold: float = 0.12) -> Method:
    """DBCache of cache-dit (PyPI): the first block decides, from the fifth call on."""
    settings = {"Fn_compute_blocks": 1, "max_warmup_steps": 4, "residual_diff_threshold": threshold}

    def apply(pipe: Any) -> Undo:
        import cache_dit  # noqa: PLC0415

        cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(**settings))
        return lambda: cache_dit.disable_cache(pipe)

    about: dict[str, Any] = {"packages": ("cache_dit",), "kinds": TRANSFORMERS, "counts": False}
    return Method(apply, settings={"cache-dit": settings}, **about)


def together(first: Method, second: Method) -> Method:
    """Both at once."""

    def apply(pipe: Any) -> Undo:
        undo_first, undo_second = first.apply(pipe), second.apply(pipe)
        return lambda: (undo_second(), undo_first())

    settings, packages = {**first.settings, **second.settings}, first.packages + second.packages
    return Method(apply, first.ratio or second.ratio, settings, packages=packages, kinds=first.kinds or second.kinds)


def no_attention(pipe: Any) -> Undo:
    """No self-attention at the highest resolution at all: the limit of what a patch of it can give."""
    _, layers = top_attention(pipe.unet)
    for layer in layers:
        layer.forward = lambda hidden_states, *_, **__: torch.zeros_like(hidden_states)
    return lambda: [vars(layer).pop("forward", None) for layer in layers]


def unpatched(pipe: Any) -> Undo:
    return lambda: None
