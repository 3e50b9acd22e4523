"""What is compared: every method is a function that applies itself to a pipeline, or to something with a ``unet``.

Each returns how to undo it. A further peer is one function more, and one line in `METHODS`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

import agentsd
from agentsd.config import Settings
from agentsd.reuse import interval_of, is_whole
from agentsd.sites import find_sites

Undo = Callable[[], Any]
PHASES = ("early", "late")


@dataclass(frozen=True)
class Method:
    """One row of a table.

    Attributes:
        apply: takes the pipeline, returns how to undo it.
        interval, order: of the reuse of deep features, which say what denoiser calls are whole. An interval below 1 is
            a share of the trajectory.
        phases: share of the steps after which calls cost something else; None where they never do.
        ratio: share of the tokens merged, for the table; None where none is.
        settings: all of them, by which images of before are known to be of the same method.
    """

    apply: Callable[[Any], Undo]
    interval: float = 1
    order: int = 0
    phases: float | None = None
    ratio: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def at(self, steps: int) -> Method:
        """The same, its interval in calls: where no scheduler says that the trajectory has ``steps``."""
        if self.interval >= 1:
            return self
        return agent(**{**self.settings, "cache_interval": interval_of(self.interval, steps)})


class Calls:
    """The kinds of call that a method's schedule of ``steps`` steps has, by name, and how often.

    ``alike`` is equal for methods whose calls are the same and which differ only in how often one is whole.
    """

    def __init__(self, method: Method, steps: int) -> None:
        early = steps if method.phases is None else round(method.phases * steps)
        interval = interval_of(method.interval, steps)
        whole = [is_whole(i, interval, method.order, steps - 1 - i) for i in range(steps)]
        kinds = ["whole" if ran else "cheap" for ran in whole]
        self.counts = Counter(f"{'early' if i < early else 'late'} {kind}" for i, kind in enumerate(kinds))
        costs = method.settings | dict.fromkeys(method.settings.keys() & {"cache_interval", "DeepCache"})
        self.alike = str((costs, interval > 1, sorted(self.counts)))
        self._until_cheap = kinds[: kinds.index("cheap") + 1] if "cheap" in kinds else []

    def of(self, phase: str) -> list[str]:
        """What to call to time one phase. A cheap call follows whole ones, which may be there for it alone."""
        if f"{phase} cheap" in self.counts:
            return [f"{phase} {kind}" for kind in self._until_cheap]
        return [name for name in (f"{phase} whole",) if name in self.counts]

    def schedule(self, seconds: dict[str, float]) -> float:
        """Seconds of the schedule, from those of a call of each kind."""
        return sum(count * seconds[name] for name, count in self.counts.items())


def agent(**given: Any) -> Method:
    """agentsd: the paper's schedule, but for what is given."""
    preset = agentsd.PRESETS.get(given.pop("preset", None), {})
    settings = Settings(**{**preset, **given, "seed": 0, "min_tokens": 0})

    def apply(pipe: Any) -> Undo:
        agentsd.apply_patch(pipe, **asdict(settings))
        return lambda: agentsd.remove_patch(pipe)

    alike = len({(phase.sy, phase.sx, phase.agent_ratio) for phase in settings.phases}) == 1
    return Method(
        apply,
        settings.cache_interval,
        settings.cache_order,
        None if alike else settings.agent_steps,
        None if settings.sample_kv else settings.ratio or None,
        asdict(settings),
    )


def top_level(unet: nn.Module) -> int:
    """That of the highest resolution with self-attention: 0 in Stable Diffusion 1.x and 2.x, 1 in SDXL."""
    return min(site.level for site in find_sites(unet) if not site.skip)


def tome(ratio: float) -> Method:
    """Token Merging for Stable Diffusion (tomesd on PyPI), at the highest resolution with self-attention as ours."""

    def apply(pipe: Any) -> Undo:
        import tomesd  # noqa: PLC0415

        tomesd.apply_patch(pipe.unet, ratio=ratio, max_downsample=2 ** top_level(pipe.unet))
        return lambda: tomesd.remove_patch(pipe.unet)

    return Method(apply, ratio=ratio, settings={"tomesd": ratio})


