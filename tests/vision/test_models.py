"""The models: the official ones' numbers, keys, parameters and operations."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from golden import filled, image, load, official_state, spread, state_dicts, timm_name
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import agentsd.vision  # noqa: F401 (registers the models)

FACTS, TENSORS = load("models")
CASES = FACTS["cases"]
STATES = state_dicts()


def created(case: str, size: int | None) -> torch.nn.Module:
    """A classifier of that size, or a backbone: filled, or resized from a checkpoint of 224 pixels."""
    name = timm_name(case)
    if "backbone" in case:
        return filled(timm.create_model(name, features_only=True))
    model = timm.create_model(name, img_size=size)
    if "_to_" not in case:
        return filled(model)
    model.load_state_dict(official_state(timm.create_model(name, img_size=224)))
    return model.eval()


def watched(model: torch.nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Outputs of the modules of those (official) names, filled as the model runs."""
    seen: dict[str, Tensor] = {}
    modules = dict(getattr(model, "model", model).named_modules())
    for name in names:
        modules[name].register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
    return seen


@pytest.mark.parametrize("case", CASES)
def test_official_numbers(case: str) -> None:
    facts: dict[str, Any] = CASES[case]
    _, _, height, width = facts["input"]["shape"]
    model, x = created(case, height), image(height, width)
    assert sum(p.numel() for p in model.parameters()) == facts["params"]
    single = model(x)
    seen = watched(model, list(facts["taps"]))
    double = model.double()(x.double())
    for name in facts["taps"]:  # in the model's order: the first that is wrong is where it goes wrong
        tap = TENSORS[f"{case}/tap/{name}"]
        torch.testing.assert_close(spread(seen[name], 64), tap, atol=1e-9, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    if "backbone" not in case:
        torch.testing.assert_close(double, TENSORS[f"{case}/logits_f64"], atol=1e-9, rtol=0)
        torch.testing.assert_close(single, TENSORS[f"{case}/logits"], atol=5e-5, rtol=0)
        return
    for level, (low, high) in enumerate(zip(single, double, strict=True)):
        facts_of_map = f"{case}/feat{level}"
        torch.testing.assert_close(spread(high, 256), TENSORS[f"{facts_of_map}/spread256_f64"], atol=1e-9, rtol=0)
        first = TENSORS[f"{facts_of_map}/first64"].flatten()
        torch.testing.assert_close(low.flatten()[:64], first, atol=5e-5, rtol=0)


@pytest.mark.parametrize("case", STATES)
def test_keys_parameters_and_operations(case: str) -> None:
    group, _, config = case.partition("/")
    facts = STATES[case]
    options = {"features_only": True} if group == "backbones" else {"img_size": facts["img_size"]}
    with torch.device("meta"):
        model = timm.create_model(timm_name(config), **options).eval()
        state = {key.removeprefix("model."): list(value.shape) for key, value in model.state_dict().items()}
        assert state == facts["state_dict"]
        assert sum(p.numel() for p in model.parameters()) == facts["params"]
        for size, operations in facts["flops"].items():
            height, width = map(int, size.split("x"))
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(1, 3, height, width))
            assert counter.get_total_flops() == pytest.approx(operations, rel=1e-2)
