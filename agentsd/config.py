"""The settings of a patch, validated once, and what they mean for a grid of tokens in each phase of the schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

MIN_TOKENS = 1024  # where the paper's schedule is as fast as fused attention, as measured (benchmarks/NOTES.md)
# the settings that say how tokens are merged, and are idle where keys and values are sampled instead
MERGING = {"ratio", "agent_ratio", "k_scale2", "k_shortcut", "merge_attn", "merge_crossattn", "merge_mlp"}


@dataclass(frozen=True)
class Counts:
    """What becomes of the N tokens of one layer in one phase.

    Attributes:
        tokens: N, the tokens of the grid.
        merged: r, how many src tokens are merged away; 0 means that the layer is left as it is.
        agents: how many agent tokens mediate the attention; 0 means softmax attention.
        keys: how many tokens stay keys and values where these are sampled; 0 means that they are not.
    """

    tokens: int
    merged: int
    agents: int
    keys: int = 0

    @property
    def changed(self) -> bool:
        return self.merged > 0 or self.keys > 0

    @property
    def remaining(self) -> int:
        return self.tokens - self.merged


@dataclass(frozen=True)
class Phase:
    """One part of the denoising trajectory: how tokens are merged there, and by how much for agents.

    Attributes:
        name: ``"agent"`` or ``"merge"``, or ``"cheap"`` for calls that reuse deep features.
        sy, sx: the cell of the token grid that keeps one dst token.
        ratio: share of the tokens to merge.
        agent_ratio: share of the tokens to merge into agents; None where attention stays softmax attention.
        sample_kv: merge nothing, and keep the dst tokens alone as keys and values.
        min_tokens: grids of fewer tokens are left as they are.
    """

    name: str
    sy: int
    sx: int
    ratio: float
    agent_ratio: float | None = None
    sample_kv: bool = False
    min_tokens: int = 0

    def counts(self, height: int, width: int) -> Counts:
        """The token counts on a ``height`` x ``width`` grid.

        Agents pay only where the two products with them are cheaper than the one they replace, that is where
        ``2 * agents < tokens - merged``; elsewhere the layer merges tokens and keeps softmax attention.
        """
        tokens = height * width
        dst = (height // self.sy) * (width // self.sx)
        src = tokens - dst
        if src == tokens or tokens < self.min_tokens:  # a grid smaller than a cell has no dst
            return Counts(tokens, 0, 0)
        if self.sample_kv:
            return Counts(tokens, 0, 0, keys=dst if src else 0)
        merged = min(int(tokens * self.ratio), src)
        if merged == 0 or self.agent_ratio is None:
            return Counts(tokens, merged, 0)
        agents = tokens - min(int(tokens * self.agent_ratio), src)
        return Counts(tokens, merged, agents if 2 * agents < tokens - merged else 0)


@dataclass(frozen=True)
class Settings:
    """The arguments of `agentsd.apply_patch`, which documents them.

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
    sample_kv: bool = False
    min_tokens: int = MIN_TOKENS
    cache_interval: float = 1.0
    cache_branch: int = 0
    cache_order: int = 0
    cache_cell: int = 1
    patch_controlnet: bool = False

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
        for name in ("agent_sx", "agent_sy", "sx", "sy"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more: a cell has a token to keep")
        _require(self.min_tokens >= 0, "min_tokens", self.min_tokens, "0 (patch every layer) or more")
        every = "1 (all calls are whole), 2, 3, ... calls, or a share of the trajectory, above 0 and at most 0.5"
        in_range = 0 < self.cache_interval <= 0.5 or (self.cache_interval >= 1 and self.cache_interval.is_integer())
        _require(in_range, "cache_interval", self.cache_interval, every)
        _require(self.cache_branch >= 0, "cache_branch", self.cache_branch, "0 (the outermost layer) or more")
        orders = "0 (features as they were) or 1 (extrapolated)"
        _require(self.cache_order in (0, 1), "cache_order", self.cache_order, orders)
        _require(self.cache_cell >= 1, "cache_cell", self.cache_cell, "1 (cheap calls attend like whole ones) or more")
        if self.cache_cell > 1:
            without = "1, since with cache_interval=1 no call is cheap: give another cache_interval, or cache_cell=1"
            _require(self.reuses, "cache_cell", self.cache_cell, without)
        if self.max_downsample is not None:
            levels = "1, 2, 4, 8 or None (the highest resolution that has self-attention)"
            _require(self.max_downsample in (1, 2, 4, 8), "max_downsample", self.max_downsample, levels)
        if self.seed is not None:
            _require(0 <= self.seed < 2**64, "seed", self.seed, "0 <= seed < 2**64, or None to follow torch's seed")
        if self.sample_kv:
            self._require_no_merging()
            return
        for phase in self.phases:
            most = 1 - 1 / (phase.sx * phase.sy)
            prefix = "agent_" if phase.name == "agent" else ""
            strides = f"{prefix}sx={phase.sx}, {prefix}sy={phase.sy}"
            allowed = f"at most {most:g}, since {strides} keeps one token of every {phase.sx * phase.sy}"
            _require(self.ratio <= most, "ratio", self.ratio, f"{allowed}; lower the ratio or use larger strides")

    def _require_no_merging(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in MERGING and value != field.default:
                only = f"its default {field.default}, since sample_kv merges no token: leave out {field.name}"
                _require(False, field.name, value, f"{only} or sample_kv")

    @property
    def reuses(self) -> bool:
        """Whether some calls reuse the deep features of those before."""
        return self.cache_interval != 1

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
        """The phases that the schedule reaches, in its order, where calls are whole."""
        if not self.ratio and not self.sample_kv:
            return (self.merge,)
        reached = ((self.agent, self.agent_steps > 0), (self.merge, self.agent_steps < 1))
        return tuple(phase for phase, holds in reached if holds)

    @property
    def cheap(self) -> Phase | None:
        """What holds in cheap calls, if it is not the phase that the schedule is in."""
        cell = self.cache_cell
        return Phase("cheap", cell, cell, 0.0, sample_kv=True, min_tokens=self.min_tokens) if cell > 1 else None


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
