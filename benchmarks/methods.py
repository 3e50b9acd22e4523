"""What is compared: every method applies itself to a pipeline, and says how to undo it."""

import importlib.util
import sys
from dataclasses import replace
from typing import Any

from architectures import denoiser
from peers import (
    LIMIT,
    UNET,
    Method,
    Undo,
    cache_dit,
    deepcache,
    first_block_cache,
    mag_cache,
    no_attention,
    taylor_seer,
    tgate,
    together,
    tome,
    unpatched,
)

import agentsd


def agent(**given: Any) -> Method:
    """agentsd: the paper's schedule, but for what is given."""
    settings = {**agentsd.PRESETS.get(given.pop("preset", None), {}), **given, "seed": 0, "min_tokens": 0}

    def apply(pipe: Any) -> Undo:
        agentsd.apply_patch(pipe, **settings)
        return lambda: agentsd.remove_patch(pipe)

    merged = 0 if settings.get("sample_kv") else settings.get("ratio", 0.4)
    return Method(apply, merged or None, {"agentsd": settings})


METHODS: dict[str, Method] = {
    "unpatched": Method(unpatched),
    "unpatched, 1/2 of the steps": Method(unpatched, settings={"steps": "1/2"}, share=1 / 2),
    "unpatched, 3/7 of the steps": Method(unpatched, settings={"steps": "3/7"}, share=3 / 7),
    "unpatched, 1/3 of the steps": Method(unpatched, settings={"steps": "1/3"}, share=1 / 3),
    "tomesd r=0.4": tome(0.4),
    "agentsd r=0.4 (the paper's schedule)": agent(),
    "agentsd r=0.4, match_interval=2": agent(match_interval=2),
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
    "agentsd balanced, but N=3": agent(preset="balanced", cache_interval=3),
    "agentsd balanced, but N=4": agent(preset="balanced", cache_interval=4),
    "agentsd balanced, r=0.4": agent(preset="balanced", ratio=0.4),
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
