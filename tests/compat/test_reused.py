"""Transformers whose attention is left as it is: their features are reused, and what asks for more is refused."""

from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from checks import check, distance
from test_capture import Recorder
from test_transformer_use import on, sibling
from tiny_transformers import make_transformer
from zoo_reused import REUSED

import agentsd
from agentsd import capture
from agentsd.patch import patch_of

PIPELINES = {name: make for name, make in REUSED.items() if hasattr(diffusers, make.args[0])}
TEXT_TO_IMAGE = [name for name in ("Qwen-Image", "FLUX.2", "FLUX.2 klein", "Chroma", "Sana") if name in PIPELINES]


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline(name):
    check(*PIPELINES[name](), {"preset": "balanced"}, {"ratio": 0, "cache_interval": 2})


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_every_call_is_counted_once(name):
    pipe, run = PIPELINES[name]()
    agentsd.apply_patch(pipe, ratio=0, cache_interval=2)
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(True))
    for _ in range(2):
        calls.clear()
        run(num_inference_steps=6)
        assert agentsd.report(pipe).last == {"full": len(calls) // 2, "cached": len(calls) // 2}


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_two_pipelines_in_turns_and_in_threads_make_the_images_that_they_make_alone(name):
    """In turns: the second draws in a callback of the first, of the same text and steps.

    In threads calls may be full, since they do not say whose schedule they follow.
    """
    pipe, run = PIPELINES[name]()
    pipes = [pipe, sibling(pipe)]
    draws = [on(one, run) for one in pipes]
    agentsd.apply_patch(pipe, preset="balanced")
    alone = [draw(seed) for seed, draw in enumerate(draws)]

    def between(_, step, timestep, tensors):
        if step == 2:
            assert torch.equal(draws[1](1), alone[1])
        return tensors

    assert torch.equal(draws[0](0, callback_on_step_end=between), alone[0])
    with ThreadPoolExecutor() as pool:
        together = list(pool.map(lambda i: draws[i](i), range(2)))
    for image, expected, other in zip(together, alone, alone[::-1], strict=True):
        assert distance(image, expected) < 0.1 * distance(image, other)


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_an_image_after_one_that_was_cancelled(name):
    pipe, run = PIPELINES[name]()
    agentsd.apply_patch(pipe, preset="balanced")
    expected = run()

    def cancel(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(callback_on_step_end=cancel)
    assert torch.equal(run(), expected)


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_recorded_calls_are_the_same_image(name, monkeypatch):
    """By a recorder that calls again, also where nothing but graphs is asked for."""
    monkeypatch.setattr(capture, "CudaGraphs", Recorder)
    pipe, run = PIPELINES[name]()
    for settings in ({"ratio": 0}, {"preset": "balanced"}):
        agentsd.remove_patch(pipe)
        if "preset" in settings:
            agentsd.apply_patch(pipe, **settings)
        expected = run()
        agentsd.apply_patch(pipe, **settings, cuda_graphs=True)
        assert torch.equal(run(), expected)
        assert patch_of(pipe).capture.captured >= 1


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_it_compiles_without_a_break(name):
    pipe, run = PIPELINES[name]()
    agentsd.apply_patch(pipe, preset="balanced")
    expected = run()
    pipe.transformer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(run(), expected, atol=1e-5, rtol=1e-5)


def test_what_asks_for_attention_is_refused_or_named():
    net = make_transformer("qwen")
    for settings in ({}, {"ratio": 0.4}, {"preset": "few_steps"}, {"cache_interval": 1}):
        with pytest.raises(ValueError, match="attention is left as it is: give a preset that reuses features"):
            agentsd.apply_patch(net, **settings)
        assert patch_of(net) is None
    named = "nothing comes of ratio=0.3, cache_cell=3: the attention of a QwenImageTransformer2DModel is left as it is"
    with pytest.warns(UserWarning, match=named):
        agentsd.apply_patch(net, preset="balanced", ratio=0.3, cache_cell=3)
    assert "attention is left as it is" in str(agentsd.report(net))


def test_tuning_tries_what_reuses_features():
    pipe, run = PIPELINES["Chroma"]()
    given = {name: value for name, value in run.arguments.items() if name not in ("prompt", "output_type")}
    inputs = given | {"num_inference_steps": 20}
    found = agentsd.tune(pipe, prompts=("a", "b"), seconds=0, progress=False, **inputs)
    tried = [trial.name for trial in found.trials if trial.settings is not None]
    assert tried == ["balanced", "quality"] and "few_steps" not in found.untried
