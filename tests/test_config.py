"""Arguments are validated, and counted, before anything is patched."""

import math
import warnings

import numpy as np
import pytest
import torch
from conftest import make_unet
from hypothesis import given
from hypothesis import strategies as st

import agentsd
from agentsd.apply import apply_patch
from agentsd.idle import idle
from agentsd.schedule import Counts, Phase
from agentsd.settings import Settings

WRONG_VALUES = [
    ({"ratio": -0.1}, "0 <= ratio < 1"),
    ({"ratio": 1.0}, "0 <= ratio < 1"),
    ({"ratio": 0.76}, "at most 0.75.*sx=2, sy=2"),
    ({"ratio": 0.94, "agent_steps": 1}, "at most 0.9375.*agent_sx=4"),
    ({"ratio": 0.1, "sx": 1, "sy": 1}, "at most 0,"),
    ({"ratio": math.nan}, "finite"),
    ({"ratio": 10**400}, "finite"),
    ({"k_scale2": math.inf}, "finite"),
    ({"k_scale2": -0.1}, "0 or more"),
    ({"k_shortcut": -math.inf}, "finite"),
    ({"agent_steps": 1.1}, "never.*always"),
    ({"agent_ratio": 1.0}, "0 <= agent_ratio < 1"),
    ({"sx": 0}, "1 or more"),
    ({"agent_sy": -2}, "1 or more"),
    ({"max_downsample": 3}, "1, 2, 4, 8 or None"),
    ({"cache_cell": 0, "cache_interval": 2}, "1 .* or more"),
    ({"cache_interval": 0.0}, "above 0 and at most 0.5"),
    ({"cache_interval": 2.5}, "1 .all calls are full., 2, 3"),
    ({"cache_interval": 0.6}, "a share of the trajectory, above 0 and at most 0.5"),
    ({"cache_interval": -1.0}, "above 0 and at most 0.5"),
    ({"cache_cell": 2}, "1, since with cache_interval=1 no call is cached: give another"),
    ({"seed": -1}, "0 <= seed"),
    ({"seed": 2**64}, "0 <= seed"),
]
WRONG_TYPES = [
    {"ratio": "0.4"},
    {"ratio": True},
    {"ratio": 0.4j},
    {"sx": 2.0},
    {"agent_sx": "4"},
    {"max_downsample": 1.0},
    {"seed": "zero"},
    {"use_rand": 1},
    {"merge_mlp": None},
]


@pytest.mark.parametrize("arguments, allowed", WRONG_VALUES, ids=str)
def test_wrong_values(arguments, allowed):
    unet = make_unet()
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=f"^{name}={arguments[name]!r} is not allowed: .*{allowed}"):
        agentsd.apply_patch(unet, **arguments)
    assert agentsd.report(unet).settings is None  # nothing was patched on the way


@pytest.mark.parametrize("arguments", WRONG_TYPES, ids=str)
def test_wrong_types(arguments):
    with pytest.raises(TypeError, match="is not allowed: expected"):
        agentsd.apply_patch(make_unet(), **arguments)


IDLE = [
    ({"ratio": 0, "cache_interval": 3, "seed": 0}, "seed=0: with ratio=0 no attention is patched"),
    ({"ratio": 0, "cuda_graphs": True, "max_downsample": 2}, "max_downsample=2: with ratio=0"),
    ({"merge_attn": False, "cache_interval": 3, "sx": 3}, "sx=3: with merge_attn, .* all False no attention"),
    ({"preset": "balanced", "agent_sx": 3, "sx": 3}, "agent_sx=3, sx=3: with ratio=0 no token is merged"),
    ({"preset": "balanced", "merge_mlp": True}, "merge_mlp=True: with ratio=0"),
    ({"preset": "balanced", "ratio": 0.3, "merge_attn": False}, "ratio=0.3: .* all False no token is merged"),
    ({"agent_steps": 0, "agent_sx": 3, "k_scale2": 1}, "agent_sx=3, k_scale2=1: with agent_steps=0"),
    ({"preset": "balanced", "ratio": 0.3, "k_shortcut": 0}, "k_shortcut=0: with agent_steps=0"),
    ({"agent_steps": 1, "sx": 3}, "sx=3: with agent_steps=1"),
    ({"merge_attn": False, "merge_mlp": True, "agent_ratio": 0.5}, "agent_ratio=0.5: with merge_attn=False"),
    ({"use_rand": False, "seed": 3}, "seed=3: with use_rand=False"),
    ({"cache_order": 1, "cache_branch": 1}, "cache_order=1, cache_branch=1: with cache_interval=1"),
    ({"preset": "few_steps", "agent_steps": 0, "agent_sx": 2}, "agent_sx=2: with agent_steps=0"),
]


