"""Denoisers without a UNet: what is known of each, and feature reuse that is exact where its inputs repeat."""

import copy
import inspect
import itertools

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_transformers import (
    KINDS,
    PACKED,
    REUSED,
    Trajectory,
    image_ids,
    make_transformer,
    residuals,
    transformer_inputs,
)
from torch.utils._python_dispatch import TorchDispatchMode

import agentsd
from agentsd.hosts import Chroma, Flux, Flux2, PixArt, QwenImage, Sana, StableDiffusion3, UNet, host_of
from agentsd.patch import patch_of
from agentsd.trajectory import Trajectory as Schedule

REUSE = {"ratio": 0, "cache_interval": 3, "cache_order": 1}
HOSTS = {"sd3": StableDiffusion3, "sd35": StableDiffusion3, "flux": Flux, "pixart": PixArt}
HOSTS |= {"qwen": QwenImage, "flux2": Flux2, "chroma": Chroma, "sana": Sana}
JOINT = tuple(kind for kind in KINDS if kind != "pixart")


@pytest.fixture(params=(*KINDS, *REUSED))
def kind(request) -> str:
    return request.param


def made(net) -> list[bool]:
    """Fills up, call by call, with whether the last block ran."""
    calls: list[bool] = []
    blocks = getattr(net, "single_transformer_blocks", net.transformer_blocks)
    net.register_forward_pre_hook(lambda *_: calls.append(False))
    last = blocks[-1].attn if hasattr(blocks[-1], "attn") else blocks[-1].attn1
    last.register_forward_pre_hook(lambda *_: calls.__setitem__(-1, True))
    return calls


def test_hosts_are_told_by_their_blocks(kind):
    net = make_transformer(kind)
    assert type(host_of(net)) is HOSTS[kind]
    assert type(host_of(torch.nn.Linear(2, 2))) is UNet


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16, 16), (8, 20), (22, 6)])
def test_grids_are_those_of_a_forward_pass(kind, size):
    net, inputs, seen = make_transformer(kind), transformer_inputs(kind, 1, *size), []
    host = host_of(net)
    net.transformer_blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape[1]), with_kwargs=True
    )
    net(**inputs, timestep=torch.tensor([0.5]))
    told = host.inputs(net, (), {**inputs, "timestep": torch.tensor([0.5])})
    assert told.size == size
    grids, sites = host.grids(net, *told.size), host.sites(net)
    assert {site.downsample for site in sites} == {2}
    assert grids[sites[0].level] == (size[0] // 2, size[1] // 2)
    assert seen == [grids[1][0] * grids[1][1]]


def test_arguments_come_by_position_too(kind):
    net, inputs = make_transformer(kind), transformer_inputs(kind)
    host, timestep = host_of(net), torch.tensor([0.5, 0.5])
    named = host.inputs(net, (), {**inputs, "timestep": timestep})
    order = [*itertools.takewhile("timestep".__ne__, inspect.signature(type(net).forward).parameters)][1:]
    rest = {name: value for name, value in inputs.items() if name not in order}
    placed = host.inputs(net, (*(inputs[name] for name in order), timestep), rest)
    assert placed.sample is named.sample and placed.text is named.text and placed.timestep is named.timestep
    assert host.inputs(net, (inputs["hidden_states"],), {}) is None


@pytest.mark.parametrize(
    ("ids", "grid"),
    [
        (image_ids(4, 6), (4, 6)),
        (image_ids(4, 6)[None].repeat(2, 1, 1), (4, 6)),
        (torch.cat((image_ids(4, 6), image_ids(4, 6, image=1))), (4, 6)),  # Kontext's reference
        (image_ids(4, 6) + torch.tensor([0, 3, 5]), (4, 6)),
        (image_ids(4, 6)[torch.arange(24).flip(0)], (4, 6)),  # rows and columns may run either way
        (image_ids(4, 6)[:23], None),
        (image_ids(4, 6)[torch.arange(24).view(6, 4).T.flatten()], None),
    ],
)
def test_the_grid_of_packed_latents_stands_in_their_positions(ids, grid):
    net, tokens = make_transformer("flux"), ids.shape[-2]
    inputs = {"hidden_states": torch.zeros(2, tokens, 16), "img_ids": ids, "timestep": torch.ones(2)}
    rows, columns = grid or (1, tokens)
    assert Flux().inputs(net, (), inputs).size == (2 * rows, 2 * columns)


def test_positions_are_read_once_and_again_when_they_change():
    """Reading waits for the device, in which an image's calls stand in line."""
    read = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            read.append(function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal))
            return function(*args, **kwargs or {})

    net, ids = make_transformer("flux"), image_ids(4, 6)
    inputs = {"hidden_states": torch.zeros(2, 24, 16), "img_ids": ids, "timestep": torch.ones(2)}
    for size, again in (((8, 12), True), ((8, 12), False), ((12, 8), True), ((12, 8), False)):
        if size == (12, 8) and again:
            ids.copy_(image_ids(6, 4))
        read.clear()
        with Reads():
            assert Flux().inputs(net, (), inputs).size == size
        assert any(read) == again


