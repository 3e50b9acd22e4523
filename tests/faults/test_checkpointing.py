"""Gradient checkpointing gives the gradients that are had without, or it is refused."""

import gc
from types import SimpleNamespace

import pytest
import torch
from conftest import make_unet, unet_inputs
from situations import sweep
from torch.utils.checkpoint import CheckpointError, checkpoint

import agentsd

SETTINGS = {
    "agents": {},
    "merging": {"agent_steps": 0},
    "agents in every step": {"agent_steps": 1},
    "sampling": {"sample_kv": True},
    "feed-forward": {"merge_attn": False, "merge_mlp": True},
    "every layer": {"merge_mlp": True, "merge_crossattn": True, "max_downsample": 2},
    "reuse": {"ratio": 0, "cache_interval": 2},
    "balanced": {"preset": "balanced"},
    "balanced, merging": {"preset": "balanced", "ratio": 0.4},
    "without draws": {"use_rand": False},
}


def loss(unet, timestep, change=0.0):
    inputs = unet_inputs(timestep=timestep)
    return unet(**inputs | {"sample": inputs["sample"] + change}).sample.square().mean()


def one_after_the_other(unet):
    for timestep in (900, 100, 700):
        loss(unet, timestep).backward()


def summed(unet):
    (loss(unet, 900) + loss(unet, 100, 1)).backward()


def forward_twice_then_backward(unet):
    first, second = loss(unet, 900), loss(unet, 100, 1)
    first.backward(), second.backward()


def backward_in_the_other_order(unet):
    first, second = loss(unet, 900), loss(unet, 100, 1)
    second.backward(), first.backward()


def forward_between_two_backwards(unet):
    first, second = loss(unet, 900), loss(unet, 100, 1)
    first.backward()
    third = loss(unet, 500, 2)
    second.backward(), third.backward()


def a_call_without_gradients_between(unet):
    first = loss(unet, 900)
    with torch.no_grad():
        loss(unet, 100, 1)
    first.backward()


def another_size_between(unet):
    first = loss(unet, 900)
    with torch.no_grad():
        unet(**unet_inputs(height=8, width=24))
    first.backward()


def backward_twice(unet):
    first = loss(unet, 900)
    first.backward(retain_graph=True)
    second = loss(unet, 100, 1)
    first.backward(), second.backward()


def the_same_input_twice(unet):
    inputs = unet_inputs()
    losses = [unet(**inputs | {"timestep": t}).sample.square().mean() for t in (900, 100)]
    losses[0].backward(), losses[1].backward()


def of_the_latents(unet):
    inputs = unet_inputs()
    inputs["sample"].requires_grad_()
    for timestep in (900, 100):
        unet(**inputs | {"timestep": timestep}).sample.square().mean().backward()
    assert inputs["sample"].grad is not None


ORDERS = [
    one_after_the_other, summed, forward_twice_then_backward, backward_in_the_other_order,
    forward_between_two_backwards, a_call_without_gradients_between, another_size_between, backward_twice,
    the_same_input_twice, of_the_latents,
]  # fmt: skip


