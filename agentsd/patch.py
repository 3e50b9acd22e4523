"""Apply a patch to a pipeline, and undo it."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from agentsd.block import PatchedBlock
from agentsd.compiled import outside_the_graph, recompile
from agentsd.config import Settings, with_preset
from agentsd.matching import partition
from agentsd.reuse import Reuse
from agentsd.schedule import Trajectory
from agentsd.sites import Site, find_sites, grids

Model = TypeVar("Model")
ATTRIBUTE = "_agentsd_patch"
SUPPORTED = (
    "a diffusers pipeline with a UNet of Stable Diffusion 1.x, 2.x or XL (StableDiffusionPipeline, "
    "StableDiffusionXLPipeline, their img2img, inpaint and ControlNet variants), or such a UNet2DConditionModel"
)


class Patch:
    """A patched UNet's state: its settings, its blocks, and the handles that undo it.

    As the UNet's forward pre-hook it plans each denoiser call: which phase holds, and how each block's grid divides
    into src and dst tokens.
    """

    def __init__(self, unet: nn.Module, sites: list[Site], settings: Settings, pipeline: Any = None) -> None:
        self.settings = settings
        self.trajectory = Trajectory(pipeline)
        self.sites = sites
        self.blocks = [PatchedBlock(site, settings) for site in selected(self.sites, settings)]
        self.latent_size = _sample_size(unet)
        self._plan: tuple[Any, ...] | None = None
        self._warned: set[tuple[int, int]] = set()
        self._handles = [
            unet.register_forward_pre_hook(self._before_call, with_kwargs=True),
            unet.register_forward_hook(self._after_call),
        ]
        self.reuse: Reuse | None = None
        if settings.cache_interval > 1:
            self.reuse = Reuse(settings.cache_interval, settings.cache_branch, settings.cache_order)
            self.reuse.attach(unet)
        for patched_block in self.blocks:
            self._handles += patched_block.attach(unet.get_submodule(patched_block.site.name))

    def remove(self, unet: nn.Module) -> None:
        for handle in self._handles:
            handle.remove()
        if self.reuse is not None:
            self.reuse.detach(unet)

    @outside_the_graph
    def _after_call(self, unet: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.reuse is not None:
            self.reuse.after_call()

    @outside_the_graph
    def _before_call(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample: Tensor = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        settings = self.settings
        height, width = sample.shape[-2:]
        self.latent_size = (height, width)
        step, phase = None, settings.phases[0]
        if self.reuse is not None or (self.blocks and (settings.use_rand or len(settings.phases) > 1)):
            moment = self.trajectory.locate(timestep)
            step = moment.step if settings.use_rand else None
            phase = settings.agent if moment.within_first(settings.agent_steps) else settings.merge
            if self.reuse is not None:
                self.reuse.before_call((moment.run, sample.shape, sample.dtype, sample.device), moment.call)
        seed = torch.initial_seed() if settings.seed is None and settings.use_rand else settings.seed
        plan = (height, width, phase, step, seed)
        if plan != self._plan:
            self._plan = plan
            level_grids = grids(unet, height, width)
            for index, block in enumerate(self.blocks):
                grid = level_grids[block.site.level]
                block.counts = phase.counts(*grid)
                generator = None if step is None else _generator(seed, step, index)
                block.partition = None
                if block.counts.changed:
                    block.partition = partition(*grid, phase.sy, phase.sx, generator).to(sample.device)
            self._warn_where_nothing_merges(level_grids)

    def _warn_where_nothing_merges(self, level_grids: list[tuple[int, int]]) -> None:
        size, patched_levels = level_grids[0], {block.site.level for block in self.blocks}
        merging = any(
            phase.counts(*level_grids[level]).changed for phase in self.settings.phases for level in patched_levels
        )
        if self.blocks and not merging and size not in self._warned:
            self._warned.add(size)
            warnings.warn(
                f"agentsd changes nothing at this size: ratio={self.settings.ratio:g} of {size[0]}x{size[1]} latents "
                "merges no token. Use a larger image, a larger ratio, or smaller strides.",
                stacklevel=2,
            )


def _generator(seed: int | None, step: int, index: int) -> torch.Generator:
    """A generator of this block's draw at this step alone: the same however often, and in what order, it is asked."""
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def selected(sites: list[Site], settings: Settings) -> list[Site]:
    """The sites that ``settings`` patch: by default those of the highest resolution that has self-attention."""
    usable = [site for site in sites if not site.skip] if settings.acts else []
    limit = settings.max_downsample or min((site.downsample for site in usable), default=0)
    return [site for site in usable if site.downsample <= limit]


def _sample_size(unet: nn.Module) -> tuple[int, int]:
    size = getattr(getattr(unet, "config", None), "sample_size", None) or 64
    return (size, size) if isinstance(size, int) else tuple(size)


