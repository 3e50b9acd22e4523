"""torch.compile, DeepCache."""

from itertools import product

import pytest
import torch
import torch._dynamo
from conftest import ONE_LEVEL, make_scheduler, make_unet, sweep, unet_inputs
from diffusers import DDIMScheduler
from torch._dynamo.utils import counters
from torch.profiler import profile, record_function
from zoo import build, runner

import agentsd

TIMESTEPS = (901, 861, 821, 781, 741, 701, 301, 261, 221, 181, 141, 101)
SETTINGS = {
    "agents": ({}, 2),
    "sampling": ({"sample_kv": True, "agent_sx": 2}, 2),
    "reuse": ({"cache_interval": 3}, 4),  # whole and cheap calls in each phase
    "extrapolated": ({"cache_interval": 3, "cache_order": 1}, 4),
}
HOW = {
    "torch.compile": lambda unet: torch.compile(unet, backend="eager"),
    "torch.compile, fullgraph": lambda unet: torch.compile(unet, backend="eager", fullgraph=True),
    "compile in place": lambda unet: unet.compile(backend="eager", fullgraph=True) or unet,
    "compile_repeated_blocks": lambda unet: unet.compile_repeated_blocks(backend="eager", fullgraph=True) or unet,
}

marked = pytest.mark.skipif(torch.__version__ < "2.9", reason="this version of PyTorch does not compile the marks")
SIZES = {"one level": {**ONE_LEVEL, "mid_block_type": "UNetMidBlock2DCrossAttn"}, "two levels": {}}
ORDERS = ("before", "after")
NOTICES = sweep(product(["one level"], ["torch.compile", "compile_repeated_blocks"]), product(["two levels"], HOW))
CASES = sweep(
    [("one level", *case) for case in zip(HOW, 2 * ORDERS, SETTINGS, strict=True)],
    product(["two levels"], HOW, ORDERS, SETTINGS),
)


def trajectory(unet) -> torch.Tensor:
    return torch.cat([unet(**unet_inputs(timestep=torch.tensor(t))).sample for t in TIMESTEPS])


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_one_graph_a_phase_and_none_a_step(case):
    size, how, order, name = case
    settings, phases = SETTINGS[name]
    expected = trajectory(agentsd.apply_patch(make_unet(**SIZES[size]), seed=0, **settings))
    unet = make_unet(**SIZES[size])
    if order == "before":
        agentsd.apply_patch(unet, seed=0, **settings)
    compiled = HOW[how](unet)
    if order == "after":
        agentsd.apply_patch(compiled, seed=0, **settings)
    torch.testing.assert_close(trajectory(compiled), expected)
    graphs = counters["stats"]["unique_graphs"]
    if how != "compile_repeated_blocks":  # which also compiles the blocks that are not patched
        assert graphs == phases
    assert torch.equal(trajectory(compiled), trajectory(compiled))
    assert counters["stats"]["unique_graphs"] == graphs, "a second image was compiled anew"
    assert not counters["graph_break"]


@marked
@pytest.mark.parametrize("order", ORDERS)
def test_blocks_compiled_one_by_one_do_not_run_the_graph_of_one_that_is_left_alone(order):
    """The outermost block samples keys in cached calls; in full calls all blocks of its kind are as they were."""
    settings = {"cache_interval": 3, "cache_cell": 2, "ratio": 0}
    expected = trajectory(agentsd.apply_patch(make_unet(), seed=0, **settings))
    unet = make_unet()
    if order == "before":
        agentsd.apply_patch(unet, seed=0, **settings)
    HOW["compile_repeated_blocks"](unet)
    if order == "after":
        agentsd.apply_patch(unet, seed=0, **settings)
    torch.testing.assert_close(trajectory(unet), expected)
    agentsd.apply_patch(unet, **settings | {"cache_cell": 1})
    assert not torch.allclose(trajectory(unet), expected)


