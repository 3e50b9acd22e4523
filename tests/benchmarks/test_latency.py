"""Trajectories: timed, profiled and counted."""

import json

import pytest
import torch
from running import MERGING, PAPER, run

import agentsd

TINY = ["--model", "tiny", "--size", "128", "--device", "cpu", "--dtype", "float32", "--rounds", "2", "--steps", "4"]


def tiny_pipeline(model: str = "tiny", scheduler: str | None = None):
    from architectures import load_pipeline, random_inputs  # noqa: PLC0415

    pipe = load_pipeline(model, torch.float32, "cpu", scheduler)
    return pipe, random_inputs(pipe, 2, 128)


@pytest.fixture(scope="module")
def latency(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("latency") / "latency.json"
    result = run("latency.py", *TINY, "--methods", PAPER, MERGING, "--profile", "--out", out)
    assert result.returncode == 0, result.stderr
    return {**json.loads(out.read_text()), "printed": result.stdout}


def test_latency(latency):
    rows = latency["rows"]
    assert [row["method"] for row in rows] == ["unpatched", PAPER, MERGING]
    assert rows[0]["speedup"] == 1
    for row in rows:
        assert len(row["rounds"]) == 2
        for measured in row["rounds"]:
            assert len(measured["calls"]) == 4
            assert sum(measured["calls"]) <= measured["seconds"]
        assert row["calls"]["least"] <= row["calls"]["median"] <= row["calls"]["most"]
        assert row["spread"][0] <= row["speedup"] <= row["spread"][1]


def test_profile(latency):
    for shares in latency["profile"].values():
        kinds = {kind: share for kind, share in shares.items() if kind != "seconds"}
        assert min(kinds.values()) > 0  # nothing counted twice
        assert sum(kinds.values()) == pytest.approx(1)
    assert latency["printed"].count("%") > len(latency["profile"])  # the shares, printed


def test_the_profile_counts_nothing_twice():
    """Of the operations that have a share none is within another, with a patch as without."""
    from methods import METHODS  # noqa: PLC0415
    from profiling import OPERATIONS  # noqa: PLC0415

    pipe, inputs = tiny_pipeline()
    METHODS[PAPER].apply(pipe)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        pipe(num_inference_steps=2, **inputs)
    shared = [event for event in profiler.events() if event.name in OPERATIONS.values()]
    assert {event.name for event in shared} == set(OPERATIONS.values())
    for event in shared:
        while event.cpu_parent is not None:
            event = event.cpu_parent
            assert event.name not in OPERATIONS.values()


def test_what_a_gpu_s_trace_is_counted_of():
    from profiling import counted_events  # noqa: PLC0415

    events = [
        {"cat": "kernel", "name": "gemm", "dur": 1500},
        {"cat": "kernel", "name": "norm", "dur": 500},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pageable -> Device)", "dur": 250},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)", "dur": 250},
        {"cat": "gpu_memset", "name": "Memset (Device)", "dur": 500},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize", "dur": 9},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 9},
        {"ph": "M", "name": "process_name"},
    ]
    assert counted_events(events) == {"kernels": 2, "copies": 1, "waits": 1, "device_ms": 3.0}


@pytest.mark.parametrize("model", ["tiny", "tiny-xl"])
def test_every_method_runs_and_leaves_the_pipeline_as_it_was(model):
    """Also how many denoiser calls run whole: what reuses features has fewer, and fewer steps fewer."""
    from methods import METHODS, chosen, fitting  # noqa: PLC0415

    pipe, inputs = tiny_pipeline(model)
    ran = []
    pipe.unet.mid_block.resnets[0].register_forward_hook(lambda *_: ran.append(True))
    whole, images = {}, {}
    for name, method in fitting(chosen(None, []), pipe).items():
        undo = method.apply(pipe)
        ran.clear()
        images[name] = method.images(pipe, num_inference_steps=6, **inputs).images
        whole[name] = len(ran)
        undo()
    after = METHODS["unpatched"].images(pipe, num_inference_steps=6, **inputs).images
    assert torch.equal(after, images["unpatched"])
    assert all(not torch.equal(image, after) for name, image in images.items() if name != "unpatched")
    assert whole["unpatched"] == whole[PAPER] == whole["tomesd r=0.4"] == 6
    assert whole["unpatched, 1/2 of the steps"] == 3
    assert whole["DeepCache N=3"] == whole["agentsd r=0.4 + DeepCache N=3"] == 2
    assert whole["agentsd balanced"] < 6


PEERS = {"tiny-sd3": {"MagCache", "TaylorSeer N=3"}, "tiny-pixart": {"FirstBlockCache"}}
PEERS["tiny-flux"] = PEERS["tiny-sd3"] | PEERS["tiny-pixart"]


