"""What is compared: every method is a function that applies itself to a pipeline.

Each returns how to undo it. A further peer is one function more, and one line in `METHODS`; another way to run the
denoiser, whatever the method, is one line in `MODES`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
from architectures import denoiser
from diffusers.hooks import hooks
from diffusers.hooks import mag_cache as mag_cache_of_diffusers
from torch import nn

import agentsd

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


def agent(**given: Any) -> Method:
    """agentsd: the paper's schedule, but for what is given."""
    settings = {**agentsd.PRESETS.get(given.pop("preset", None), {}), **given, "seed": 0, "min_tokens": 0}

    def apply(pipe: Any) -> Undo:
        agentsd.apply_patch(pipe, **settings)
        return lambda: agentsd.remove_patch(pipe)

    merged = 0 if settings.get("sample_kv") else settings.get("ratio", 0.4)
    return Method(apply, merged or None, {"agentsd": settings})


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

    They want a context, which not every pipeline sets. A step is one denoiser call.
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
                hooks._set_cache_context(net, hooks.CacheContext("images"))
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
        ratios = SD3_MAG_RATIOS if type(net).__name__.startswith("SD3") else mag_cache_of_diffusers.FLUX_MAG_RATIOS
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


METHODS: dict[str, Method] = {
    "unpatched": Method(unpatched),
    "unpatched, 1/2 of the steps": Method(unpatched, settings={"steps": "1/2"}, share=1 / 2),
    "unpatched, 3/7 of the steps": Method(unpatched, settings={"steps": "3/7"}, share=3 / 7),
    "unpatched, 1/3 of the steps": Method(unpatched, settings={"steps": "1/3"}, share=1 / 3),
    "tomesd r=0.4": tome(0.4),
    "agentsd r=0.4 (the paper's schedule)": agent(),
    "agentsd r=0.4, agents in all steps": agent(agent_steps=1.0),
    "agentsd r=0.4, merging in all steps": agent(agent_steps=0.0),
    "agentsd r=0.4, MLP and cross-attention merged, too": replace(
        agent(merge_mlp=True, merge_crossattn=True), kinds=(*UNET, "PixArt")
    ),
    "agentsd few_steps": agent(preset="few_steps"),
    "DeepCache N=3": deepcache(3),
    "DeepCache N=5": deepcache(5),
    "T-GATE": tgate(),
    "tomesd r=0.4 + DeepCache N=3": together(tome(0.4), deepcache(3)),
    "tomesd r=0.4 + DeepCache N=5": together(tome(0.4), deepcache(5)),
    "agentsd r=0.4 + DeepCache N=3": together(agent(), deepcache(3)),
    "agentsd r=0.4, reuse N=3": agent(cache_interval=3),
    "agentsd quality": agent(preset="quality"),
    "agentsd balanced": agent(preset="balanced"),
    "agentsd adaptive": agent(preset="adaptive"),
    "agentsd balanced, but N=4": agent(preset="balanced", cache_interval=4),
    "agentsd fast": agent(preset="fast"),
    "FirstBlockCache": first_block_cache(),
    "MagCache": mag_cache(),
    "TaylorSeer N=3": taylor_seer(3),
    "cache-dit": cache_dit(),
    LIMIT: Method(no_attention, settings={"self-attention": False}, kinds=UNET),
}


def chosen(names: list[str] | None, ratios: list[float]) -> dict[str, Method]:
    """The methods of these names, or all, and of agentsd and tomesd one at each ratio.

    Raises:
        ValueError: a name is none of ours, or its package is not installed.
    """
    if unknown := [name for name in names or () if name not in METHODS]:
        raise ValueError(f"--methods {unknown[0]!r} is not known: give some of {', '.join(map(repr, METHODS))}")
    picked = {name: METHODS[name] for name in METHODS if not names or name in names or name == "unpatched"}
    for ratio in ratios:
        picked |= {f"tomesd r={ratio:g}": tome(ratio), f"agentsd r={ratio:g}": agent(ratio=ratio)}
    for name, method in list(picked.items()):
        missing = [package for package in method.packages if importlib.util.find_spec(package) is None]
        if missing and name in (names or ()):
            raise ValueError(f"--methods {name!r}: pip install {' '.join(missing)}")
        if missing:
            print(f"note: {name} is left out: pip install {' '.join(missing)}", file=sys.stderr)
            del picked[name]
    return picked


def fitting(methods: dict[str, Method], pipe: Any, countable: bool = False) -> dict[str, Method]:
    """Those that run on the pipeline's denoiser, and where nothing is computed; the others are named."""
    kind = type(denoiser(pipe)).__name__
    runs = lambda method: (not method.kinds or kind.startswith(method.kinds)) and (method.counts or not countable)
    if left_out := [name for name, method in methods.items() if not runs(method)]:
        where = f"a {kind} without data" if countable else f"a {kind}"
        print(f"note: left out, not for {where}: {', '.join(left_out)}", file=sys.stderr)
    return {name: method for name, method in methods.items() if runs(method)}


def prepared(method: Method, prepare: Callable[[nn.Module], Undo]) -> Method:
    """The same on a denoiser that is prepared before the method is applied."""

    def apply(pipe: Any) -> Undo:
        undo_mode = prepare(denoiser(pipe))
        undo = method.apply(pipe)
        return lambda: (undo(), undo_mode())

    return replace(method, apply=apply)


def channels_last(net: nn.Module) -> Undo:
    net.to(memory_format=torch.channels_last)
    return lambda: net.to(memory_format=torch.contiguous_format)


def compiled(mode: str) -> Callable[[nn.Module], Undo]:
    def prepare(net: nn.Module) -> Undo:
        net.compile(mode=mode)

        def undo() -> None:
            net._compiled_call_impl = None
            torch.compiler.reset()

        return undo

    return prepare


def graphs_alone(pipe: Any) -> Undo:
    agentsd.apply_patch(pipe, ratio=0, cuda_graphs=True)
    return lambda: agentsd.remove_patch(pipe)


def graphed(method: Method) -> Method | None:
    """The same with CUDA graphs of the patch's own; without one in it, under a patch that does nothing else."""
    if method.apply is unpatched:
        return replace(method, apply=graphs_alone)
    if set(method.settings) != {"agentsd"}:
        return None
    return replace(method, apply=agent(**method.settings["agentsd"], cuda_graphs=True).apply)


# how a denoiser runs: each takes a method and gives the one that runs so, or None where it cannot
MODES: dict[str, Callable[[Method], Method | None]] = {
    "eager": lambda method: method,
    "channels-last": lambda method: prepared(method, channels_last),
    "cuda-graphs": graphed,
    "compile": lambda method: prepared(method, compiled("default")),
    "reduce-overhead": lambda method: prepared(method, compiled("reduce-overhead")),
}
SLOW_TO_APPLY = {"compile", "reduce-overhead"}  # each method compiles anew
