"""What a patch does, in words: as text, as HTML and as data. `agentsd.survey` finds it out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from agentsd.planner import Grid
from agentsd.schedule import Counts
from agentsd.settings import Settings

Phases = dict[str, Counts]
USUAL_STEPS = 50  # of which it tells how many calls are full


@dataclass(frozen=True)
class LayerReport:
    """One transformer block.

    Attributes:
        name: of the block in its denoiser.
        grid: height and width of its tokens.
        phases: the token counts in each phase that the schedule reaches, and in ``"cached"`` calls where these run the
            block and have counts of their own; empty where the block is not patched.
        note: why it is not patched, or what of it is not.
        seconds: that its self-attention takes in a call of two samples, by phase, and ``"unpatched"``; where measured.
    """

    name: str
    grid: Grid
    phases: Phases
    note: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Prints as a table; `to_dict` is for programs.

    Attributes:
        settings: those of the patch; None where there is none.
        latent_size: that the counts are for: of the last denoiser call, or before it the denoiser's own size.
        layers: every transformer block.
        full: how many of 50 calls are full, or may be where their errors decide; the others are cached.
        cached_share: multiply-adds of a cached call, as a share of a full one's, without the attention products.
        last: how many calls of the last trajectory were full and cached.
        cache_bytes: memory of the features that are kept for reuse at present.
    """

    settings: Settings | None
    latent_size: Grid
    layers: tuple[LayerReport, ...]
    full: int = USUAL_STEPS
    cached_share: float = 1.0
    last: dict[str, int] = field(default_factory=dict)
    cache_bytes: int = 0

    @property
    def patched(self) -> tuple[LayerReport, ...]:
        """The blocks in which something changes."""
        return tuple(layer for layer in self.layers if any(counts.changed for counts in layer.phases.values()))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __repr__(self) -> str:
        return f"<agentsd.Report: {len(self.patched)} of {len(self.layers)} transformer blocks patched>"

    def __str__(self) -> str:
        head, rows, rest = self._parts()
        return "\n".join([*head, *aligned(rows), *rest])

    def _repr_html_(self) -> str:
        """For notebooks."""
        head, rows, rest = self._parts()
        cell = "<td style='text-align:left'>{}</td>".format
        columns = [column for column in zip(*rows, strict=True) if any(column)]
        lines = ("".join(cell(escape(text)) for text in row) for row in zip(*columns, strict=True))
        table = "".join(f"<tr>{line}</tr>" for line in lines)
        before, after = ("".join(f"<p>{escape(text)}</p>" for text in texts) for texts in (head, rest))
        return f"{before}<div style='overflow-x:auto'><table>{table}</table></div>{after}"

    def _parts(self) -> tuple[list[str], list[tuple[str, ...]], list[str]]:
        """What the user gets, the table of the patched blocks, and what is to be said of the others."""
        settings = self.settings
        if settings is None:
            return ["agentsd: not patched."], [], []
        height, width = self.latent_size
        ratio = "" if settings.sample_kv else f"ratio {settings.ratio:g}, "
        blocks = f"{len(self.patched)} of {len(self.layers)} transformer blocks patched"
        head = [f"{blocks}, {ratio}for {height}x{width} latents"]
        if settings.reuses:
            share = f"a cached call runs {self.cached_share:.0%} of the denoiser"
            calls = f"{self.full} of {USUAL_STEPS} calls are full"
            if settings.cache_tolerance:
                calls = f"as many calls are full as each image needs, at most {self.full} of {USUAL_STEPS}"
            head.insert(0, f"{calls}; {share}, by multiply-adds")
            if not self.patched:
                head[1] = "attention is left as it is in all calls"
        if settings.reuses and any(self.last.values()):
            head.append("the last image: {full} full and {cached} cached calls".format(**self.last))
        head[0] = f"agentsd: {head[0]}"
        listed = [layer for layer in self.layers if layer.phases]
        names = list(dict.fromkeys(name for layer in listed for name in layer.phases))
        rows = [("block", "tokens", *(_heading(settings, name) for name in names), "")] if listed else []
        rows += [self._row(layer, names) for layer in listed]
        others: dict[str, list[str]] = {}
        for layer in self.layers:
            if not layer.phases:
                others.setdefault(layer.note, []).append(layer.name)
        rest = [f"not patched, {note}: {_listed(blocks)}" for note, blocks in others.items()]
        if settings.reuses:
            rest.append(f"feature reuse: {self.cache_bytes / 2**20:.1f} MB kept")
        if settings.cached is not None and "cached" not in names:
            rest.append("cache_cell changes nothing: the layers that cached calls run have no self-attention to patch")
        return head, rows, rest + self._gains()

    def _gains(self) -> list[str]:
        """Of what was measured, whether each phase gains anything."""
        measured = [layer for layer in self.layers if layer.seconds]
        said = []
        for name in dict.fromkeys(phase for layer in measured for phase in layer.seconds if phase != "unpatched"):
            taken = [(layer.seconds["unpatched"], layer.seconds[name]) for layer in measured if name in layer.seconds]
            before, after = (1000 * sum(times) for times in zip(*taken, strict=True))
            gains = f"saves {before - after:.2f} ms a call" if after < before else "makes images slower here"
            said.append(
                f"measured: self-attention takes {before:.2f} ms unpatched, {after:.2f} ms in the {name} phase, "
                f"which {gains}"
            )
        return said

    def _row(self, layer: LayerReport, phases: list[str]) -> tuple[str, ...]:
        height, width = layer.grid
        cells = [_cell(layer.phases[name], self.settings) if name in layer.phases else "skipped" for name in phases]
        return layer.name, f"{height}x{width} = {height * width}", *cells, layer.note


def _heading(settings: Settings, phase: str) -> str:
    if phase == "cached":
        return f"one key of each {settings.cache_cell}x{settings.cache_cell}, cached calls"
    if not settings.sample_kv and settings.ratio == 0:
        return "full calls"
    share = settings.agent_steps if phase == "agent" else 1 - settings.agent_steps
    part = "first" if phase == "agent" else "last"
    name = "agents" if phase == "agent" and settings.merge_attn else "merging"
    if settings.sample_kv:
        cell = settings.agent if phase == "agent" else settings.merge
        name = f"one key of each {cell.sy}x{cell.sx}"
    return f"{name}, {part} {share:.0%} of the steps" if share < 1 else f"{name}, all steps"


def _cell(counts: Counts, settings: Settings | None) -> str:
    if not counts.changed:
        return "unchanged"
    cost = f"(attention costs {counts.attention_cost:.0%})"
    if counts.keys:
        return f"{counts.keys} keys and values {cost}"
    if settings is not None and not settings.merge_attn:
        return f"{counts.remaining} tokens"
    agents = f", {counts.agents} agents" if counts.agents else ""
    return f"{counts.remaining} tokens{agents} {cost}"


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:2])}, ..., {names[-1]} ({len(names)} blocks)"
