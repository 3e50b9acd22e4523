"""Settings that do nothing beside others: each is named, so that none is ignored in silence."""

from __future__ import annotations

from collections.abc import Iterable

from agentsd.settings import Settings

CONSTANTS = ("k_scale2", "k_shortcut")
AGENTS = ("agent_sx", "agent_sy", "agent_ratio", *CONSTANTS)
CELLS = (*AGENTS, "sx", "sy")
DRAWS = ("use_rand", "seed")


def idle(settings: Settings, given: Iterable[str]) -> dict[str, list[str]]:
    """Those of the ``given`` settings that change nothing, by the reason why.

    A value that is the default is nobody's wish, and not named.
    """
    unlike = [name for name in given if getattr(settings, name) != getattr(Settings, name)]
    found: dict[str, list[str]] = {}
    for why, names in _reasons(settings).items():
        if here := [name for name in unlike if name in names]:
            found[why] = here
            unlike = [name for name in unlike if name not in here]
    return found


def _reasons(settings: Settings) -> dict[str, tuple[str, ...]]:
    """Why some settings do nothing, the widest reason first, and which these are."""
    around = ("merge_attn", "merge_crossattn", "merge_mlp")
    cells = CELLS if settings.agent_steps == 0 else ("agent_steps", *CELLS)  # who wants no agents has none
    merging: tuple[str, ...] = (*cells, *around, "match_interval")
    nothing = "ratio=0"
    if nowhere := not any(getattr(settings, name) for name in around):
        merging, nothing = ("ratio", *cells, "match_interval"), "merge_attn, merge_crossattn and merge_mlp all False"
    merges = settings.ratio > 0 and not nowhere
    holds = {
        f"with {nothing} no attention is patched": (
            not settings.acts,
            (*merging, *DRAWS, "max_downsample", "min_tokens"),
        ),
        f"with {nothing} no token is merged": (not merges and not settings.sample_kv, merging),
        "with agent_steps=0 no step is under agent attention": (settings.agent_steps == 0, AGENTS),
        "with agent_steps=1 every step is under agent attention": (settings.agent_steps == 1, ("sx", "sy")),
        "with merge_attn=False there are no agents": (not settings.merge_attn, ("agent_ratio", *CONSTANTS)),
        "with use_rand=False nothing is drawn": (not settings.use_rand, ("seed",)),
        "with cache_interval=1 no call is cached": (not settings.reuses, ("cache_order", "cache_branch")),
    }
    return {why: names for why, (here, names) in holds.items() if here}
