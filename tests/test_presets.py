"""Presets, and the settings given beside them."""

import pytest
from conftest import make_unet

import agentsd
from agentsd.settings import Settings


def settings_of(**arguments) -> Settings:
    return agentsd.report(agentsd.apply_patch(make_unet(), **arguments)).settings


@pytest.mark.parametrize("name", agentsd.PRESETS)
def test_a_preset_is_its_settings(name):
    assert settings_of(preset=name, min_tokens=3) == Settings(**agentsd.PRESETS[name], min_tokens=3)


@pytest.mark.parametrize(
    "given",
    [{"cache_order": 0}, {"cache_cell": 1, "cache_interval": 1, "ratio": 0.4}, {"ratio": 0.4}, {"cache_interval": 7}],
    ids=str,
)
def test_what_is_given_beside_it_goes_before_it_defaults_too(given):
    expected = Settings(**{**agentsd.PRESETS["balanced"], **given}, min_tokens=0)
    assert settings_of(preset="balanced", **given, min_tokens=0) == expected


@pytest.mark.parametrize("name", ["quality", "balanced", "adaptive", "fast"])
def test_a_ratio_beside_it_merges_tokens_and_brings_no_agents(name):
    """Of what may be done to whole calls merging costs least, and agents most."""
    assert [phase.name for phase in settings_of(preset=name, ratio=0.2).phases] == ["merge"]


def test_by_position_too():
    unet = agentsd.apply_patch(make_unet(), 0.3, preset="fast")
    assert agentsd.report(unet).settings.ratio == 0.3


def test_sampling_can_be_turned_off():
    assert settings_of(preset="few_steps", ratio=0.5, sample_kv=False).ratio == 0.5


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"preset='magic' is not allowed: expected one of 'quality', .*None"):
        agentsd.apply_patch(make_unet(), preset="magic")