def unet_of(model: Any) -> nn.Module:
    """The UNet of a pipeline, or the model itself; without what ``torch.compile`` puts around it.

    Raises:
        TypeError: ``model`` is neither.
    """
    unet = getattr(model, "unet", model)
    unet = getattr(unet, "_orig_mod", unet)
    if not isinstance(unet, nn.Module):
        raise TypeError(f"cannot patch a {type(model).__name__}: expected {SUPPORTED}.")
    return unet


def controlnets_of(model: Any) -> dict[str, nn.Module]:
    """The ControlNets of a pipeline, by name."""
    net = getattr(model, "controlnet", None)
    if not isinstance(net, nn.Module):
        return {}
    nets = getattr(net, "nets", None)
    return {f"controlnet.nets.{i}": n for i, n in enumerate(nets)} if nets is not None else {"controlnet": net}


def patch_of(model: Any) -> Patch | None:
    """The patch on ``model``, if there is one."""
    patch: Patch | None = getattr(unet_of(model), ATTRIBUTE, None)
    return patch


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
    min_tokens: int = 0,
    cache_interval: int = 1,
    cache_branch: int = 0,
    cache_order: int = 0,
    patch_controlnet: bool = False,
) -> Model:
    """Make a diffusers pipeline faster, in place, without training: agent attention early, token merging late.

    A patch that is already there is replaced. `remove_patch` undoes it, `report` says what was patched.

    Args:
        model: a pipeline, or its UNet. With a UNet alone there is no scheduler to follow, and the agent phase is
            ``timestep >= (1 - agent_steps) * 1000``.
        ratio: share of the tokens to merge in each patched layer, at most ``1 - 1 / (sx * sy)``.
        preset: the name of a set of these settings (`agentsd.PRESETS`): ``"quality"``, ``"balanced"`` or ``"fast"``.
            Settings given beside it, other than their defaults, go before it. None is the paper's schedule.
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
            outermost layers alone, with the deep features from before. 1 is off. Not where gradients are recorded.
        cache_branch: how many layers on the way down such a cheap call runs; one more runs on the way up.
        cache_order: 0 takes the deep features as they were, 1 extrapolates them from the last two whole calls.
        patch_controlnet: patch the attention of the pipeline's ControlNets, too.
        min_tokens: leave layers of fewer tokens as they are, where a patch costs more than it gains; 0 patches all.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` or an argument is of the wrong type.
        ValueError: an argument is out of its range, or ``model`` has no layer to patch.
    """
    arguments: dict[str, Any] = {
        "ratio": ratio,
        "agent_steps": agent_steps,
        "agent_ratio": agent_ratio,
        "agent_sx": agent_sx,
        "agent_sy": agent_sy,
        "sx": sx,
        "sy": sy,
        "max_downsample": max_downsample,
        "k_scale2": k_scale2,
        "k_shortcut": k_shortcut,
        "use_rand": use_rand,
        "seed": seed,
        "merge_attn": merge_attn,
        "merge_crossattn": merge_crossattn,
        "merge_mlp": merge_mlp,
        "sample_kv": sample_kv,
        "min_tokens": min_tokens,
        "cache_interval": cache_interval,
        "cache_branch": cache_branch,
        "cache_order": cache_order,
        "patch_controlnet": patch_controlnet,
    }
    settings = Settings(**with_preset(preset, arguments))
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
    if not settings.acts and settings.cache_interval == 1:
        given = "ratio=0" if ratio == 0 else "merge_attn, merge_crossattn and merge_mlp all False"
        warnings.warn(f"agentsd changes nothing with {given}.", stacklevel=2)
    nets = controlnets_of(model) if patch_controlnet else {}
    if patch_controlnet and not nets:
        raise ValueError(f"patch_controlnet=True is not allowed: {type(model).__name__} has no ControlNet.")
    remove_patch(model)
    pipeline = model if hasattr(model, "unet") else None
    setattr(unet, ATTRIBUTE, Patch(unet, sites, settings, pipeline))
    for net in nets.values():  # these run whole in every call: their residuals reach the layers that always run
        setattr(net, ATTRIBUTE, Patch(net, find_sites(net), replace(settings, cache_interval=1), pipeline))
    recompile(model)
    return model


def remove_patch(model: Model) -> Model:
    """Undo `apply_patch`, in place: no hook and no attribute of it is left. Returns ``model``, patched or not."""
    for net in (unet_of(model), *controlnets_of(model).values()):
        patch = getattr(net, ATTRIBUTE, None)
        if patch is not None:
            patch.remove(net)
            delattr(net, ATTRIBUTE)
            recompile(model)
    return model


@contextmanager
def patched(model: Model, ratio: float = 0.4, **settings: Any) -> Iterator[Model]:
    """`apply_patch` for the length of a ``with`` block; afterwards ``model`` is as it was, patched or not."""
    before = patch_of(model)
    pipeline = before.trajectory.pipeline if before is not None else None
    apply_patch(model, ratio, **settings)
    try:
        yield model
    finally:
        remove_patch(model)
        if before is not None:
            apply_patch(pipeline if pipeline is not None else unet_of(model), **asdict(before.settings))
