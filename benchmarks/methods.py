"""What is compared: every method is a function that applies itself to a pipeline, or to what has a ``unet``.

Each returns how to undo it. A further peer is one function more, and one line in `METHODS`; another way to run the
UNet, whatever the method, is one line in `MODES`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

import agentsd

Undo = Callable[[], Any]
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
    """

    apply: Callable[[Any], Undo]
    ratio: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    call: Callable[..., Any] | None = None
    packages: tuple[str, ...] = ()

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

    return Method(apply, ratio, {"tomesd": ratio}, packages=("tomesd",))


def deepcache(interval: int) -> Method:
    """DeepCache (PyPI), at its outermost branch."""

    def apply(pipe: Any) -> Undo:
        from DeepCache import DeepCacheSDHelper  # noqa: PLC0415

        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=interval, cache_branch_id=0)
        helper.enable()
        return helper.disable

    return Method(apply, settings={"DeepCache": interval}, packages=("DeepCache",))


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

    return Method(apply, settings={"T-GATE": [gate, interval]}, call=call, packages=("tgate",))


def together(first: Method, second: Method) -> Method:
    """Both at once."""

    def apply(pipe: Any) -> Undo:
        undo_first, undo_second = first.apply(pipe), second.apply(pipe)
        return lambda: (undo_second(), undo_first())

    settings, packages = {**first.settings, **second.settings}, first.packages + second.packages
    return Method(apply, first.ratio or second.ratio, settings, packages=packages)


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
    "unpatched, 1/3 of the steps": Method(unpatched, settings={"steps": "1/3"}, share=1 / 3),
    "tomesd r=0.4": tome(0.4),
    "agentsd r=0.4 (the paper's schedule)": agent(),
    "agentsd r=0.4, agents in all steps": agent(agent_steps=1.0),
    "agentsd r=0.4, merging in all steps": agent(agent_steps=0.0),
    "agentsd r=0.4, MLP and cross-attention merged, too": agent(merge_mlp=True, merge_crossattn=True),
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
    LIMIT: Method(no_attention, settings={"self-attention": False}),
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


def prepared(method: Method, prepare: Callable[[nn.Module], Undo]) -> Method:
    """The same on a UNet that is prepared before the method is applied."""

    def apply(pipe: Any) -> Undo:
        undo_mode = prepare(pipe.unet)
        undo = method.apply(pipe)
        return lambda: (undo(), undo_mode())

    return replace(method, apply=apply)


def channels_last(unet: nn.Module) -> Undo:
    unet.to(memory_format=torch.channels_last)
    return lambda: unet.to(memory_format=torch.contiguous_format)


def compiled(mode: str) -> Callable[[nn.Module], Undo]:
    def prepare(unet: nn.Module) -> Undo:
        unet.compile(mode=mode)

        def undo() -> None:
            unet._compiled_call_impl = None
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


# how a UNet runs: each takes a method and gives the one that runs so, or None where it cannot
MODES: dict[str, Callable[[Method], Method | None]] = {
    "eager": lambda method: method,
    "channels-last": lambda method: prepared(method, channels_last),
    "cuda-graphs": graphed,
    "compile": lambda method: prepared(method, compiled("default")),
    "reduce-overhead": lambda method: prepared(method, compiled("reduce-overhead")),
}
SLOW_TO_APPLY = {"compile", "reduce-overhead"}  # each method compiles anew
