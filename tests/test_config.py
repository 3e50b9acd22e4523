"""Arguments are validated, and counted, before anything is patched."""

import math

import numpy as np
import pytest
from conftest import make_unet
from hypothesis import given
from hypothesis import strategies as st

import agentsd
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