@pytest.mark.parametrize("model", PEERS)
def test_transformers_have_peers_of_their_own(model, capsys):
    """Each skips something, begins anew with each image, and leaves the pipeline as it was."""
    from methods import METHODS, fitting  # noqa: PLC0415

    pipe, inputs = tiny_pipeline(model)
    draw = lambda name: METHODS[name].images(pipe, num_inference_steps=8, **inputs).images
    methods = fitting(
        {name: METHODS[name] for name in ("DeepCache N=3", "agentsd balanced", *PEERS["tiny-flux"])}, pipe
    )
    assert set(methods) == {"agentsd balanced"} | PEERS[model]
    assert "DeepCache N=3" in capsys.readouterr().err
    before = draw("unpatched")
    for name, method in methods.items():
        undo = method.apply(pipe)
        first = draw(name)
        assert first.isfinite().all() and not torch.equal(first, before), name
        assert torch.equal(draw(name), first), name
        undo()
    assert torch.equal(draw("unpatched"), before)


@pytest.mark.parametrize("model", PEERS)
def test_operations_of_transformers(model, tmp_path):
    """Counted at any size, without memory for it: a cached call runs the first block of several."""
    arguments = ["--model", model, "--size", "1024", "--steps", "7", "--out", tmp_path, "--methods"]
    result = run("operations.py", *arguments, "agentsd balanced", "unpatched, 3/7 of the steps", "FirstBlockCache")
    assert result.returncode == 0, result.stderr
    assert "left out, not for a" in result.stderr and "FirstBlockCache" in result.stderr
    found = json.loads((tmp_path / f"operations-{model}-1024.json").read_text())["rows"]
    plain, share, ours = (row | row["calls"] for row in found)
    assert plain["dearest"] == plain["cheapest"] == ours["dearest"] > 2 * ours["cheapest"]
    assert share["total"] == 3 * plain["dearest"] and plain["total"] == 7 * plain["dearest"]


def test_a_cache_of_diffusers_has_as_many_full_calls_on_each_architecture():
    """Flux's pipeline sets a context of its own in every call, and in another a cache would begin once more."""
    from methods import METHODS  # noqa: PLC0415

    full = {}
    for model in ("tiny-sd3", "tiny-flux"):
        (pipe, inputs), ran, method = tiny_pipeline(model), [], METHODS["TaylorSeer N=3"]
        undo = method.apply(pipe)
        query = pipe.transformer.transformer_blocks[0].attn.to_q
        query.register_forward_hook(lambda *_, ran=ran: ran.append(True))
        method.images(pipe, num_inference_steps=6, **inputs)
        undo()
        full[model] = len(ran)
    assert full == {"tiny-sd3": 4, "tiny-flux": 4}


def test_operations_of_a_transformer_are_those_of_its_layers(tmp_path):
    """One block of Stable Diffusion 3 medium: 12 d^2 L + 2 d L^2 multiply-adds, of two operations each."""
    from architectures import ARCHITECTURES, random_pipeline  # noqa: PLC0415
    from methods import METHODS  # noqa: PLC0415
    from operations import counted  # noqa: PLC0415

    of = lambda blocks: counted(
        random_pipeline({**ARCHITECTURES["sd3-medium"], "num_layers": blocks}, torch.float32, "meta"),
        METHODS["unpatched"], 1024, 1,
    )["total"]  # fmt: skip
    width, tokens = 1536, 4096 + 333
    assert of(3) - of(2) == pytest.approx(2 * (12 * width**2 * tokens + 2 * width * tokens**2), rel=0.01)


@pytest.mark.parametrize("mode", ["channels-last", "compile", "reduce-overhead"])
def test_modes_change_no_image_and_are_undone(mode, monkeypatch):
    from methods import METHODS  # noqa: PLC0415
    from modes import MODES  # noqa: PLC0415

    asked = []
    compile_ = lambda unet, **options: asked.append(options) or setattr(unet, "_compiled_call_impl", unet._call_impl)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    pipe, inputs = tiny_pipeline()
    before = pipe(num_inference_steps=4, **inputs).images
    method = MODES[mode](METHODS["agentsd balanced"])
    undo = method.apply(pipe)
    assert method.images(pipe, num_inference_steps=4, **inputs).images.isfinite().all()
    undo()
    assert torch.equal(pipe(num_inference_steps=4, **inputs).images, before)
    assert pipe.unet._compiled_call_impl is None
    assert asked == {"channels-last": [], "compile": [{"mode": "default"}]}.get(mode, [{"mode": mode}])
    assert not pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_cuda_graphs_are_for_what_is_agentsd_alone(monkeypatch):
    """Unpatched, too, which takes a patch that does nothing but record."""
    from methods import METHODS  # noqa: PLC0415
    from modes import MODES  # noqa: PLC0415

    asked = []
    monkeypatch.setattr(agentsd, "apply_patch", lambda pipe, **settings: asked.append(settings))
    running = {name: MODES["cuda-graphs"](method) for name, method in METHODS.items()}
    for name in ("unpatched", "unpatched, 1/2 of the steps", PAPER, "agentsd balanced"):
        running[name].apply(None)
    assert all(settings["cuda_graphs"] for settings in asked)
    assert [settings.get("ratio") for settings in asked[:2]] == [0, 0]
    assert asked[3] == METHODS["agentsd balanced"].settings["agentsd"] | {"cuda_graphs": True}
    assert running["unpatched, 1/2 of the steps"].steps(4) == 2
    for name in ("tomesd r=0.4", "DeepCache N=3", "agentsd r=0.4 + DeepCache N=3"):
        assert running[name] is None