def test_a_cached_call_at_the_same_point_equals_the_full_one(kind):
    net = make_transformer(kind)
    for inputs in (transformer_inputs(kind), transformer_inputs(kind, 3, 8, 20)):
        expected = net(
            **inputs, timestep=torch.full((len(inputs["hidden_states"]),), 0.601 * 1000 ** (kind not in PACKED))
        )
        for branch in (0, 1):
            pipe = Trajectory(copy.deepcopy(net), kind)
            agentsd.apply_patch(pipe, **REUSE, cache_branch=branch)
            calls = made(pipe.transformer)
            for (output,) in pipe.run(inputs):
                torch.testing.assert_close(output, expected.sample, atol=1e-6, rtol=0)
            assert calls == [True, True, False, True, False, False, True, False]


@pytest.mark.parametrize("skipped", [(), (1,), (1, 3), (0,), (0, 2)])
@pytest.mark.parametrize("controlled", [False, True])
@pytest.mark.parametrize("kind", (*JOINT, *(kind for kind in REUSED if kind != "flux2")))
def test_it_does_with_controlnets_and_skipped_layers(kind, controlled, skipped):
    if "sd3" not in kind and skipped:
        return
    net, inputs = make_transformer(kind), transformer_inputs(kind)
    if controlled and not residuals(kind).keys() <= inspect.signature(net.forward).parameters.keys():
        pytest.skip("this version of diffusers has no ControlNets for it")
    plain = Trajectory(net, kind).call(0, inputs)
    inputs |= residuals(kind) if controlled else {}
    inputs |= {"skip_layers": list(skipped)} if skipped else {}
    pipe = Trajectory(net, kind)
    expected = pipe.call(0, inputs)
    assert not (controlled or skipped) or not torch.allclose(plain, expected)
    agentsd.apply_patch(pipe, **REUSE)
    calls = made(net)
    for (output,) in pipe.run(inputs):
        torch.testing.assert_close(output, expected, atol=1e-6, rtol=0)
    assert calls.count(False) == (0 if 3 in skipped else 4) or 3 in skipped


@pytest.mark.parametrize("kind", ("sd3", "sd35"))
def test_skip_layer_guidance_is_a_lane_of_its_own(kind):
    """A call of half the batch, and, with guidance in two calls, one that differs in its skipped layers alone."""
    net, both = make_transformer(kind), transformer_inputs(kind)
    half = {name: value[1:] for name, value in both.items()}
    for calls in (
        (both, {**half, "skip_layers": [2]}),
        (half, {**half, "skip_layers": [2]}, {**half, "skip_layers": [1]}),
    ):
        expected = [Trajectory(net, kind).call(0, inputs) for inputs in calls]
        pipe = agentsd.apply_patch(Trajectory(net, kind), **REUSE)
        for outputs in pipe.run(*calls):
            torch.testing.assert_close(outputs, expected, atol=1e-6, rtol=0)
        assert agentsd.report(pipe).last == {"full": 4 * len(calls), "cached": 4 * len(calls)}
        agentsd.remove_patch(net)


