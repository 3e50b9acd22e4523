"""The settings of a patch: declared, documented and validated here, and the presets."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

from agentsd.schedule import Moment, Phase

MIN_TOKENS = 1024  # where the paper's schedule is as fast as fused attention, as measured (benchmarks/NOTES.md)
# the settings that say how tokens are merged, and are idle where keys and values are sampled instead
MERGING = (
    "ratio",
    "agent_ratio",
    "k_scale2",
    "k_shortcut",
    "merge_attn",
    "merge_crossattn",
    "merge_mlp",
    "match_interval",
)

# named settings, chosen by measuring speed against fidelity (benchmarks/NOTES.md)
REUSED = {"agent_steps": 0.0, "cache_order": 1, "cache_cell": 2}
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "quality": {**REUSED, "ratio": 0.0, "cache_interval": 0.095},
        "balanced": {**REUSED, "ratio": 0.0, "cache_interval": 0.125},
        "adaptive": {**REUSED, "ratio": 0.0, "cache_interval": 0.125, "cache_tolerance": 0.3},
        "fast": {**REUSED, "ratio": 0.0, "cache_interval": 0.18},
        "few_steps": {"sample_kv": True, "agent_sx": 3, "agent_sy": 3},
    }
)


@dataclass(frozen=True)
class Settings:
    """Everything that `agentsd.apply_patch` can be told. The defaults are the paper's schedule.

    Attributes:
        ratio: share of the tokens to merge in each patched layer, at most ``1 - 1 / (sx * sy)``.
        agent_steps: share of the denoising trajectory under agent attention: 0 never, 1 always.
        agent_ratio: share of the tokens merged into agents; what remains, ``1 - agent_ratio``, are the agents, but
            at least one for every ``agent_sx`` x ``agent_sy`` cell.
        agent_sx, agent_sy: size of the cells with one dst token in the agent phase.
        sx, sy: the same in the merging phase.
        max_downsample: patch layers at up to this downsampling of the latents (1, 2, 4 or 8). None is the highest
            resolution that has self-attention: 1 for Stable Diffusion 1.x and 2.x, 2 for SDXL.
        k_scale2: exponent of the attention scale where agents hand out to the tokens.
        k_shortcut: weight of the values added to the output of agent attention.
        use_rand: pick the dst token of a cell at random rather than its top-left one.
        seed: of these draws. None follows ``torch.manual_seed``. Neither torch's global generators nor the one given
            to the pipeline are advanced.
        merge_attn, merge_crossattn, merge_mlp: merge tokens around self-attention, cross-attention, feed-forward.
        match_interval: match tokens in every ``match_interval``-th step alone, and merge the same ones in the steps
            between, which saves the time that a GPU waits for Python (the idea is ToMA's: Lu et al. 2025, arXiv
            2509.10918). 1 is the reference. Compiled calls, and those under gradients, match each time.
        sample_kv: instead of merging, let every token attend to the dst tokens alone, one of each cell: token
            downsampling (Smith et al. 2024, arXiv 2402.13573). The tokens of a cell take turns from step to step, and
            each block draws with which of them a round begins.
        min_tokens: leave the attention of layers with fewer tokens as it is, since there the patch costs more than it
            gains: the default is where both were equal on a CPU (benchmarks/NOTES.md). 0 patches all.
        cache_interval: run the whole denoiser in every ``cache_interval``-th call, and in the others its outermost
            layers alone, with the deep features from before. 1 is off. Up to 0.5 it is a share of the trajectory: 0.1
            is a tenth of it from one full call to the next, on average: every second of 20 and every fifth of 50, but
            never every call. In img2img it is a share of the whole schedule, including the steps skipped at the start;
            without a schedule the trajectory is taken for one of 25. Not where gradients are recorded.
        cache_branch: how many layers on the way down such a cached call runs; one more runs on the way up.
        cache_order: 0 takes the deep features as they were, 1 extrapolates them from the last two full calls, but
            the first, on lines that slow down as features do. The second call of a trajectory is full, too, and so is
            the last but one, and the gaps between full calls grow along it. In transformers 1 spreads the full calls
            evenly from the first to the last but one, about ``cache_interval`` apart, and what the skipped blocks add
            follows their input, channel by channel, as it did between the last two of them: a line in time leads it
            astray (benchmarks/NOTES.md).
        cache_cell: in cached calls, let every token attend to one token of each ``cache_cell`` x ``cache_cell`` cell
            alone, each in its turn, as with ``sample_kv``. Their errors average out, where those of full calls are
            carried on. 1 leaves cached calls to what the schedule says.
        cache_tolerance: let the error of the extrapolation decide which calls are full: at each full call it is
            measured, and where it is above this share of the features' size (1.6 of it at the start of the trajectory,
            falling to 0.4 at its end) the next full call comes sooner, otherwise later. A batch goes by its worst
            image. ``cache_interval`` then gives the first distance, 0.3 of it and at least 2 calls. In transformers it
            decides all the same: evenly spread, their full calls are nearer (benchmarks/NOTES.md). 0 is off.
        cache_budget: with ``cache_tolerance``, at most this share of a trajectory's calls is full. 1 is no limit.
        patch_controlnet: patch the attention of the pipeline's ControlNets, too.
        cuda_graphs: record a CUDA graph of each kind of call, and replay it in all others of that kind: the same
            kernels, and so the same image, without waiting for Python to launch them one by one. Recorded anew where
            shapes, types, constants, modules or addresses of weights change. Hooks of modules inside run only as it
            is recorded. Where it cannot be, a warning says why, and calls run as without: on other devices, with
            offloading, autocast or gradients. `torch.compile` has graphs of its own (``mode="reduce-overhead"``),
            which nobody has run under a patch yet.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is outside its range.
    """

    ratio: float = 0.4
    agent_steps: float = 0.4
    agent_ratio: float = 0.95
    agent_sx: int = 4
    agent_sy: int = 4
    sx: int = 2
    sy: int = 2
    max_downsample: int | None = None
    k_scale2: float = 0.3
    k_shortcut: float = 0.075
    use_rand: bool = True
    seed: int | None = None
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    match_interval: int = 1
    sample_kv: bool = False
    min_tokens: int = MIN_TOKENS
    cache_interval: float = 1.0
    cache_branch: int = 0
    cache_order: int = 0
    cache_cell: int = 1
    cache_tolerance: float = 0.0
    cache_budget: float = 1.0
    patch_controlnet: bool = False
    cuda_graphs: bool = False

    @classmethod
    def of(cls, preset: str | Path | None, given: Mapping[str, Any]) -> Settings:
        """The settings of a preset, or of a file that `agentsd.tune` saved, or the defaults, but for those ``given``.

        Raises:
            TypeError: a given name is no setting; or as `Settings`.
            ValueError: there is no such preset, or a file holds none; or as `Settings`.
            OSError: there is no such file.
        """
        if isinstance(preset, Path):
            saved = _saved(preset)
            return cls.of(saved.pop("preset", None), {**saved, **given})
        if preset is not None and not (isinstance(preset, str) and preset in PRESETS):
            allowed = ", ".join(map(repr, PRESETS))
            raise ValueError(
                f"preset={preset!r} is not allowed: expected one of {allowed}, the pathlib.Path of a file that "
                "agentsd.tune has saved, or None for the paper's schedule."
            )
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(names)}."
                raise TypeError(f"{name}={given[name]!r} is not allowed: there is no setting {name}; {hint}")
        return cls(**{**(PRESETS[preset] if preset is not None else {}), **given})

    def __post_init__(self) -> None:
        for field in fields(self):  # normalised to Python's own types: NumPy's numbers are welcome, too
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                kind = int if field.default is None else type(field.default)
                object.__setattr__(self, field.name, _converted(kind, field.name, value))
        _require(0 <= self.ratio < 1, "ratio", self.ratio, "0 <= ratio < 1, the share of the tokens to merge")
        share = "0 (never) to 1 (always), the share of the steps under agent attention"
        _require(0 <= self.agent_steps <= 1, "agent_steps", self.agent_steps, share)
        left = "0 <= agent_ratio < 1: what is not merged, 1 - agent_ratio, are the agents"
        _require(0 <= self.agent_ratio < 1, "agent_ratio", self.agent_ratio, left)
        _require(self.k_scale2 >= 0, "k_scale2", self.k_scale2, "0 or more, an exponent of the attention scale")
        finite = "-65504 to 65504, what half precision holds"
        _require(abs(self.k_shortcut) <= 65504, "k_shortcut", self.k_shortcut, finite)
        for name in ("agent_sx", "agent_sy", "sx", "sy"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more: a cell has a token to keep")
        _require(self.min_tokens >= 0, "min_tokens", self.min_tokens, "0 (patch every layer) or more")
        every = "1 (all calls are full), 2, 3, ... calls, or a share of the trajectory, above 0 and at most 0.5"
        in_range = 0 < self.cache_interval <= 0.5 or (self.cache_interval >= 1 and self.cache_interval.is_integer())
        _require(in_range, "cache_interval", self.cache_interval, every)
        _require(self.match_interval >= 1, "match_interval", self.match_interval, "1 (match in every call) or more")
        graphs = "1, since recorded calls match each time: leave out match_interval or cuda_graphs"
        _require(self.match_interval == 1 or not self.cuda_graphs, "match_interval", self.match_interval, graphs)
        _require(self.cache_branch >= 0, "cache_branch", self.cache_branch, "0 (the outermost layer) or more")
        orders = "0 (features as they were) or 1 (extrapolated)"
        _require(self.cache_order in (0, 1), "cache_order", self.cache_order, orders)
        _require(self.cache_cell >= 1, "cache_cell", self.cache_cell, "1 (cached calls attend like full ones) or more")
        sizes = "0 (cache_interval alone decides which calls are full) or more, a share of the size of the features"
        _require(self.cache_tolerance >= 0, "cache_tolerance", self.cache_tolerance, sizes)
        part = "above 0 and at most 1, the share of the calls that may be full"
        _require(0 < self.cache_budget <= 1, "cache_budget", self.cache_budget, part)
        for name in ("cache_cell", "cache_tolerance"):
            value, idle = getattr(self, name), getattr(Settings, name)
            without = (
                f"{idle}, since with cache_interval=1 no call is cached: give another cache_interval, or {name}={idle}"
            )
            _require(self.reuses or value == idle, name, value, without)
        limited = "1, since cache_tolerance=0 lets cache_interval decide: give a cache_tolerance, or leave it out"
        _require(self.cache_tolerance > 0 or self.cache_budget == 1, "cache_budget", self.cache_budget, limited)
        if self.max_downsample is not None:
            levels = "1, 2, 4, 8 or None (the highest resolution that has self-attention)"
            _require(self.max_downsample in (1, 2, 4, 8), "max_downsample", self.max_downsample, levels)
        if self.seed is not None:
            _require(0 <= self.seed < 2**64, "seed", self.seed, "0 <= seed < 2**64, or None to follow torch's seed")
        if self.sample_kv:
            for name in MERGING:
                value, default = getattr(self, name), getattr(Settings, name)
                only = f"its default {default}, since sample_kv merges no token: leave out {name} or sample_kv"
                _require(value == default, name, value, only)
            return
        for phase in self.phases:
            most = 1 - 1 / (phase.sx * phase.sy)
            prefix = "agent_" if phase.name == "agent" else ""
            strides = f"{prefix}sx={phase.sx}, {prefix}sy={phase.sy}"
            allowed = f"at most {most:g}, since {strides} keeps one token of every {phase.sx * phase.sy}"
            _require(self.ratio <= most, "ratio", self.ratio, f"{allowed}; lower the ratio or use larger strides")

    @property
    def reuses(self) -> bool:
        """Whether some calls reuse the deep features of those before."""
        return self.cache_interval != 1

    @property
    def all_full(self) -> Settings:
        """The same without feature reuse."""
        idle: dict[str, Any] = {f.name: f.default for f in fields(self) if f.name.startswith("cache_")}
        return replace(self, **idle)

    @property
    def acts(self) -> bool:
        """Whether anything is merged or sampled at all."""
        merges = self.ratio > 0 and (self.merge_attn or self.merge_crossattn or self.merge_mlp)
        return merges or self.sample_kv or self.cache_cell > 1

    @property
    def agent(self) -> Phase:
        agent_ratio = self.agent_ratio if self.merge_attn else None
        return Phase("agent", self.agent_sy, self.agent_sx, self.ratio, agent_ratio, self.sample_kv, self.min_tokens)

    @property
    def merge(self) -> Phase:
        return Phase("merge", self.sy, self.sx, self.ratio, None, self.sample_kv, self.min_tokens)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases that the schedule reaches, in its order, where calls are full."""
        if not self.ratio and not self.sample_kv:
            return (self.merge,)
        reached = ((self.agent, self.agent_steps > 0), (self.merge, self.agent_steps < 1))
        return tuple(phase for phase, holds in reached if holds)

    def phase_at(self, moment: Moment) -> Phase:
        """The phase that holds at a moment, where the call is full."""
        return self.phases[0 if moment.within_first(self.agent_steps) else -1]

    @property
    def cached(self) -> Phase | None:
        """What holds in cached calls, if it is not the phase that the schedule is in."""
        cell = self.cache_cell
        return Phase("cached", cell, cell, 0.0, sample_kv=True, min_tokens=self.min_tokens) if cell > 1 else None


def _saved(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())["settings"]
    except (ValueError, KeyError, TypeError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"preset={str(path)!r} is not allowed: the file holds no settings; agentsd.tune saves such.")
    return settings


def _converted(kind: type, name: str, value: Any) -> Any:
    is_bool = isinstance(value, bool) or type(value).__name__ == "bool"  # NumPy's is not Python's
    allowed = {
        bool: is_bool,
        int: isinstance(value, Integral) and not is_bool,
        float: isinstance(value, Real) and not is_bool,
    }
    words = {bool: "True or False", int: "an integer", float: "a number"}
    _require(allowed[kind], name, value, words[kind], error=TypeError)
    try:
        converted = kind(value)
    except OverflowError:
        converted = math.inf
    _require(math.isfinite(converted) if kind is float else True, name, value, "a finite number")
    return converted


def _require(holds: bool, name: str, value: Any, allowed: str, error: type[Exception] = ValueError) -> None:
    if not holds:
        raise error(f"{name}={value!r} is not allowed: expected {allowed}.")
