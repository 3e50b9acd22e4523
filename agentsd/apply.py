"""Apply a patch to a pipeline, and undo it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, TypeVar

from agentsd.compiled import recompile
from agentsd.config import MIN_TOKENS, Settings
from agentsd.models import SUPPORTED, compiled_parts_of, controlnets_of, unet_of
from agentsd.patch import ATTRIBUTE, Patch, patch_of
from agentsd.presets import takes_preset
from agentsd.sites import find_sites
from agentsd.skip import skipped_modules

Model = TypeVar("Model")


@takes_preset
def apply_patch(
    model: Model,
    ratio: float = 0.4,
    *,
    preset: str | None = None,
    agent_steps: float = 0.4,
    agent_ratio: float = 0.95,
    agent_sx: int = 4,
    agent_sy: int = 4,
    sx: int = 2,
    sy: int = 2,
    max_downsample: int | None = None,
    k_scale2: float = 0.3,
    k_shortcut: float = 0.075,
    use_rand: bool = True,
    seed: int | None = None,
    merge_attn: bool = True,
    merge_crossattn: bool = False,
    merge_mlp: bool = False,
    sample_kv: bool = False,
    min_tokens: int = MIN_TOKENS,
    cache_interval: float = 1,
    cache_branch: int = 0,
    cache_order: int = 0,
    cache_cell: int = 1,
    patch_controlnet: bool = False,
) -> Model:
    """Make a diffusers pipeline faster, in place, without training: agent attention early, token merging late.

    A patch that is already there is replaced. `remove_patch` undoes it, `report` says what was patched.

    Args:
        model: a pipeline, or its UNet. With a UNet alone there is no scheduler to follow: the agent phase is
            ``timestep >= (1 - agent_steps) * 1000``, and feature reuse takes a call whose timestep is above the last
            one's for a new image, one at the same timestep for another call of the same step.
        ratio: share of the tokens to merge in each patched layer, at most ``1 - 1 / (sx * sy)``.
        preset: the name of a set of these settings (`agentsd.PRESETS`): ``"quality"``, ``"balanced"``, ``"fast"`` or
            ``"few_steps"``. Settings given beside it override it. None is the paper's schedule.
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
        sample_kv: instead of merging, let every token attend to the dst tokens alone, one of each cell: token
            downsampling (Smith et al. 2024, arXiv 2402.13573) with a new draw in every block and step.
        cache_interval: run the whole UNet in every ``cache_interval``-th denoiser call, and in the others its
            outermost layers alone, with the deep features from before. 1 is off. Up to 0.5 it is a share of the
            trajectory: 0.1 is a tenth of it from one whole call to the next, so every second of 20 and every fifth of
            50, and never every call. In img2img it is a share of the whole schedule, including the steps skipped at
            the start; without a scheduler the trajectory is taken for one of 25. Not where gradients are recorded.
        cache_branch: how many layers on the way down such a cheap call runs; one more runs on the way up.
        cache_order: 0 takes the deep features as they were, 1 extrapolates them from the last two whole calls, but
            the first. The second call of a trajectory is whole, too, and so is the last but one.
        cache_cell: in cheap calls, let every token attend to one token of each ``cache_cell`` x ``cache_cell`` cell
            alone, as with ``sample_kv``. Their errors average out, where those of whole calls are carried on. 1 leaves
            cheap calls to what the schedule says.
        patch_controlnet: patch the attention of the pipeline's ControlNets, too.
        min_tokens: leave the attention of layers with fewer tokens as it is, since there the patch costs more than it
            gains: the default is where both were equal on a CPU (benchmarks/NOTES.md). 0 patches all.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` or an argument is of the wrong type.
        ValueError: an argument is out of its range, or ``model`` has no layer to patch.
    """
    settings = Settings(  # `preset` is resolved by now
        ratio=ratio,
        agent_steps=agent_steps,
        agent_ratio=agent_ratio,
        agent_sx=agent_sx,
        agent_sy=agent_sy,
        sx=sx,
        sy=sy,
        max_downsample=max_downsample,
        k_scale2=k_scale2,
        k_shortcut=k_shortcut,
        use_rand=use_rand,
        seed=seed,
        merge_attn=merge_attn,
        merge_crossattn=merge_crossattn,
        merge_mlp=merge_mlp,
        sample_kv=sample_kv,
        min_tokens=min_tokens,
        cache_interval=cache_interval,
        cache_branch=cache_branch,
        cache_order=cache_order,
        cache_cell=cache_cell,
        patch_controlnet=patch_controlnet,
    )
    unet = unet_of(model)
    sites = find_sites(unet)
    found = sorted({site.downsample for site in sites if not site.skip})
    if not found:
        raise ValueError(f"{type(model).__name__} has no self-attention to patch: expected {SUPPORTED}.")
    if max_downsample is not None and max_downsample < found[0]:
        raise ValueError(
            f"max_downsample={max_downsample} is not allowed: {type(unet).__name__} has self-attention at "
            f"downsampling {', '.join(map(str, found))} only; give one of these, or None."
        )
    if not settings.acts and not settings.reuses:
        given = "ratio=0" if ratio == 0 else "merge_attn, merge_crossattn and merge_mlp all False"
        warnings.warn(f"agentsd changes nothing with {given}.", stacklevel=3)
    nets = controlnets_of(model) if patch_controlnet else {}
    if patch_controlnet and not nets:
        raise ValueError(f"patch_controlnet=True is not allowed: {type(model).__name__} has no ControlNet.")
    # ControlNets run whole in every call: their residuals reach the layers that always run
    whole = replace(settings, cache_interval=1, cache_cell=1)
    if nets and not whole.acts:
        warnings.warn(
            "patch_controlnet=True changes nothing where whole calls are left alone: give a ratio.", stacklevel=3
        )
        nets = {}
    if settings.reuses:
        skipped_modules(unet, settings.cache_branch)  # raises where features cannot be reused, before anything changes
    remove_patch(model)
    pipeline = model if hasattr(model, "unet") else None
    setattr(unet, ATTRIBUTE, Patch(unet, sites, settings, pipeline))
    for net in nets.values():
        setattr(net, ATTRIBUTE, Patch(net, find_sites(net), whole, pipeline))
    recompile(*compiled_parts_of(model))
    return model


def remove_patch(model: Model) -> Model:
    """Undo `apply_patch`, in place: no hook and no attribute of it is left. Returns ``model``, patched or not."""
    for net in (unet_of(model), *controlnets_of(model).values()):
        patch = getattr(net, ATTRIBUTE, None)
        if patch is not None:
            patch.remove(net)
            delattr(net, ATTRIBUTE)
            recompile(*compiled_parts_of(model))
    return model


@contextmanager
def patched(model: Model, *ratio: float, **settings: Any) -> Iterator[Model]:
    """`apply_patch`, with its arguments, for a ``with`` block; afterwards ``model`` is as it was, patched or not."""
    before = patch_of(model)
    pipeline = before.trajectory.pipeline if before is not None else None
    apply_patch(model, *ratio, **settings)
    try:
        yield model
    finally:
        remove_patch(model)
        if before is not None:
            apply_patch(pipeline if pipeline is not None else model, **asdict(before.settings))
