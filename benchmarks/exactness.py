"""Is a cached call right? Where the inputs of all calls repeat, each must give what a full call gives.

On tiny transformers with random weights, as the pipelines of diffusers call them: ControlNets add one residual to
each block or to each group of them, skip-layer guidance is a second call of half the batch, image to image starts in
the middle, and a second image follows of other inputs. Where a cache wants a context that the pipeline of diffusers
does not set, it raises; what it gives with one set by hand is measured, too.

    python benchmarks/exactness.py              # with cache-dit where it is installed
"""

# ruff: noqa: RUF009 (an option is a field)

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from card import card, write_json
from diffusers.hooks import hooks
from latency import RESULTS
from options import option, parsed
from tables import exactness_rows, print_table
from torch import Tensor

import agentsd

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from tiny_transformers import KINDS, Trajectory, make_transformer, transformer_inputs

STEPS, START = 8, 3
EXACT = 1e-6


@dataclass
class Case:
    """Calls of a step, whether the pipeline sets a cache context in each, the first step, and how many images."""

    calls: list[dict[str, Any]]
    contexts: bool = False
    start: int = 0
    images: int = 1
    guided: bool = False  # by a second call


def cache_dit(net: Any, case: Case) -> None:
    """Stable Diffusion 3 without its pipeline as cache-dit has it with one."""
    import cache_dit as package  # noqa: PLC0415

    settings = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "num_inference_steps": STEPS}
    if type(net).__name__.startswith("SD3"):
        pattern = package.ForwardPattern.Pattern_1
        net = package.BlockAdapter(transformer=net, blocks=net.transformer_blocks, forward_pattern=pattern)
    package.enable_cache(net, cache_config=package.DBCacheConfig(**settings, enable_separate_cfg=case.guided))


def of_diffusers(name: str, config: Any) -> Callable[[Any, Case], Any]:
    return lambda net, case: getattr(diffusers.hooks, f"apply_{name}")(net, config)


CONSTANT = [1.0] * STEPS
PEERS = {
    "FirstBlockCache": of_diffusers("first_block_cache", diffusers.FirstBlockCacheConfig()),
    "MagCache": of_diffusers("mag_cache", diffusers.MagCacheConfig(num_inference_steps=STEPS, mag_ratios=CONSTANT)),
    "TaylorSeer": of_diffusers(
        "taylorseer_cache", diffusers.TaylorSeerCacheConfig(cache_interval=3, taylor_factors_dtype=torch.float32)
    ),
}


def residuals(kind: str, each: bool) -> dict[str, list[Tensor]]:
    """What ControlNets add: for each block, or for each group of them."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda count, width: [torch.randn(2, 64, width, generator=generator) for _ in range(count)]
    if kind == "flux":
        single = draw(3 if each else 2, 32)
        return {"controlnet_block_samples": draw(2 if each else 1, 32), "controlnet_single_block_samples": single}
    return {"block_controlnet_hidden_states": draw(4 if each else 2, 16)}


def cases(kind: str) -> dict[str, Case]:
    inputs, own = transformer_inputs(kind), kind == "flux"
    pick = lambda i: {n: v if n.endswith("ids") else v[i : i + 1] for n, v in inputs.items()}
    found = {"plain": Case([inputs], own), "guidance in two calls": Case([pick(0), pick(1)], own, guided=True)}
    found["image to image, two images"] = Case([inputs], start=START, images=2)
    if kind != "pixart":
        found["ControlNet, each block"] = Case([{**inputs, **residuals(kind, True)}])
        found["ControlNet, groups"] = Case([{**inputs, **residuals(kind, False)}])
    if kind.startswith("sd3"):
        found["skip-layer guidance"] = Case([inputs, {**pick(1), "skip_layers": [2]}])
    return found


def outputs(pipe: Any, case: Case, contexts: bool) -> Iterator[Tensor]:
    """Of every call, image by image. An image after the first has other inputs."""
    net = pipe.transformer
    for image in range(case.images):
        for step in range(case.start, STEPS):
            for i, inputs in enumerate(case.calls):
                if contexts:
                    hooks._set_cache_context(net, hooks.CacheContext(str(i)))
                yield pipe.call(step, inputs | {"hidden_states": inputs["hidden_states"] + image})
        if hasattr(net, "_reset_stateful_cache"):  # as pipelines do at the end
            net._reset_stateful_cache()


@torch.no_grad()
def outcome(kind: str, case: Case, apply: Callable[[Any, Case], Any], contexts: bool) -> str:
    """How far calls are from full ones at most, as a share of the largest value; or what is raised."""
    expected = list(outputs(Trajectory(make_transformer(kind), kind, STEPS), case, False))
    pipe, ran = Trajectory(make_transformer(kind), kind, STEPS), []
    last = getattr(pipe.transformer, "single_transformer_blocks", pipe.transformer.transformer_blocks)[-1]
    attn = last.attn if hasattr(last, "attn") else last.attn1
    attn.to_q.register_forward_hook(lambda *_: ran.append(True))
    try:
        apply(pipe if apply is ours else pipe.transformer, case)
        found = list(outputs(pipe, case, contexts))
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        if "cache context" in str(error):
            return f"raises without a context (with one: {outcome(kind, case, apply, True)})"
        return f"raises {type(error).__name__}"
    most = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    if most > EXACT:
        return f"wrong by {most / max(float(b.abs().max()) for b in expected):.0%}"
    return "exact" if len(ran) < len(found) else "caches nothing"


def ours(pipe: Any, case: Case) -> None:
    agentsd.apply_patch(pipe, ratio=0, cache_interval=3)


def measured(kinds: Iterable[str], peers: dict[str, Callable[[Any, Case], Any]]) -> list[dict[str, str]]:
    """A row for each transformer and case, with the outcome of each method."""
    methods = {"agentsd": ours, **peers}
    return [
        {"model": kind, "case": name} | {who: outcome(kind, case, how, case.contexts) for who, how in methods.items()}
        for kind in kinds
        for name, case in cases(kind).items()
    ]


@dataclass
class Options:
    """Which transformers."""

    kinds: list[str] = option(list(KINDS), "tiny transformers (default: all)", nargs="+", choices=KINDS)
    out: Path = option(RESULTS / "exactness.json", "JSON file", type=Path)


def main() -> None:
    options = parsed(Options, __doc__)
    peers = PEERS | ({"cache-dit": cache_dit} if importlib.util.find_spec("cache_dit") else {})
    settings = {"model": "tiny transformers", **asdict(options), "out": None}
    result = {"kind": "exactness", **card("cpu"), "settings": settings, "rows": measured(options.kinds, peers)}
    write_json(options.out, result)
    print_table(result, exactness_rows(result))


if __name__ == "__main__":
    main()
