"""Settings found on the user's own pipeline."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_pipeline
from diffusers import StableDiffusionPipeline

import agentsd
from agentsd import tuning
from agentsd.patch import patch_of
from agentsd.schedule import full_calls
from agentsd.trials import Trial, choose, parse_target
from agentsd.tuning import CANDIDATES, distinct


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "examples" / "demo_model", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(desc="mine", disable=True)
    return pipe


def found(pipe, target=None, **more) -> agentsd.Tuning:
    """With time for two candidates, and one image of each."""
    quick = {"prompts": ["a red apple", "a cat"], "seconds": 0, "progress": False, "num_inference_steps": 8}
    return agentsd.tune(pipe, target, **quick | more)


def trial(name: str, speedup: float, worst: float, settings=()) -> Trial:
    return Trial(name, None if settings is None else dict(settings), 1 / speedup, speedup, worst, worst)


UNPATCHED = trial("unpatched", 1.0, math.inf, None)
HALF = trial("half", 1.9, 36.0, None)
FAST, GOOD, SLOW = trial("fast", 4.0, 30.0), trial("good", 3.0, 40.0), trial("slow", 0.9, 60.0)


@pytest.mark.parametrize(
    ("target", "tried", "chosen"),
    [
        ("2x", [FAST, GOOD, SLOW], GOOD),
        ("3.5x", [FAST, GOOD, SLOW], FAST),
        ("5x", [FAST, GOOD, SLOW], None),
        ("25 dB", [FAST, GOOD, SLOW], FAST),
        ("p5 >= 35 dB", [FAST, GOOD, SLOW], GOOD),
        ("50dB", [FAST, GOOD, SLOW], None),
        (None, [FAST, GOOD, SLOW], GOOD),
        (None, [FAST, SLOW], None),
        ("2x", [SLOW], None),
    ],
)
def test_the_choice_reaches_the_target_or_there_is_none(target, tried, chosen):
    best, verdict = choose([UNPATCHED, HALF, *tried], parse_target(target))
    assert best is chosen
    assert (chosen.name in verdict) if chosen is not None else verdict.startswith("leave it unpatched")


def test_fewer_steps_may_be_the_answer():
    quick = trial("half", 3.5, 41.0, None)
    best, verdict = choose([UNPATCHED, quick, FAST, GOOD], None)
    assert best is None and "halve the steps: 3.50x" in verdict


def test_another_image_sooner_is_not_advised_where_nearly_the_same_one_is_to_be_had():
    """Half the steps of a short trajectory are no approximation of it: they draw another image."""
    half = trial("half", 2.25, 9.5, None)
    balanced, blurred = trial("balanced", 2.09, 47.8), trial("blurred", 3.0, 20.0)
    assert choose([UNPATCHED, half, blurred, balanced], None)[0] is balanced
    assert choose([UNPATCHED, half, blurred], None)[0] is blurred  # nearer than half the steps, and faster
    assert choose([UNPATCHED, half], None)[0] is None
    assert choose([UNPATCHED, half, blurred, balanced], parse_target("9 dB"))[0] is blurred  # as it was asked


@pytest.mark.parametrize("target", ["fast", "2", "x2", "-1x", ""])
def test_a_target_that_is_none_is_an_error(target):
    with pytest.raises(ValueError, match="expected a speed-up"):
        agentsd.tune(make_pipeline(), target)


def test_what_draws_no_images_cannot_be_tuned():
    with pytest.raises(TypeError, match="cannot tune"):
        agentsd.tune(make_pipeline().unet)
    with pytest.raises(ValueError, match="expected one prompt or more"):
        agentsd.tune(make_pipeline(), prompts=())


@pytest.mark.parametrize("before", [None, {"ratio": 0.25, "seed": 1}])
def test_the_pipeline_is_left_as_it_was(pipe, before):
    if before is not None:
        agentsd.apply_patch(pipe, **before)
    settings, weights = agentsd.report(pipe).settings, [p.data_ptr() for p in pipe.unet.parameters()]
    layouts = [p.stride() for p in pipe.unet.parameters()]
    found(pipe)
    assert agentsd.report(pipe).settings == settings
    assert [p.data_ptr() for p in pipe.unet.parameters()] == weights
    assert [p.stride() for p in pipe.unet.parameters()] == layouts
    assert pipe._progress_bar_config == {"desc": "mine", "disable": True}
    agentsd.remove_patch(pipe)


def test_what_was_tried_is_told_and_images_are_compared_with_the_unpatched_ones(pipe):
    result, names = found(pipe, "1dB"), list(distinct(pipe, 8))
    assert [t.name for t in result.trials] == ["unpatched", "unpatched, half the steps", *names[:2]]
    assert result.untried == tuple(names[2:])
    assert result.images == 1 and all(10 < t.worst <= t.mean + 1e-9 for t in result.trials[1:])
    for name in (*names, "channels_last", result.verdict):
        assert name in str(result)


def test_settings_that_are_the_same_in_so_many_calls_are_tried_once(pipe):
    tables = {calls: list(distinct(pipe, calls)) for calls in (6, 8, 20, 50)}
    assert tables[50] == list(CANDIDATES)
    assert "quality" in tables[20] and "balanced, cache_interval=2" not in tables[20]
    for calls, names in tables.items():
        settings = [tuning.settings_for(pipe.unet, **CANDIDATES[name]) for name in names]
        fixed = [s for s in settings if s.reuses and not s.cache_tolerance]
        assert len({full_calls(calls, s) for s in fixed}) == len(fixed)


def test_a_machine_that_slows_down_changes_no_ratio(monkeypatch):
    """Other work takes turns with the search: all images that are drawn meanwhile take three times as long."""
    pipe, drawn = make_pipeline(), itertools.count()

    def drawer(pipe, prompts, seed, inputs):
        def draw(count, begin=0, **changes):
            busy = 3.0 if 12 <= next(drawn) < 20 else 1.0
            seconds = busy * (0.5 if patch_of(pipe) else 1.0) * changes.get("num_inference_steps", 8) / 8
            return [torch.zeros(1)] * (count - begin), [seconds] * (count - begin)

        return draw

    monkeypatch.setattr(tuning, "_drawer", drawer)
    pipe.set_progress_bar_config = lambda **_: None
    result = found(pipe, seconds=60)
    gains = [trial.speedup for trial in result.trials[2:]]
    edges = [gain for gain in gains if gain != 2.0]
    assert len(gains) == len(CANDIDATES) and len(edges) <= 2 and min(gains) > 1
    assert "an unpatched image took 1.00 to 3.00 s" in str(result)


def test_what_is_found_is_saved_and_given_back(pipe, tmp_path):
    result, path = found(pipe, "1dB", apply=True), tmp_path / "tuned.json"
    if result.settings is None:  # on a machine where nothing gains
        with pytest.raises(ValueError, match="no settings to save"):
            result.save(path)
        result = replace(result, settings=CANDIDATES["balanced"])
    else:
        assert agentsd.report(pipe).patched or agentsd.report(pipe).settings.reuses
    agentsd.apply_patch(pipe, **result.settings)
    applied = agentsd.report(pipe).settings
    result.save(path)
    for more in ({}, {"seed": 3}):
        agentsd.apply_patch(pipe, preset=path, **more)
        assert agentsd.report(pipe).settings == replace(applied, **more)
    agentsd.remove_patch(pipe)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": null}', '{"settings": 3}'])
def test_a_file_that_holds_no_settings_is_an_error(tmp_path, text):
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="holds no settings"):
        agentsd.Settings.of(path, {})
    with pytest.raises(OSError):
        agentsd.Settings.of(Path(tmp_path / "none.json"), {})


def test_one_prompt_is_one_prompt(pipe, monkeypatch):
    monkeypatch.setattr(tuning, "CANDIDATES", {})
    assert found(pipe, prompts="a red apple", seconds=10**6, num_inference_steps=4).images == 1


def test_what_is_saved_is_json(tmp_path):
    path = tmp_path / "tuned.json"
    agentsd.Tuning({}, "chosen", 1, (UNPATCHED, FAST), (), ()).save(path)
    refuse = lambda name: pytest.fail(f"{name} is no JSON")
    assert json.loads(path.read_text(), parse_constant=refuse)["trials"][0]["worst"] is None


def test_every_candidate_is_allowed():
    for settings in CANDIDATES.values():
        preset = settings.get("preset")
        agentsd.Settings.of(preset, {name: value for name, value in settings.items() if name != "preset"})