@marked
@pytest.mark.parametrize("settings", [{"ratio": 0.5}, {"preset": "balanced"}, {"preset": "balanced", "ratio": 0.5}])
@pytest.mark.parametrize("how", sweep(["compile in place", "compile_repeated_blocks"], ["torch.compile"]))
def test_no_graph_of_an_unpatched_twin_is_taken(how, settings):
    """Compilers look for graphs by the code, and one with hooks fits any module that has the same weights and none."""
    expected = trajectory(agentsd.apply_patch(make_unet(), seed=0, **settings))
    plain = trajectory(make_unet())
    twin, unet = HOW[how](make_unet()), HOW[how](make_unet())
    agentsd.apply_patch(unet, seed=0, **settings)
    for _ in range(2):
        torch.testing.assert_close(trajectory(twin), plain)
        torch.testing.assert_close(trajectory(unet), expected)


@marked
def test_no_graph_of_another_level_is_taken():
    """Where levels are as wide, those that are left alone have the very graphs of those that are patched."""
    wide = {"block_out_channels": (16, 16), "attention_head_dim": 4}
    expected = trajectory(agentsd.apply_patch(make_unet(**wide), seed=0))
    unet = HOW["compile_repeated_blocks"](make_unet(**wide))
    agentsd.apply_patch(unet, seed=0)
    for _ in range(2):
        torch.testing.assert_close(trajectory(unet), expected)


@pytest.mark.parametrize("name", ["agents", "extrapolated"])
def test_a_compiled_call_is_one_graph_and_three_operations_outside_of_it_at_most(name):
    """A device that waits for nobody: full and cached calls alike."""

    def backend(graph, _):
        def run(*args):
            with record_function("graph"):
                return graph.forward(*args)

        return run

    unet = agentsd.apply_patch(make_unet(**SIZES["one level"]), seed=0, **SETTINGS[name][0])
    unet.compile(backend=backend, fullgraph=True)
    scheduler = make_scheduler(DDIMScheduler)
    scheduler.set_timesteps(12)
    inputs = unet_inputs()
    for image in range(2):
        for timestep in scheduler.timesteps:
            with profile() as profiled:
                unet(**inputs | {"timestep": timestep})
            events = profiled.events()
            outside = [e.name for e in events if e.name.startswith("aten::") and e.cpu_parent is None]
            if image:  # the first compiles
                assert sum(event.name == "graph" for event in events) == 1
                assert len(outside) <= 3, outside


@pytest.mark.parametrize("case", NOTICES, ids="-".join)
def test_a_graph_that_has_run_notices_the_patch_and_its_removal(case):
    size, how = case
    compiled = HOW[how](make_unet(**SIZES[size]))
    plain = trajectory(compiled)
    agentsd.apply_patch(compiled, seed=0)
    assert torch.equal(trajectory(compiled), trajectory(agentsd.apply_patch(make_unet(**SIZES[size]), seed=0)))
    agentsd.remove_patch(compiled)
    assert torch.equal(trajectory(compiled), plain)


@pytest.mark.parametrize("order", ["before", "after"])
def test_deepcache(order):
    deepcache = pytest.importorskip("DeepCache")
    pipe = build("StableDiffusionPipeline")
    run, helper = runner(pipe), deepcache.DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    plain = run()
    if order == "before":
        helper.enable()
    agentsd.apply_patch(pipe, seed=0)
    if order == "after":
        helper.enable()
    both = run()
    assert both.isfinite().all() and not torch.equal(both, plain)
    helper.disable()
    alone = run()
    agentsd.remove_patch(pipe)
    assert not torch.equal(alone, both) and not torch.equal(alone, plain)
    assert torch.equal(run(), plain)


def test_reuse_equals_deepcache():
    """Branch 0 is DeepCache's: the same image, though ours runs one layer less."""
    deepcache = pytest.importorskip("DeepCache")
    pipe = build("StableDiffusionPipeline")
    run, helper = runner(pipe, num_inference_steps=7), deepcache.DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    expected = run()
    helper.disable()
    agentsd.apply_patch(pipe, 0, cache_interval=3)
    torch.testing.assert_close(run(), expected)