def deepcache(interval: int) -> Method:
    """DeepCache (PyPI), at its outermost branch."""

    def apply(pipe: Any) -> Undo:
        from DeepCache import DeepCacheSDHelper  # noqa: PLC0415

        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=interval, cache_branch_id=0)
        helper.enable()
        return helper.disable

    return Method(apply, interval, settings={"DeepCache": interval})


def together(first: Method, second: Method) -> Method:
    """Both at once, of which one at most reuses features.

    Raises:
        ValueError: an interval is a share of the trajectory.
    """
    if min(first.interval, second.interval) < 1:
        raise ValueError(f"interval {min(first.interval, second.interval)}: give it in calls, where two methods meet")

    def apply(pipe: Any) -> Undo:
        undo_first, undo_second = first.apply(pipe), second.apply(pipe)
        return lambda: (undo_second(), undo_first())

    return Method(
        apply,
        interval=second.interval if first.interval == 1 else first.interval,
        order=max(first.order, second.order),
        phases=first.phases or second.phases,
        ratio=first.ratio or second.ratio,
        settings={**first.settings, **second.settings},
    )


def no_attention(pipe: Any) -> Undo:
    """No self-attention at the highest resolution at all: the limit of what a patch of it can give."""
    top = top_level(pipe.unet)
    sites = [site for site in find_sites(pipe.unet) if site.level == top and not site.skip]
    layers = [pipe.unet.get_submodule(site.name).attn1 for site in sites]
    before = [layer.forward for layer in layers]
    for layer in layers:
        layer.forward = lambda hidden_states, **_: torch.zeros_like(hidden_states)

    def undo() -> None:
        for layer, forward in zip(layers, before, strict=True):
            layer.forward = forward

    return undo


def unpatched(pipe: Any) -> Undo:
    return lambda: None


METHODS: dict[str, Method] = {
    "unpatched": Method(unpatched),
    "tomesd r=0.4": tome(0.4),
    "agentsd r=0.4 (the paper's schedule)": agent(),
    "agentsd r=0.4, agents in all steps": agent(agent_steps=1.0),
    "agentsd r=0.4, merging in all steps": agent(agent_steps=0.0),
    "agentsd r=0.4, MLP and cross-attention merged, too": agent(merge_mlp=True, merge_crossattn=True),
    "agentsd few_steps": agent(preset="few_steps"),
    "DeepCache N=3": deepcache(3),
    "DeepCache N=5": deepcache(5),
    "tomesd r=0.4 + DeepCache N=3": together(tome(0.4), deepcache(3)),
    "tomesd r=0.4 + DeepCache N=5": together(tome(0.4), deepcache(5)),
    "agentsd r=0.4 + DeepCache N=3": together(agent(), deepcache(3)),
    "agentsd r=0.4, reuse N=3": agent(cache_interval=3),
    "agentsd quality": agent(preset="quality"),
    "agentsd balanced": agent(preset="balanced"),
    "agentsd balanced, but N=4": agent(preset="balanced", cache_interval=4),
    "agentsd fast": agent(preset="fast"),
    "no self-attention at the top (the limit)": Method(no_attention, settings={"self-attention": False}),
}


def trajectory(steps: int) -> tuple[torch.Tensor, dict[str, int]]:
    """Timesteps to time calls at, and the place among them at which each phase begins.

    The late one is ``steps`` calls from the end, and the early one as many before it as every interval divides: whole
    and cheap calls follow each other there as they do at the beginning of a trajectory of ``steps`` steps.
    """
    every = math.lcm(*(interval_of(method.interval, steps) for method in METHODS.values()))
    between = every * math.ceil(2 * steps / every)
    return torch.linspace(999, 1, between + steps), dict(zip(PHASES, (0, between), strict=True))


def chosen(names: list[str] | None, ratios: list[float]) -> dict[str, Method]:
    """The methods of these names, or all, and of agentsd and tomesd one at each ratio.

    Raises:
        ValueError: a name is none of ours.
    """
    unknown = [name for name in names or () if name not in METHODS]
    if unknown:
        raise ValueError(f"--methods {unknown[0]!r} is not known: give some of {', '.join(map(repr, METHODS))}")
    picked = {name: METHODS[name] for name in METHODS if not names or name in names or name == "unpatched"}
    for ratio in ratios:
        picked |= {f"tomesd r={ratio:g}": tome(ratio), f"agentsd r={ratio:g}": agent(ratio=ratio)}
    return picked
