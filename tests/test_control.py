"""Which calls are full, where the error of the estimates decides."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from conftest import image, make_pipeline, make_unet, unet_inputs
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import agentsd
from agentsd.control import LONGEST, Controller, most_full
from agentsd.features import Lane, worst_error

REUSE = {"ratio": 0, "cache_interval": 6, "cache_order": 1}


@dataclass
class Error:
    value: float


def settings(tolerance: float = 0.3, **more) -> agentsd.Settings:
    return agentsd.Settings(**{**REUSE, "cache_tolerance": tolerance, **more})


def full_calls(controller: Controller, calls: int, error, begin: int = 0) -> list[int]:
    """``error`` gives that of each call."""
    places, errors = [], []
    for call in range(begin, calls):
        if controller.full(call, [Error(value) for value in errors]):
            places.append(call)
            errors = error(call)
    return places


@given(
    st.integers(4, 120), st.integers(0, 3), st.lists(st.floats(0, 3), min_size=120, max_size=120), st.floats(0.02, 1)
)
def test_whatever_the_errors_bounds_hold(calls, begin, values, budget):
    chosen = settings(cache_budget=budget)
    places = full_calls(Controller(chosen, calls, begin), calls, lambda call: [values[call]], begin)
    made = calls - begin
    assert len(places) <= max(most_full(made, chosen), 3)
    if made >= 3:
        assert {begin, begin + 1, calls - 2} <= set(places)
    gaps = [b - a for a, b in pairwise(places) if a > begin and b != calls - 2]
    assert all(gap >= 2 for gap in gaps)
    if budget == 1:
        assert all(gap <= max(LONGEST, calls // 5) for gap in gaps)


def test_more_error_means_more_full_calls_and_late_errors_count_more():
    number = [len(full_calls(Controller(settings(), 50, 0), 50, lambda _, e=e: [e])) for e in (0.05, 0.2, 0.5, 2.0)]
    assert number == sorted(number) and number[0] < number[-1]
    controller = Controller(settings(cache_interval=10), 50, 0)
    gaps = [b - a for a, b in pairwise(full_calls(controller, 50, lambda _: [0.3]))]
    assert max(gaps[2:6]) > gaps[-2]


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("distance", [3, 5, 8])
def test_a_gap_becomes_what_the_tolerance_allows(order, distance, monkeypatch):
    """Where errors grow as the distance to the power of order + 1, as those of a polynomial do, at once."""
    monkeypatch.setattr("agentsd.control.TIGHT", 1.0)
    monkeypatch.setattr("agentsd.control.LOOSE", 1.0)
    controller, places, error = Controller(settings(cache_order=order), 100, 0), [], None
    for call in range(98):
        if controller.full(call, [Error(error)] if error is not None else []):
            gap = call - places[-1] if places else 1
            places, error = [*places, call], 0.3 * (gap / distance) ** (order + 1)
    gaps = [b - a for a, b in pairwise(places)]
    assert set(gaps[4:-1]) == {distance}


def test_the_worst_call_of_a_step_decides_and_all_of_them_agree():
    both = full_calls(Controller(settings(), 50, 0), 50, lambda _: [0.01, 0.6])
    assert both == full_calls(Controller(settings(), 50, 0), 50, lambda _: [0.6])
    controller = Controller(settings(), 50, 0)
    for call in range(50):
        assert controller.full(call, [Error(0.3)]) == controller.full(call, [Error(9.0)])


@pytest.mark.parametrize("order", [0, 1])
def test_the_error_is_that_of_the_estimate(order):
    """Of the worst sample of a batch; none is known of what has no estimate."""
    lane, now = Lane(order, measures=True), torch.arange(1.0, 4.0)
    for call in range(3):
        lane.begin()
        assert call or lane.latest is None
        estimate = lane.estimate() if call else None
        features = torch.stack((now, now * 10**call))
        lane.remember(features)
        assert (lane.error is None) == (call == 0)
        if estimate is not None:
            off = [((e - f).norm() / f.norm()).item() for e, f in zip(estimate, features, strict=True)]
            assert lane.error.value == pytest.approx(max(off))
    assert worst_error(torch.full((2, 4), 3e4).half(), torch.full((2, 4), 6e4).half()).item() == pytest.approx(
        0.5, 1e-3
    )


def test_an_image_has_the_full_calls_that_its_errors_ask_for(kind):
    """The same seed the same ones, image after image; with all the tolerance in the world the fewest."""
    pipe = make_pipeline(kind)
    made = {}
    for tolerance in (1e-6, 0.05, 1e6):
        agentsd.apply_patch(pipe, **REUSE, cache_tolerance=tolerance)
        first = image(pipe, steps=20)
        made[tolerance] = agentsd.report(pipe).last["full"]
        assert torch.equal(image(pipe, steps=20), first)
        assert agentsd.report(pipe).last == {"full": made[tolerance], "cached": 20 - made[tolerance]}
    assert made[1e-6] in (most_full(20, settings()), most_full(20, settings()) - 1)
    assert made[1e-6] >= made[0.05] >= made[1e6] >= 4
    assert "as many calls are full as each image needs, at most 26 of 50" in str(agentsd.report(pipe))


def test_a_budget_holds_in_an_image():
    pipe = agentsd.apply_patch(make_pipeline(), **REUSE, cache_tolerance=1e-6, cache_budget=0.3)
    image(pipe, steps=20)
    assert agentsd.report(pipe).last == {"full": 6, "cached": 14}


def test_repeated_inputs_have_no_error():
    """The estimate is exact, so that full calls come as seldom as they may."""
    unet = agentsd.apply_patch(make_unet(), **REUSE, cache_tolerance=1e-3)
    schedule = torch.linspace(900, 100, 30)
    with torch.no_grad():
        outputs = [unet(**{**unet_inputs(), "timestep": t}).sample for t in schedule]
    assert agentsd.report(unet).last["full"] >= 4
    assert all(x.isfinite().all() for x in outputs)


def test_it_runs_where_there_are_no_values():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        unet = agentsd.apply_patch(make_unet(), **REUSE, cache_tolerance=0.3)
        for timestep in range(900, 0, -100):
            assert unet(**{**unet_inputs(), "timestep": timestep}).sample.shape == (2, 4, 16, 16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cache_tolerance": -0.1}, "cache_tolerance=-0.1 is not allowed"),
        ({"cache_interval": 1, "cache_tolerance": 0.3}, "no call is cached"),
        ({"cache_budget": 0.0, "cache_tolerance": 0.3}, "cache_budget=0.0 is not allowed"),
        ({"cache_budget": 0.3}, "give a cache_tolerance"),
    ],
)
def test_what_cannot_be_is_an_error(given, message):
    with pytest.raises(ValueError, match=message):
        agentsd.Settings(**{**REUSE, **given})


def test_errors_that_are_no_numbers_ask_for_full_calls():
    """Where half precision overflows an image is black, as without a patch, and not an error."""
    for value in (float("nan"), float("inf")):
        for errors in ([value], [0.01, value]):
            places = full_calls(Controller(settings(), 50, 0), 50, lambda _, errors=errors: errors)
            assert len(places) >= most_full(50, settings()) - 1
