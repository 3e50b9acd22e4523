"""Apply a patch to a pipeline, and undo it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from agentsd.hosts import host_of
from agentsd.idle import idle
from agentsd.models import SUPPORTED, controlnets_of, denoiser_of
from agentsd.patch import Patch, patch_of
from agentsd.settings import Settings
from agentsd.wrapping import Weakly

# what settings become where full calls are evenly spread, and where attention is left as it is
EVENLY: dict[str, Any] = {"cache_tolerance": 0.0, "cache_budget": 1.0}
ATTENTION_LEFT: dict[str, Any] = {"ratio": 0.0, "sample_kv": False, "cache_cell": 1, "match_interval": 1}
ATTENTION_LEFT |= {"max_downsample": None}

Model = TypeVar("Model")
Function = TypeVar("Function", bound=Callable[..., Any])


def _with_settings(function: Function) -> Function:
    """Each setting by its name and default, and what it does, for `help` and notebooks."""
    own = inspect.signature(function)
    *first, _ = own.parameters.values()
    rest = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(Settings)
        if field.name != "ratio"
    ]
    function.__signature__ = own.replace(parameters=[*first, *rest])  # type: ignore[attr-defined]
    described = (Settings.__doc__ or "").partition("Attributes:\n")[2].partition("    Raises:")[0].rstrip()
    function.__doc__ = (function.__doc__ or "").replace("        settings: as `Settings` documents them.", described)
    return function


@_with_settings
def apply_patch(
    model: Model, ratio: float | None = None, *, preset: str | Path | None = None, **settings: Any
) -> Model:
    """Make a diffusers pipeline faster, in place, without training: agent attention early, token merging late.

    A patch that is already there is replaced. `remove_patch` undoes it, `report` says what was patched.

    Args:
        model: a pipeline, or its denoiser. With a denoiser alone there is no scheduler to follow: the place in the
            trajectory is that of the timestep in the schedule that it is an element of, or else in the training
            timesteps.
        ratio: share of the tokens to merge in each patched layer, 0.4 unless a preset says otherwise.
        preset: the name of a set of settings (`agentsd.PRESETS`): ``"quality"``, ``"balanced"``, ``"adaptive"``,
            ``"fast"`` or ``"few_steps"``, or the `pathlib.Path` of a file that `agentsd.tune` has saved. Settings
            given beside it override it. None is the paper's schedule.
        settings: as `Settings` documents them.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` or an argument is of the wrong type, or there is no such setting.
        ValueError: an argument is out of its range, or ``model`` has no layer to patch.
        RuntimeError: in the middle of a call of a patched denoiser.
    """
    net = denoiser_of(model)
    given = settings if ratio is None else {"ratio": ratio, **settings}
    chosen = settings_for(net, preset, **given)
    _name_idle(net, chosen, given)
    pipeline = model if hasattr(model, "scheduler") else None
    patch = Patch(net, chosen, pipeline)  # may raise: before anything changes
    patch.nets = [(Weakly(other), Patch(other, chosen.all_full, pipeline)) for other in _controlnets(model, chosen)]
    remove_patch(model)
    if patch_of(model) is not None:
        raise RuntimeError(
            "agentsd: a denoiser cannot be patched anew in the middle of its own call: do it between two."
        )
    patch.attach(net)
    return model


def settings_for(net: nn.Module, /, preset: str | Path | None = None, **given: Any) -> Settings:
    """The settings that `apply_patch` patches a denoiser with: checked, and without what decides nothing there.

    Raises:
        TypeError, ValueError: as `apply_patch`.
    """
    chosen, host = Settings.of(preset, given), host_of(net)
    every, kind = host.sites(net), type(net).__name__
    sites = [site for site in every if not site.skip]
    found = sorted({site.downsample for site in sites})
    if not every:
        raise ValueError(f"{kind} has no self-attention to patch that agentsd knows: expected {SUPPORTED}.")
    if not found and not (chosen.reuses or chosen.cuda_graphs):
        raise ValueError(
            f"of a {kind} features can be reused, and attention is left as it is: give a preset that reuses features, "
            "such as preset='balanced'."
        )
    if not found:
        chosen = replace(chosen, **ATTENTION_LEFT)
    for name in ("merge_crossattn", "merge_mlp"):
        if getattr(chosen, name) and any(site.joint for site in sites):
            raise ValueError(
                f"{name}=True is not allowed: blocks of {kind} have joint attention, around which alone tokens merge; "
                f"leave out {name}."
            )
    if chosen.max_downsample is not None and chosen.max_downsample < found[0]:
        raise ValueError(
            f"max_downsample={chosen.max_downsample} is not allowed: {kind} has self-attention at downsampling "
            f"{', '.join(map(str, found))} only; give one of these, or None."
        )
    if chosen.cache_tolerance and not host.middle(net, chosen.cache_branch).lines:  # full calls are evenly spread
        chosen = replace(chosen, **EVENLY)
    return chosen


def _name_idle(net: nn.Module, chosen: Settings, given: Mapping[str, Any]) -> None:
    if not chosen.acts and not chosen.reuses and not chosen.cuda_graphs:
        why = "ratio=0" if chosen.ratio == 0 else "merge_attn, merge_crossattn and merge_mlp all False"
        warnings.warn(f"agentsd changes nothing with {why}.", stacklevel=3)
        return
    reasons = idle(chosen, given)
    undone = [name for name in given if given[name] != getattr(chosen, name)]
    evenly = "the full calls of a {} are evenly spread, which is nearer than to go by errors"
    for why, changed in ((evenly, EVENLY), ("the attention of a {} is left as it is", ATTENTION_LEFT)):
        if names := [name for name in undone if name in changed]:
            reasons[why.format(type(net).__name__)] = names
    for why, names in reasons.items():
        listed = ", ".join(f"{name}={given[name]!r}" for name in names)
        warnings.warn(f"agentsd: nothing comes of {listed}: {why}.", stacklevel=3)


def _controlnets(model: Any, settings: Settings) -> list[nn.Module]:
    """The ControlNets to be patched. All of their calls are full: their residuals reach the layers that always run."""
    nets = [*controlnets_of(model).values()] if settings.patch_controlnet else []
    if settings.patch_controlnet and not nets:
        raise ValueError(f"patch_controlnet=True is not allowed: {type(model).__name__} has no ControlNet.")
    if nets and not settings.all_full.acts:
        warnings.warn(
            "patch_controlnet=True changes nothing where full calls are left alone: give a ratio.", stacklevel=3
        )
        return []
    return nets


def remove_patch(model: Model) -> Model:
    """Undo `apply_patch`, in place: no hook and no attribute of it is left. Returns ``model``, patched or not."""
    for net in (denoiser_of(model), *controlnets_of(model).values()):
        if (patch := patch_of(net)) is not None:
            patch.detach(net)
    return model


@contextmanager
def patched(model: Model, ratio: float | None = None, **settings: Any) -> Iterator[Model]:
    """`apply_patch`, with its arguments, for a ``with`` block; afterwards ``model`` is as it was, patched or not."""
    with without_patch(model):
        yield apply_patch(model, ratio, **settings)


@contextmanager
def without_patch(model: Model) -> Iterator[Model]:
    """`remove_patch` for a ``with`` block; afterwards ``model`` is as it was, patched or not."""
    before = patch_of(model)
    remove_patch(model)
    try:
        yield model
    finally:
        remove_patch(model)
        if before is not None:
            before.attach(denoiser_of(model))
