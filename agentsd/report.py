"""What a patch does, layer by layer, and what it leaves alone and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from html import escape
from typing import Any

from agentsd.config import Counts, Settings
from agentsd.models import controlnets_of, unet_of
from agentsd.patch import ATTRIBUTE, Patch, patch_of
from agentsd.processor import can_sample_kv, can_use_agents
from agentsd.reuse import interval_of
from agentsd.sites import Site, find_sites, grids
from agentsd.skip import skipped_modules


@dataclass(frozen=True)
class LayerReport:
    """One transformer block.

    Attributes:
        name: of the block in its UNet.
        grid: height and width of its tokens.
        phases: the token counts in each phase that the schedule reaches, and in ``"cheap"`` calls where these run the
            block and have counts of their own; empty where the block is not patched.
        note: why it is not patched, or why it has no agents.
    """

    name: str
    grid: tuple[int, int]
    phases: dict[str, Counts]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Prints as a table; `to_dict` is for programs.

    Attributes:
        settings: those of the patch; None where there is none.
        latent_size: that the counts are for: of the last denoiser call, or before it the UNet's own size.
        layers: every transformer block of the UNet.
        cache_bytes: memory of the features that are kept for reuse at present.
    """

    settings: Settings | None
    latent_size: tuple[int, int]
    layers: tuple[LayerReport, ...]
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
        return "\n".join([head, *_aligned(rows), *rest])

    def _repr_html_(self) -> str:
        """For notebooks."""
        head, rows, rest = self._parts()
        cell = "<td style='text-align:left'>{}</td>".format
        lines = ("".join(cell(escape(text)) for text in row) for row in rows)
        table = "".join(f"<tr>{line}</tr>" for line in lines)
        notes = "".join(f"<p>{escape(note)}</p>" for note in rest)
        return f"<p>{escape(head)}</p><table>{table}</table>{notes}"

    def _parts(self) -> tuple[str, list[tuple[str, ...]], list[str]]:
        """The summary, the table of the patched blocks (empty without any), and what is to be said of the others."""
        if self.settings is None:
            return "agentsd: not patched.", [], []
        height, width = self.latent_size
        ratio = "" if self.settings.sample_kv else f"ratio {self.settings.ratio:g}, "
        head = (
            f"agentsd: {len(self.patched)} of {len(self.layers)} transformer blocks patched, "
            f"{ratio}for {height}x{width} latents"
        )
        rows = []
        listed = [layer for layer in self.layers if layer.phases]
        names = dict.fromkeys(name for layer in listed for name in layer.phases)
        if listed:
            headings = (_heading(self.settings, name) for name in names)
            rows = [("block", "tokens", *headings), *(self._row(layer, list(names)) for layer in listed)]
        others: dict[str, list[str]] = {}
        for layer in self.layers:
            if not layer.phases:
                others.setdefault(layer.note, []).append(layer.name)
        rest = [f"not patched, {note}: {_listed(blocks)}" for note, blocks in others.items()]
        if self.settings.reuses:
            second = ", counted back from the last but one, and the first two" if self.settings.cache_order else ""
            layers = "one layer" if self.settings.cache_branch == 0 else f"{2 * self.settings.cache_branch + 1} layers"
            rest.append(
                f"feature reuse: whole calls are {_every(self.settings.cache_interval)}{second}; "
                f"the others run {layers}; {self.cache_bytes / 2**20:.1f} MB kept"
            )
        if self.settings.cheap is not None and "cheap" not in names:
            rest.append("cache_cell changes nothing: the layers that cheap calls run have no self-attention to patch")
        return head, rows, rest

    def _row(self, layer: LayerReport, phases: list[str]) -> tuple[str, ...]:
        height, width = layer.grid
        cells = [_cell(layer.phases[name], self.settings) if name in layer.phases else "skipped" for name in phases]
        return layer.name, f"{height}x{width} = {height * width}", *cells, layer.note


def _every(interval: float) -> str:
    if interval >= 1:
        return f"one in {interval:g}"
    return ", ".join(f"one in {interval_of(interval, calls)} where there are {calls}" for calls in (20, 50))


