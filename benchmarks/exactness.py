"""Is a cached call right? Where the inputs of all calls repeat, each must give what a full call gives.

On tiny transformers with random weights, as the pipelines of diffusers call them: ControlNets add one residual to
each block or to each group of them, skip-layer guidance is a second call of half the batch, image to image starts in
the middle, and a second image follows of other inputs. Where a cache raises for want of a context, which most
pipelines do not set, what it gives with one set by hand is measured, too. With cache-dit where it is installed.

    python benchmarks/exactness.py
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from card import card, write_json
from diffusers.hooks import hooks
from latency import RESULTS
from options import option, parsed
from tables import show_result
from torch import Tensor

import agentsd

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from tiny_transformers import KINDS, Trajectory, make_transformer, residuals, transformer_inputs

STEPS, EXACT = 8, 1e-6


@dataclass
class Case:
    """Calls of a step, whether the pipeline sets a cache context in each, the first step, and how many images."""

    calls: list[dict[str, Any]]
    contexts: bool = False
    start: int = 0
    images: int = 1
    guided: bool = False  # by a second call


Method = Callable[[Any, Case], Any]


def of_diffusers(name: str, config: Any) -> Method:
    return lambda pipe, case: getattr(diffusers.hooks, f"apply_{name}")(pipe.transformer, config)


def cache_dit(pipe: Any, case: Case) -> None:
    """Stable Diffusion 3 without its pipeline as cache-dit has it with one."""
    import cache_dit as package  # noqa: PLC0415

    net = pipe.transformer
    if type(net).__name__.startswith("SD3"):
        pattern = package.ForwardPattern.Pattern_1
        net = package.BlockAdapter(transformer=net, blocks=net.transformer_blocks, forward_pattern=pattern)
    settings = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "num_inference_steps": STEPS}
    package.enable_cache(net, cache_config=package.DBCacheConfig(**settings, enable_separate_cfg=case.guided))


METHODS: dict[str, Method] = {
    "agentsd": lambda pipe, case: agentsd.apply_patch(pipe, ratio=0, cache_interval=3),
    "FirstBlockCache": of_diffusers("first_block_cache", diffusers.FirstBlockCacheConfig()),
    "MagCache": of_diffusers(
        "mag_cache", diffusers.MagCacheConfig(num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS)
    ),
    "TaylorSeer": of_diffusers(
        "taylorseer_cache", diffusers.TaylorSeerCacheConfig(cache_interval=3, taylor_factors_dtype=torch.float32)
    ),
} | ({"cache-dit": cache_dit} if importlib.util.find_spec("cache_dit") else {})


def cases(kind: str) -> dict[str, Case]:
    inputs, own = transformer_inputs(kind), kind == "flux"
    pick = lambda i: {n: v if n.endswith("ids") else v[i : i + 1] for n, v in inputs.items()}
    found = {"plain": Case([inputs], own)}
    if own:
        found["guidance in two calls"] = Case([pick(0), pick(1)], own, guided=True)
    found["image to image, two images"] = Case([inputs], start=3, images=2)
    if kind != "pixart":
        found["ControlNet, each block"] = Case([{**inputs, **residuals(kind, each=True)}])
        found["ControlNet, groups"] = Case([{**inputs, **residuals(kind)}])
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
def outcome(kind: str, case: Case, apply: Method, contexts: bool) -> str:
    """How far calls are from full ones at most, as a share of the largest value; or what is raised."""
    expected = list(outputs(Trajectory(make_transformer(kind), kind, STEPS), case, False))
    pipe, ran = Trajectory(make_transformer(kind), kind, STEPS), []
    last = [module for name, module in pipe.transformer.named_modules() if name.endswith("to_q")][-1]
    last.register_forward_hook(lambda *_: ran.append(True))
    try:
        apply(pipe, case)
        found = list(outputs(pipe, case, contexts))
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        if "cache context" in str(error):
            return f"raises (with a context: {outcome(kind, case, apply, True).removeprefix('raises ')})"
        return f"raises {type(error).__name__}"
    most = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    if most > EXACT:
        return f"wrong by {most / max(float(b.abs().max()) for b in expected):.0%}"
    return "exact" if len(ran) < len(found) else "caches nothing"


@dataclass
class Options:
    """Which transformers."""

    kinds: list[str] = option(list(KINDS), "default: all", nargs="+", choices=KINDS)
    out: Path = option(RESULTS / "exactness.json", "JSON file", type=Path)


def main() -> None:
    options = parsed(Options, __doc__)
    rows = [
        {"model": kind, "case": name} | {who: outcome(kind, case, how, case.contexts) for who, how in METHODS.items()}
        for kind in options.kinds
        for name, case in cases(kind).items()
    ]
    settings = {"model": "tiny transformers", "kinds": options.kinds}
    result = {"kind": "exactness", **card("cpu"), "settings": settings, "rows": rows}
    write_json(options.out, result)
    show_result(result, options.out)


if __name__ == "__main__":
    main()
