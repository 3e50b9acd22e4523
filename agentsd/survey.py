"""Asks host, planner and layers what a patch does to each transformer block, and what it leaves alone and why."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from agentsd.block import PatchedBlock
from agentsd.control import most_full
from agentsd.costs import attention_seconds
from agentsd.hosts import Site, host_of
from agentsd.models import controlnets_of, denoiser_of
from agentsd.patch import Patch, patch_of
from agentsd.planner import plan
from agentsd.reports import USUAL_STEPS, LayerReport, Phases, Report
from agentsd.schedule import Counts, Moment
from agentsd.settings import Settings


def report(model: Any, measure: bool = False) -> Report:
    """What the patch on ``model`` does to each transformer block, at the size it last ran at.

    Args:
        measure: also time the self-attention of each patched block, with and without the patch, where the model is: on
            a fast GPU merging can cost more than it gains.

    Raises:
        TypeError: ``model`` is neither a pipeline with a denoiser nor a denoiser.
    """
    net, patch = denoiser_of(model), patch_of(model)
    if patch is None:
        sites = host_of(net).sites(net)
        return Report(None, (0, 0), tuple(LayerReport(site.name, (0, 0), {}, "there is no patch") for site in sites))
    layers = _layers(net, patch, measure)
    for prefix, other in controlnets_of(model).items():
        layers += [replace(layer, name=f"{prefix}.{layer.name}") for layer in _controlnet_layers(other, measure)]
    full = most_full(USUAL_STEPS, patch.settings, not patch.middle.lines)
    share = patch.host.outer_share(net, patch.middle, *patch.latent_size) if patch.settings.reuses else 1.0
    kept = patch.reuse.nbytes if patch.reuse is not None else 0
    return Report(patch.settings, patch.latent_size, tuple(layers), full, share, patch.calls, kept)


def _controlnet_layers(net: Any, measure: bool) -> list[LayerReport]:
    if (patch := patch_of(net)) is not None:
        return _layers(net, patch, measure)
    note = "part of a ControlNet (patch_controlnet=True patches these)"
    return [LayerReport(site.name, (0, 0), {}, note) for site in host_of(net).sites(net)]


def _layers(net: Any, patch: Patch, measure: bool) -> list[LayerReport]:
    """Asks the planner what is to become of each block in a call of each kind, and its layer what it can do of it."""
    settings, size = patch.settings, patch.latent_size
    grids, levels = patch.grids(net, size), patch.host.grids(net, *size)
    moments = {"agent": Moment(0, 10**6), "merge": Moment(10**6, 10**6)}
    planned_at = partial(plan, settings, grids=grids, outermost=patch.outermost)
    plans = {phase.name: planned_at(moments[phase.name], cached=False) for phase in settings.phases}
    if settings.cached is not None:
        plans["cached"] = planned_at(moments["merge"], cached=True)
    known = [phase for phase in (*settings.phases, settings.cached) if phase is not None]
    blocks, modules = {block.site: block for block in patch.blocks}, dict(net.named_modules())
    layers = []
    for site in patch.sites:
        grid, block = levels[site.level], blocks.get(site)
        if block is None:
            layers.append(LayerReport(site.name, grid, {}, _why_not(site, settings)))
            continue
        unchanged = Counts(grid[0] * grid[1])
        names = [name for name in plans if name != "cached" or patch.outermost[block.index]]
        planned = {name: plans[name].counts.get(block.index, unchanged) for name in names}
        attn = modules.get(f"{site.name}.{site.layers[0]}")
        phases, notes = _done(planned, unchanged, block, attn)
        timed = measure and hasattr(attn, "processor") and not site.joint
        seconds = attention_seconds(block, attn, grid, known, phases) if timed else {}
        if measure and not seconds:
            why = "attention is joint" if site.joint else "weights are not computed with as they are"
            notes.append(f"not timed: its {why}")
        layers.append(LayerReport(site.name, grid, phases, "; ".join(dict.fromkeys(notes)), seconds))
    return layers


def _done(planned: Phases, unchanged: Counts, block: PatchedBlock, attn: Any) -> tuple[Phases, list[str]]:
    """What a block does of what is planned for it in each phase, and why no more."""
    settings = block.settings
    if unchanged.tokens < settings.min_tokens:
        return planned, [f"unchanged: fewer tokens than min_tokens={settings.min_tokens}"]
    if not hasattr(attn, "processor"):
        return dict.fromkeys(planned, unchanged), ["left alone: it has been replaced since"]
    phases, notes = dict(planned), list[str]()
    for name, counts in planned.items():
        if counts.keys or settings.merge_attn:
            phases[name], why = block.possible(attn, counts)
            why = f"left alone: {why}" if phases[name] == unchanged and why else why
            notes.append(f"{why} in cached calls" if why and name == "cached" else why)
    agents = planned.get("agent", unchanged)
    if agents.merged and not agents.agents:
        few = "too few tokens are merged away for them to be cheaper than attention"
        notes.append(f"no agents: {few if settings.merge_attn else 'self-attention is not merged'}")
    if {"processor", "keys"} & block.aside.keys():  # of whole calls, not of a size that was met once
        phases = dict.fromkeys(phases, unchanged)
    said = "; ".join(notes)
    return phases, [*filter(None, notes), *(f"left alone: {why}" for why in block.aside.values() if why not in said)]


def _why_not(site: Site, settings: Settings) -> str:
    if not settings.acts and not site.skip:
        return "nothing is to be merged"
    limit = "max_downsample" if settings.max_downsample else "the highest resolution with self-attention"
    return site.skip or f"lower resolution (downsampling {site.downsample}) than {limit}"