def _heading(settings: Settings, phase: str) -> str:
    if phase == "cheap":
        return f"one key of each {settings.cache_cell}x{settings.cache_cell}, cheap calls"
    if not settings.sample_kv and settings.ratio == 0:
        return "whole calls"
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
    if counts.keys:
        return f"{counts.keys} keys and values (attention costs {attention_cost(counts):.0%})"
    if settings is not None and not settings.merge_attn:
        return f"{counts.remaining} tokens"
    agents = f", {counts.agents} agents" if counts.agents else ""
    return f"{counts.remaining} tokens{agents} (attention costs {attention_cost(counts):.0%})"


def attention_cost(counts: Counts) -> float:
    """Multiply-adds of the attention products, as a share of unpatched attention's N x N."""
    if counts.keys:
        return counts.keys / counts.tokens
    m, a = counts.remaining, counts.agents
    return (2 * m * a if a else m * m) / counts.tokens**2


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    columns = max(map(len, rows), default=0)
    padded = [(*row, *[""] * (columns - len(row))) for row in rows]
    widths = [max(len(row[i]) for row in padded) for i in range(columns)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in padded]


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:2])}, ..., {names[-1]} ({len(names)} blocks)"


def report(model: Any) -> Report:
    """What the patch on ``model`` does to each transformer block, at the size it last ran at.

    Raises:
        TypeError: ``model`` is neither a pipeline with a UNet nor a UNet.
    """
    unet, patch = unet_of(model), patch_of(model)
    if patch is None:
        return Report(
            None, (0, 0), tuple(LayerReport(s.name, (0, 0), {}, "there is no patch") for s in find_sites(unet))
        )
    layers = _layers(unet, patch)
    for name, net in controlnets_of(model).items():
        layers += _controlnet_layers(name, net)
    return Report(
        patch.settings, patch.latent_size, tuple(layers), patch.reuse.nbytes if patch.reuse is not None else 0
    )


def _layers(net: Any, patch: Patch) -> list[LayerReport]:
    level_grids = grids(net, *patch.latent_size)
    return [_layer(net, patch, site, level_grids[site.level]) for site in patch.sites]


def _controlnet_layers(name: str, net: Any) -> list[LayerReport]:
    patch = getattr(net, ATTRIBUTE, None)
    if patch is None:
        note = "part of a ControlNet (patch_controlnet=True patches these)"
        return [LayerReport(f"{name}.{site.name}", (0, 0), {}, note) for site in find_sites(net)]
    return [replace(layer, name=f"{name}.{layer.name}") for layer in _layers(net, patch)]


def _layer(unet: Any, patch: Patch, site: Site, grid: tuple[int, int]) -> LayerReport:
    settings = patch.settings
    if site not in [block.site for block in patch.blocks]:
        limit = "max_downsample" if settings.max_downsample else "the highest resolution with self-attention"
        note = site.skip or f"lower resolution (downsampling {site.downsample}) than {limit}"
        if not settings.acts:
            note = "nothing is to be merged"
        return LayerReport(site.name, grid, {}, note)
    attn, unchanged, note = unet.get_submodule(site.name).attn1, Counts(grid[0] * grid[1], 0, 0), ""
    phases = {phase.name: phase.counts(*grid) for phase in settings.phases}
    agent = phases.get("agent")
    if settings.cheap is not None and not _is_skipped(unet, settings.cache_branch, site):
        phases["cheap"] = settings.cheap.counts(*grid) if can_sample_kv(attn) else unchanged
    if grid[0] * grid[1] < settings.min_tokens:
        note = f"unchanged: fewer tokens than min_tokens={settings.min_tokens}"
    elif settings.sample_kv and not can_sample_kv(attn):
        note = f"unchanged: {type(attn.processor).__name__} cannot sample keys and values"
        phases = dict.fromkeys(phases, unchanged)
    elif agent is not None and agent.merged:
        if not settings.merge_attn:
            note = "no agents: self-attention is not merged"
        elif not can_use_agents(attn):
            note = f"no agents: {type(attn.processor).__name__} is kept and gets merged tokens"
            phases["agent"] = Counts(agent.tokens, agent.merged, 0)
        elif not agent.agents:
            note = "no agents: too few tokens are merged away for them to be cheaper than attention"
    elif "cheap" in phases and not can_sample_kv(attn):
        note = f"{type(attn.processor).__name__} cannot sample keys and values in cheap calls"
    return LayerReport(site.name, grid, phases, note)


def _is_skipped(unet: Any, branch: int, site: Site) -> bool:
    """Whether cheap calls skip the block."""
    return any(site.name.startswith(f"{name}.") for name in skipped_modules(unet, branch))