def gradients(settings, order, reentrant=None):
    unet = agentsd.apply_patch(make_unet(), seed=0, **settings).train()
    if reentrant is not None:
        unet.enable_gradient_checkpointing(lambda f, *args: checkpoint(f, *args, use_reentrant=reentrant))
    with torch.enable_grad():
        order(unet)
    return {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
@pytest.mark.parametrize("name", sweep(SETTINGS, ["agents"]))
def test_gradients_in_any_order_of_passes(name, order, reentrant):
    """Equal to those without checkpointing, or an error of ours says that this is not possible."""
    expected = gradients(SETTINGS[name], order)
    try:
        found = gradients(SETTINGS[name], order, reentrant)
    except CheckpointError:
        raise
    except RuntimeError as error:
        assert "agentsd" in str(error) and "checkpointing" in str(error), error
        return
    if not reentrant:  # which lets no gradient through where a block's input needs none
        assert found.keys() == expected.keys()
    for parameter, gradient in found.items():
        assert torch.allclose(gradient, expected[parameter], rtol=1e-4, atol=1e-6), parameter


class Whole:
    """A denoiser that is checkpointed as a whole, by a training loop of one's own."""

    def __init__(self, unet, reentrant):
        self.unet, self.reentrant = unet, reentrant

    def __call__(self, sample, **others):
        if torch.is_grad_enabled():
            sample = sample if sample.requires_grad else sample.clone().requires_grad_()
        output = checkpoint(lambda x: self.unet(x, **others).sample, sample, use_reentrant=self.reentrant)
        return SimpleNamespace(sample=output)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
@pytest.mark.parametrize("name", sweep(SETTINGS, ["agents", "reuse"]))
def test_a_denoiser_that_is_checkpointed_as_a_whole(name, order, reentrant):
    """Never refused: the first runs of its blocks are those of a first run of it."""
    expected = gradients(SETTINGS[name], order)
    unet = agentsd.apply_patch(make_unet(), seed=0, **SETTINGS[name]).train()
    with torch.enable_grad():
        order(Whole(unet, reentrant))
    for parameter, layer in unet.named_parameters():
        assert torch.allclose(layer.grad, expected[parameter], rtol=1e-4, atol=1e-6), parameter


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("parts", [1, 2], ids=["the same latents", "parts of a batch"])
@pytest.mark.parametrize("name", sweep(SETTINGS, ["agents", "sampling"]))
def test_calls_of_one_memory_that_are_checkpointed_as_a_whole(name, parts, reentrant):
    """At timesteps of different phases, of which each call's plan is its own."""
    found = []
    for checkpointed in (False, True):
        unet, inputs = agentsd.apply_patch(make_unet(), seed=0, **SETTINGS[name]).train(), unet_inputs()
        latents, texts = inputs["sample"].requires_grad_(), inputs["encoder_hidden_states"]
        run = lambda x, t, text, unet=unet: unet(x, t, encoder_hidden_states=text).sample
        losses = []
        with torch.enable_grad():
            for i, timestep in enumerate((900, 700, 100)):
                given = (latents.chunk(parts)[i % parts], timestep, texts.chunk(parts)[i % parts])
                output = checkpoint(run, *given, use_reentrant=reentrant) if checkpointed else run(*given)
                losses.append(output.square().mean())
            sum(losses).backward()
        found.append([latents.grad, *(p.grad for p in unet.parameters())])
    for gradient, expected in zip(*found, strict=True):
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("inner", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("outer", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", sweep(SETTINGS, ["agents"]))
def test_checkpointing_within_checkpointing_is_right_or_refused(name, outer, inner):
    expected = gradients(SETTINGS[name], one_after_the_other)
    unet = agentsd.apply_patch(make_unet(), seed=0, **SETTINGS[name]).train()
    unet.enable_gradient_checkpointing(lambda f, *args: checkpoint(f, *args, use_reentrant=inner))
    try:
        with torch.enable_grad():
            one_after_the_other(Whole(unet, outer))
    except RuntimeError as error:
        assert "agentsd.remove_patch before training" in str(error), error
        return
    for parameter, layer in unet.named_parameters():
        assert torch.allclose(layer.grad, expected[parameter], rtol=1e-4, atol=1e-6), parameter


def tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize(("checkpointing", "kept"), [(False, False), (True, False), (True, True)])
def test_recorded_calls_without_a_backward_pass_pile_up_nothing(checkpointing, kept):
    """A validation loop whose author forgot `no_grad`: as many tensors after twelve calls as an unpatched UNet has.

    Where the outputs are kept, each of the three patched blocks needs its draw of each call for the gradients to come.
    """
    grown = []
    for settings in (None, {"seed": 0}):
        unet = make_unet().train()
        if settings is not None:
            agentsd.apply_patch(unet, **settings)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        outputs, counts = [], []
        with torch.enable_grad():
            for call in range(12):
                outputs.append(unet(**unet_inputs(timestep=999 - call)).sample)
                del outputs[: None if not kept else 0]
                if call in (3, 11):
                    counts.append(tensors())
        grown.append(counts[1] - counts[0])
    assert grown[1] <= grown[0] + 8 * (3 * 3 if kept else 0)
