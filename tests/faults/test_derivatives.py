"""`torch.func` and forward-mode differentiation: derivatives of whole calls, whatever was remembered before."""

import pytest
import torch
from conftest import make_unet, unet_inputs
from diffusers.models.attention_processor import AttnProcessor
from situations import SETTINGS, sweep
from torch.autograd import forward_ad

import agentsd

INPUTS = unet_inputs()
LATENTS, TEXT = INPUTS["sample"], INPUTS["encoder_hidden_states"]
TIMESTEPS = (900, 700, 690, 680, 500)
REUSING = {"reuse": SETTINGS["reuse"], "balanced": SETTINGS["balanced"]}  # whose calls with gradients are unpatched


def unet_of(settings=None, processor=None):
    unet = make_unet().requires_grad_(False)
    if processor is not None:
        unet.set_attn_processor(processor)
    return agentsd.apply_patch(unet, **settings) if settings is not None else unet


def called(unet, timestep, text=TEXT):
    return lambda x: unet(x, timestep, encoder_hidden_states=text).sample


def gradient(unet, timestep):
    return torch.func.grad(lambda x: called(unet, timestep)(x).square().sum())(LATENTS)


def pulled_back(unet, timestep):
    output, back = torch.func.vjp(called(unet, timestep), LATENTS)
    return back(output)[0]


def by_autograd(unet, timestep):
    x = LATENTS.clone().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(called(unet, timestep)(x).square().sum(), x)[0]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("of", [gradient, pulled_back])
def test_gradients_of_functions_are_those_of_autograd(of, name):
    with torch.no_grad():
        found = [of(unet_of(SETTINGS[name]), timestep) for timestep in TIMESTEPS]
    scale = 1 if of is gradient else 2
    expected = [by_autograd(unet_of(SETTINGS[name]), timestep) for timestep in TIMESTEPS]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(scale * a, b, rtol=1e-4, atol=1e-5)


def by_dual_numbers(unet, timestep):
    with forward_ad.dual_level():
        output = called(unet, timestep)(forward_ad.make_dual(LATENTS, torch.ones_like(LATENTS)))
        return forward_ad.unpack_dual(output).tangent.clone()


def pushed_forward(unet, timestep):
    return torch.func.jvp(called(unet, timestep), (LATENTS,), (torch.ones_like(LATENTS),))[1]


@pytest.mark.parametrize("name", REUSING)
@pytest.mark.parametrize("of", [by_dual_numbers, pushed_forward])
@torch.no_grad()
def test_tangents_are_those_of_full_calls(of, name):
    patched, plain = (unet_of(settings, AttnProcessor()) for settings in (REUSING[name], None))
    for timestep in TIMESTEPS:
        torch.testing.assert_close(of(patched, timestep), of(plain, timestep), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_a_vectorised_call_is_that_of_each_sample(name):
    """And what it has computed is of no use to the calls after it."""
    unet = unet_of(SETTINGS[name])
    for timestep in TIMESTEPS:
        one = lambda x, text, timestep=timestep: unet(x[None], timestep, encoder_hidden_states=text[None]).sample[0]
        found = torch.func.vmap(one)(LATENTS, TEXT)
        each = [called(unet_of(SETTINGS[name]), timestep, TEXT[i : i + 1])(LATENTS[i : i + 1]) for i in range(2)]
        torch.testing.assert_close(found, torch.cat(each), rtol=1e-4, atol=1e-5)
    after = called(unet, 400, TEXT[:1])(LATENTS[:1])
    torch.testing.assert_close(after, called(unet_of(SETTINGS[name]), 400, TEXT[:1])(LATENTS[:1]))


@pytest.mark.parametrize("name", sweep(SETTINGS, ["agents", "balanced"]))
def test_gradients_of_each_sample(name):
    """`functional_call`, as differential privacy has it."""

    def loss(parameters, x, text):
        inputs = {"encoder_hidden_states": text[None]}
        return torch.func.functional_call(unet, parameters, (x[None], 500), inputs).sample.square().mean()

    unet = unet_of(SETTINGS[name])
    parameters = {name: p.detach() for name, p in unet.named_parameters()}
    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, LATENTS, TEXT)
    for i in range(2):
        expected = torch.func.grad(loss)(parameters, LATENTS[i], TEXT[i])
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key][i], gradient, rtol=1e-3, atol=1e-5)