def test_guidance_in_two_calls_keeps_two_lanes():
    net, both = make_transformer("flux"), transformer_inputs("flux")
    pick = lambda i: {n: v if n.endswith("ids") else v[i : i + 1] for n, v in both.items()}
    expected = [Trajectory(net, "flux").call(0, pick(i)) for i in range(2)]
    pipe = agentsd.apply_patch(Trajectory(net, "flux"), **REUSE)
    for outputs in pipe.run(pick(0), pick(1)):
        torch.testing.assert_close(outputs, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("order", [0, 1])
def test_a_tensor_is_kept_a_lane_or_two_with_their_slope(kind, order):
    inputs = transformer_inputs(kind)
    pipe = agentsd.apply_patch(Trajectory(make_transformer(kind), kind), **{**REUSE, "cache_order": order})
    pipe.run(inputs)
    width, tokens = 32 if kind in PACKED else 16, 256 if kind == "sana" else 64
    assert agentsd.report(pipe).cache_bytes == 4 * 2 * (tokens + order * (tokens + 1)) * width  # bytes, batch, ...
    assert agentsd.report(pipe).last["cached"] >= 4


def test_features_in_half_precision_are_kept_in_float32(kind):
    net = make_transformer(kind).to(torch.bfloat16)
    inputs = {
        n: v if n[4:] in ("ids", "shapes", "seq_lens") else v.to(net.dtype)
        for n, v in transformer_inputs(kind).items()
    }
    expected = Trajectory(net, kind).call(0, inputs)
    pipe = agentsd.apply_patch(Trajectory(net, kind), **REUSE, cache_branch=1)
    for (output,) in pipe.run(inputs):
        assert torch.equal(output, expected)


def test_removal_gives_the_transformer_back(kind):
    net, inputs = make_transformer(kind), transformer_inputs(kind)
    before, plain = [sorted(vars(module)) for module in net.modules()], Trajectory(net, kind).call(0, inputs)
    pipe = agentsd.apply_patch(Trajectory(net, kind), preset="balanced")
    pipe.run(inputs)
    agentsd.remove_patch(net)
    assert patch_of(pipe) is None
    assert [sorted(vars(module)) for module in net.modules()] == before
    assert torch.equal(pipe.call(0, inputs), plain)


def test_the_branch_is_checked(kind):
    net = make_transformer(kind)
    blocks = len(host_of(net).sites(net))
    agentsd.apply_patch(net, 0, cache_interval=2, cache_branch=blocks - 2)
    with pytest.raises(ValueError, match=f"cache_branch={blocks - 1} is not allowed: expected 0 to {blocks - 2}"):
        agentsd.apply_patch(net, 0, cache_interval=2, cache_branch=blocks - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("begin", [0, 7])
def test_timesteps_that_were_cast_and_divided_are_found(dtype, begin):
    """In bfloat16 many of 50 steps are equal to their neighbours: the scheduler knows which of them it is at."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=12.0)
    scheduler.set_timesteps(50)
    if begin:
        scheduler.set_begin_index(begin)
    pipe, latents = Trajectory(None, "flux"), torch.zeros(2, 4)
    pipe.scheduler = scheduler
    schedule = Schedule(pipe)
    cast = [timestep.expand(2).to(dtype) / 1000 for timestep in scheduler.timesteps]
    if dtype == torch.bfloat16:
        assert len({float(timestep[0]) for timestep in cast}) < 50
    for i in range(begin, 50):
        moment = schedule.locate(cast[i], 1000.0)
        assert (moment.call, moment.calls, moment.step, moment.mixed) == (i, 50, i, False)
        scheduler.step(latents, scheduler.timesteps[i], latents)


def test_without_a_schedule_flux_is_located_in_the_training_timesteps():
    moment = Schedule().locate(torch.tensor([0.25, 0.25]), 1000.0)
    assert (moment.step, moment.steps, moment.calls) == (749, 1000, None)