@pytest.mark.parametrize("arguments, named", IDLE, ids=str)
def test_what_does_nothing_is_named(arguments, named):
    with pytest.warns(UserWarning, match=f"^agentsd: nothing comes of .*{named}") as said:
        apply_patch(make_unet(), **arguments)
    assert len(said) == 1 and said[0].filename == __file__


@pytest.mark.parametrize("name", [None, *agentsd.PRESETS])
def test_presets_and_defaults_have_nothing_idle(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_patch(make_unet(), preset=name, seed=0)
        apply_patch(make_unet(), preset=name, use_rand=False, min_tokens=8)
        apply_patch(make_unet(), **(agentsd.PRESETS[name] if name else {}))  # spelled out, too
        apply_patch(make_unet(), ratio=0, cache_interval=3, cache_order=1)


def test_what_is_idle_changes_no_image():
    """What the warnings say, drawn: the outputs are those without the settings that they name."""
    unet = make_unet()
    inputs = torch.randn(2, 4, 16, 16), 500, torch.randn(2, 5, 16)
    for arguments, _ in IDLE:
        outputs = []
        settings = Settings.of(arguments.get("preset"), {k: v for k, v in arguments.items() if k != "preset"})
        unused = [name for names in idle(settings, arguments.keys() - {"preset"}).values() for name in names]
        for chosen in (arguments, {k: v for k, v in arguments.items() if k not in unused}):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                agentsd.apply_patch(unet, **chosen, **({} if "seed" in arguments else {"seed": 0}))
                with torch.no_grad():
                    outputs.append([unet(*inputs).sample for _ in range(3)])
        assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True)), arguments


def test_numpy_numbers_are_numbers():
    settings = Settings(ratio=np.float32(0.5), sx=np.int64(2), use_rand=np.bool_(False), seed=np.uint8(3))
    assert settings == Settings(ratio=0.5, sx=2, use_rand=False, seed=3)
    assert [type(x) for x in (settings.ratio, settings.sx, settings.use_rand, settings.seed)] == [
        float,
        int,
        bool,
        int,
    ]


def test_a_phase_that_is_never_reached_sets_no_limit():
    assert [phase.name for phase in Settings(ratio=0.9, agent_steps=1).phases] == ["agent"]
    assert [phase.name for phase in Settings(ratio=0.75, agent_steps=0, agent_sx=1, agent_sy=1).phases] == ["merge"]


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 5),
    st.floats(0, 0.99),
    st.none() | st.floats(0, 0.99),
)
def test_counts_are_possible(height, width, sy, sx, ratio, agent_ratio):
    counts = Phase("agent", sy, sx, ratio, agent_ratio).counts(height, width)
    src = height * width - (height // sy) * (width // sx)
    assert counts.tokens == height * width
    assert 0 <= counts.merged <= min(counts.tokens * ratio, src)
    assert counts.agents == 0 or 2 * counts.agents < counts.remaining
    assert counts.remaining >= 1


def test_counts_of_the_paper():
    settings = Settings(ratio=0.4)
    assert settings.agent.counts(64, 64) == Counts(4096, 1638, 256)
    assert settings.merge.counts(64, 64) == Counts(4096, 1638, 0)
    assert settings.agent.counts(3, 3) == Counts(9, 0, 0)  # smaller than a cell
