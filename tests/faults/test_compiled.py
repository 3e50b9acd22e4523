"""Compiled in every form, traced, exported: a patch that comes or goes is noticed, or refused."""

import contextlib
import io
import warnings

import pytest
import torch
import torch._dynamo
from conftest import ONE_LEVEL, unet_inputs
from conftest import make_unet as make_any_unet
from situations import SETTINGS, sweep

import agentsd

TIMESTEPS = (901, 781, 101)


def make_unet():
    return make_any_unet(**ONE_LEVEL)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outputs(function) -> torch.Tensor:
    return torch.cat([function(**unet_inputs(timestep=torch.tensor(t))).sample for t in TIMESTEPS])


def compiled(function):
    return torch.compile(function, backend="eager")


def forward_in_place(unet):
    unet.forward = compiled(unet.forward)
    return unet


def forward_of_the_blocks(unet):
    for block in (*unet.down_blocks, *unet.up_blocks):
        block.forward = compiled(block.forward)
    return unet


def forward_of_the_layers(unet):
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.forward = compiled(module.forward)
    return unet


def blocks_replaced(unet):
    for blocks in (unet.down_blocks, unet.up_blocks):
        for i, block in enumerate(blocks):
            blocks[i] = compiled(block)
    return unet


def a_block_in_place(unet):
    unet.up_blocks[0].compile(backend="eager")
    return unet


def a_function(unet):
    @compiled
    def function(**kwargs):
        return unet(**kwargs)

    return function


def an_outer_module(unet):
    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, **kwargs):
            return self.unet(**kwargs)

    return compiled(Outer())


class Holder:
    """An object with a compiled method, as loops of one's own are."""

    def __init__(self, unet):
        self.unet = unet

    @torch.compile(backend="eager")
    def __call__(self, **kwargs):
        return self.unet(**kwargs)


HOW = {
    "the UNet, kept beside it": compiled,
    "its forward, in its place": forward_in_place,
    "its forward, kept beside it": lambda unet: compiled(unet.forward),
    "its call, kept beside it": lambda unet: compiled(unet.__call__),
    "the forward of its blocks": forward_of_the_blocks,
    "the forward of its attention layers": forward_of_the_layers,
    "its blocks, in their place": blocks_replaced,
    "one of its blocks": a_block_in_place,
    "a function around it": a_function,
    "a module around it": an_outer_module,
    "a method of an object": Holder,
}
OFTEN = (  # to a patch the others are as one of these: what is compiled is in its module's place, or beside it
    "the UNet, kept beside it",
    "its forward, in its place",
    "its forward, kept beside it",
    "one of its blocks",
    "a function around it",
)


@pytest.mark.parametrize("name", sweep(["agents", "reuse"], ["agents"]))
@pytest.mark.parametrize("how", sweep(HOW, OFTEN))
def test_a_patch_that_comes_after_the_first_run(how, name):
    """The compiled function is given the patch, and loses it again."""
    unet = make_unet()
    plain, expected = outputs(unet), outputs(agentsd.apply_patch(make_unet(), **SETTINGS[name]))
    function = HOW[how](unet)
    torch.testing.assert_close(outputs(function), plain)
    agentsd.apply_patch(unet, **SETTINGS[name])
    if how != "its forward, kept beside it":  # below a module's call no patch is asked for
        torch.testing.assert_close(outputs(function), expected)
    agentsd.remove_patch(unet)
    torch.testing.assert_close(outputs(function), plain)


@pytest.mark.parametrize("name", sweep(["agents", "reuse"], ["reuse"]))
@pytest.mark.parametrize("how", sweep([how for how in HOW if "beside" not in how], ["its forward, in its place"]))
def test_a_patch_that_was_there_before_the_first_run(how, name):
    """Patched, compiled, run; then another patch in its place, and none."""
    unet = make_unet()
    plain = outputs(unet)
    expected = [outputs(agentsd.apply_patch(make_unet(), **SETTINGS[which])) for which in (name, "sampling")]
    agentsd.apply_patch(unet, **SETTINGS[name])
    function = HOW[how](unet)
    torch.testing.assert_close(outputs(function), expected[0])
    agentsd.apply_patch(unet, **SETTINGS["sampling"])
    torch.testing.assert_close(outputs(function), expected[1])
    agentsd.remove_patch(unet)
    torch.testing.assert_close(outputs(function), plain)


# Traced and exported


class ByPosition(torch.nn.Module):
    """A UNet as tracers take it."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, sample, timestep, text):
        return self.unet(sample, timestep, text, return_dict=False)[0]


def arguments(timestep: int):
    inputs = unet_inputs()
    return inputs["sample"], torch.tensor(timestep), inputs["encoder_hidden_states"]


def traced(unet):
    return torch.jit.trace(ByPosition(unet), arguments(601), check_trace=False)


def exported(unet, strict):
    with contextlib.redirect_stdout(io.StringIO()):
        return torch.export.export(ByPosition(unet), arguments(601), strict=strict).module()


def exported_for_onnx(unet):
    pytest.importorskip("onnxscript")
    torch.onnx.export(ByPosition(unet), arguments(601), dynamo=True, verbose=False)


TRACERS = {
    "torch.jit.trace": traced,
    "torch.export": lambda unet: exported(unet, False),
    "torch.export, strict": lambda unet: exported(unet, True),
}
TRACED = {**SETTINGS, "merging alone": {"seed": 0, "agent_steps": 0}, "without draws": {"use_rand": False}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("warm", sweep([False, True], [True]))
@pytest.mark.parametrize("name", sweep(TRACED, ["agents", "merging alone"]))
@pytest.mark.parametrize("how", TRACERS)
def test_a_traced_unet_is_right_in_every_phase_or_refused(how, name, warm):
    """One phase or one draw as a constant would be wrong in the others: then an error says what to do."""
    expected = make_unet()
    agentsd.apply_patch(expected, **TRACED[name])
    unet = agentsd.apply_patch(make_unet(), **TRACED[name])
    if warm:
        unet(**unet_inputs(timestep=601))
    try:
        graph = TRACERS[how](unet)
    except Exception as error:
        assert "agentsd" in str(error) and "remove_patch" in str(error), error
    else:
        state = torch.get_rng_state()
        for timestep in TIMESTEPS:
            torch.testing.assert_close(graph(*arguments(timestep)), ByPosition(expected)(*arguments(timestep)))
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sweep(["agents", "reuse", "sampling"]))
@pytest.mark.parametrize("how", TRACERS)
def test_tracing_leaves_a_unet_that_works(how, name):
    """After it, whether it was refused or not, eager calls are right and removal is complete."""
    unet = make_unet()
    plain = outputs(unet)
    agentsd.apply_patch(unet, **SETTINGS[name])
    with contextlib.suppress(Exception):
        TRACERS[how](unet)
    expected = outputs(agentsd.apply_patch(make_unet(), **SETTINGS[name]))
    assert torch.equal(outputs(unet), expected)
    agentsd.remove_patch(unet)
    assert torch.equal(outputs(unet), plain)


@pytest.mark.parametrize("how", sweep(TRACERS, ["torch.jit.trace"]))
def test_a_unet_whose_patch_is_removed_can_be_traced(how):
    """As if it had never been patched."""
    unet = make_unet()
    agentsd.apply_patch(unet, **SETTINGS["balanced, merging"])
    outputs(unet)
    agentsd.remove_patch(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = TRACERS[how](unet)
    for timestep in TIMESTEPS:
        torch.testing.assert_close(graph(*arguments(timestep)), ByPosition(unet)(*arguments(timestep)))