def test_what_cannot_run_in_a_mode_is_left_out_and_named(tmp_path, monkeypatch):
    import methods  # noqa: PLC0415

    def fails(pipe):
        raise RuntimeError("not with CUDA graphs\nand a long explanation")

    monkeypatch.setitem(
        methods.METHODS, "DeepCache N=3", methods.Method(methods.unpatched, call=lambda *_, **__: fails(0))
    )
    out = tmp_path / "latency.json"
    result = run("latency.py", *TINY, "--methods", "DeepCache N=3", MERGING, "--out", out)
    assert result.returncode == 0, result.stderr
    data = json.loads(out.read_text())
    assert [row["method"] for row in data["rows"]] == ["unpatched", MERGING]
    assert data["notes"] == ["DeepCache N=3, eager: left out, since it fails with: not with CUDA graphs"]


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "heun"])
def test_the_calls_that_are_timed_are_the_trajectory_s(scheduler):
    from latency import Case, Trajectories  # noqa: PLC0415
    from methods import METHODS  # noqa: PLC0415

    pipe, _ = tiny_pipeline(scheduler=scheduler)
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(True))
    case = Case(model="tiny", device="cpu", dtype="float32", steps=5, profile=False)
    measured = Trajectories(case, pipe, 64).timed(METHODS["unpatched"])
    assert len(measured["calls"]) == len(calls) == len(pipe.scheduler.timesteps)


def test_live_memory():
    """Views and what was there before hold nothing, and what is let go counts until then."""
    from operations import LiveMemory  # noqa: PLC0415

    mega = torch.empty(2**18, device="meta")
    with LiveMemory() as memory:
        view = mega.view(2, -1)[0]
        assert memory.peak_mb == 0
        three = torch.cat((mega, mega, mega))
        assert memory.peak_mb == 3
        del three
        two = mega + mega.mul_(2) + view[0]  # a sum, and one of it
        assert memory.peak_mb == 3
        kept = [two, two.repeat(3)]
        assert memory.peak_mb == 4
    assert len(kept) == 2


@pytest.fixture(scope="module")
def empty():
    """The upper half of Stable Diffusion 1.5: what a call holds at its most is there."""
    from architectures import ARCHITECTURES, random_pipeline  # noqa: PLC0415

    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "block_out_channels": (320, 640)}
    blocks["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D")
    return random_pipeline({**ARCHITECTURES["sd15"], **blocks}, torch.float32, "meta")


@pytest.mark.parametrize("size", [256, 2048])
def test_memory_of_a_call_does_not_grow(empty, size):
    """Beyond the indices of tokens: two for each token and block, and those of one matching."""
    from methods import METHODS  # noqa: PLC0415
    from operations import counted  # noqa: PLC0415

    names = [PAPER, "agentsd r=0.4, MLP and cross-attention merged, too", "agentsd few_steps"]
    unpatched = counted(empty, METHODS["unpatched"], size, 1)["peak_mb"]
    # two steps: one of agents, one that merges
    assert max(counted(empty, METHODS[name], size, 2)["peak_mb"] for name in names) <= unpatched * 1.005


def test_operations(empty, tmp_path):
    """Counted, not timed: so with no attention at the top there is less than with any patch of it."""
    from methods import LIMIT, METHODS  # noqa: PLC0415
    from operations import counted  # noqa: PLC0415

    plain, paper, limit = (counted(empty, METHODS[name], 128, 2)["total"] for name in ("unpatched", PAPER, LIMIT))
    assert plain > paper > limit
    tiny = ["--model", "tiny", "--size", "64", "--steps", "6", "--out", tmp_path]
    result = run("operations.py", *tiny, "--methods", "DeepCache N=3", "unpatched, 1/2 of the steps")
    assert result.returncode == 0, result.stderr
    rows = {row["method"]: row for row in json.loads((tmp_path / "operations-tiny-64.json").read_text())["rows"]}
    calls, plain = rows["DeepCache N=3"]["calls"], rows["unpatched"]["calls"]
    assert plain["dearest"] == plain["cheapest"] == calls["dearest"] > calls["cheapest"]
    assert rows["DeepCache N=3"]["total"] == 2 * calls["dearest"] + 4 * calls["cheapest"]
    assert rows["unpatched, 1/2 of the steps"]["total"] == 3 * plain["dearest"]
