"""The benchmark commands from end to end, on the demo model and few small images."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

BENCHMARKS, DEMO_MODEL = ROOT / "benchmarks", ROOT / "examples" / "demo_model"
sys.path.insert(0, str(BENCHMARKS))
METHODS = ["agentsd r=0.4 (the paper's schedule)", "agentsd fast"]
NOISE = (0, 5, 40)  # standard deviations, in levels of 255
FEW = ["--images", "4", "--steps", "2", "--batch", "2", "--methods", METHODS[1]]

pytest.importorskip("torch_fidelity", reason="the extra `bench` is not installed")


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_latency(tmp_path):
    out = tmp_path / "latency.json"
    small = ["--model", DEMO_MODEL, "--size", "128", "--dtype", "float32", "--rounds", "1"]
    result = run("latency.py", *small, "--methods", *METHODS, "--profile", "--out", out)
    assert result.returncode == 0, result.stderr
    data = json.loads(out.read_text())
    assert [row["method"] for row in data["rows"]] == ["unpatched", *METHODS]
    assert data["flops"]["total"] > sum(v for k, v in data["flops"].items() if k != "total") > 0
    assert data["rows"][0]["speedup"] == 1
    unpatched, *patched = (row["operations"]["calls"]["early whole"] for row in data["rows"])
    assert unpatched == data["flops"]["total"] > max(patched)
    assert set(data["rows"][2]["calls"]) == {"early whole", "early cheap"}  # which hold for all steps
    for method in METHODS:
        shares = {kind: share for kind, share in data["profile"][method].items() if kind != "seconds"}
        assert {"matching and merging", "self-attention"} <= shares.keys()
        assert min(shares.values()) > 0  # nothing counted twice
        assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert result.stdout.count("%") > len(METHODS)  # the shares, printed


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quality")
    result = run("quality.py", *FEW, "--folder", folder, "--out", folder / "quality.json")
    assert result.returncode == 0, result.stderr
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*.png"))}


def test_quality(images):
    rows = {row["method"]: row["metrics"] for row in json.loads((images / "quality.json").read_text())["rows"]}
    assert "PSNR, dB" not in rows["unpatched"]  # it is what the others are compared with
    assert 5 < rows[METHODS[1]]["PSNR, dB"] < 100
    assert rows[METHODS[1]]["FD-EffNetLite0"] > 0


def test_against_real_images_a_distance_says_how_sure_it_is(noisy, tmp_path):
    """Images of three methods, each noisier than the one before: so many errors above what is unpatched."""
    from methods import METHODS as known  # noqa: PLC0415
    from quality import folder_of, measure  # noqa: PLC0415
    from tables import quality_rows  # noqa: PLC0415

    args = SimpleNamespace(
        folder=tmp_path, images=32, real=noisy[0], emoji=None, extractor="efficientnet-lite0", clip=None
    )
    methods = {name: known[name] for name in ("unpatched", *METHODS)}
    for name, source in zip(methods, noisy, strict=True):
        folder_of(args, name).symlink_to(source)
    result = measure(args, methods, [""] * 32)
    _, *rows = (row["metrics"] for row in result["rows"])
    above, error = (f"FD-EffNetLite0 above unpatched{what}" for what in ("", ", standard error"))
    assert rows[0][above] < rows[1][above]
    assert all(0 < row[error] < row[above] for row in rows)
    heading, *shown = quality_rows(result)
    assert above in heading and error not in heading
    assert ["±" in row[heading.index(above)] for row in shown] == [False, True, True]


def test_resumed_equals_uninterrupted(images, tmp_path):
    """Killed after one image, in the middle of the next: the rest is made, nothing twice."""
    method = tmp_path / "agentsd-fast"
    method.mkdir()
    (method / "00000.png").write_bytes((images / "agentsd-fast" / "00000.png").read_bytes())
    (method / "00001.part").write_bytes(b"torn")
    made = (method / "00000.png").stat().st_mtime_ns
    assert run("quality.py", *FEW, "--folder", tmp_path, "--out", tmp_path / "q.json").returncode == 0
    assert files(tmp_path) == files(images)
    assert (method / "00000.png").stat().st_mtime_ns == made


def test_two_processes_make_the_images_of_one(images, tmp_path):
    script = [BENCHMARKS / "quality.py", *FEW, "--folder", tmp_path, "--out", tmp_path / "q.json"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *map(str, script)]
    # `accelerate launch` does the same on GPUs; as many threads as one process has, for sums in the same order
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    assert files(tmp_path) == files(images)
    assert json.loads((tmp_path / "q.json").read_text())["settings"]["processes"] == 2


def test_images_of_other_settings_are_not_taken_for_this_run_s(images):
    again = ["--folder", images, "--out", images / "q.json"]
    for arguments in (["--steps", "3"], ["--images", "3"], ["--guidance", "2"]):
        result = run("quality.py", *FEW, *again, *arguments)
        assert result.returncode == 2 and "give" in result.stderr.splitlines()[-1]


def test_the_profile_counts_merging_once(monkeypatch):
    """By a clock that only merging moves: that is the patch's work, and none of the layer's that it is done for."""
    from conftest import make_unet, unet_inputs  # noqa: PLC0415
    from measure import timed  # noqa: PLC0415

    import agentsd  # noqa: PLC0415

    merge, calls = agentsd.block.merge, []
    monkeypatch.setattr(agentsd.block, "merge", lambda *args: calls.append(1) or merge(*args))
    monkeypatch.setattr("measure.time.perf_counter", lambda: float(len(calls)))
    unet, seconds = make_unet(), {}
    with timed(unet, seconds):
        agentsd.apply_patch(unet)
        unet(**unet_inputs())
        agentsd.remove_patch(unet)
    assert seconds["matching and merging"] == len(calls) > 0 == seconds["self-attention"]
    assert not any("forward" in vars(module) for module in unet.modules())


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("latency.py", ["--model", "no/such/model"], "no/such/model"),
        ("latency.py", ["--rounds", "0"], "--rounds"),
        ("latency.py", ["--warmup", "-1"], "--warmup"),
        ("latency.py", ["--size", "100"], "multiple of 64"),
        ("operations.py", ["--steps", "0"], "--steps"),
        ("operations.py", ["--methods", "magic"], "magic"),
        ("latency.py", ["--size", "64", "128", "--out", "one.json"], "--out"),
        ("latency.py", ["--pipeline"], "--pipeline"),
        ("latency.py", ["--profile", "--compile"], "--profile"),
        ("quality.py", ["--model", "no/such/model"], "no/such/model"),
        ("quality.py", ["--images", "0"], "--images"),
        ("quality.py", ["--real", "no/such/folder"], "no/such/folder"),
        ("quality.py", ["--folder", "/proc/nowhere"], "/proc/nowhere"),
        ("quality.py", ["--prompts", "no.txt"], "no.txt"),
        ("quality.py", ["--methods", "magic"], "magic"),
        ("report.py", ["--results", "no/such/folder"], "no/such/folder"),
    ],
)
def test_one_clear_line_and_exit_code_2(script, arguments, message):
    result = run(script, *arguments)
    assert result.returncode == 2
    assert message in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> list[Path]:
    """Sets of smooth images with more and more noise."""
    folder, rng = tmp_path_factory.mktemp("noisy"), np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(60, 190, (3, 3, 3)).astype(np.uint8)) for _ in range(32)]
    clean = [np.asarray(image.resize((96, 96), Image.Resampling.BICUBIC), dtype=np.float64) for image in coarse]
    for level in NOISE:
        (folder / str(level)).mkdir()
        for i, pixels in enumerate(clean):
            image = (pixels + rng.normal(0, level, pixels.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / str(level) / f"{i:05d}.png")
    return [folder / str(level) for level in NOISE]


def test_a_set_is_at_distance_0_from_itself_and_noise_drives_it_away(noisy):
    from metrics import EXTRACTOR, fidelity  # noqa: PLC0415

    same, little, much = (fidelity(folder, noisy[0], EXTRACTOR)["FD-EffNetLite0"] for folder in noisy)
    assert abs(same) < 1e-3 < little < much


def test_the_jackknife_s_error_of_a_mean_is_that_of_its_groups_means():
    from metrics import GROUPS, standard_error  # noqa: PLC0415

    values = np.random.default_rng(0).normal(size=(GROUPS, 7))
    without = np.array([np.delete(values, group, axis=0).mean() for group in range(GROUPS)])
    assert np.isclose(standard_error(without), values.mean(1).std(ddof=1) / np.sqrt(GROUPS))


def test_every_image_is_left_out_once(noisy):
    from metrics import EXTRACTOR, GROUPS, fidelity, without_each_group  # noqa: PLC0415

    found = without_each_group(noisy[1], noisy[0], EXTRACTOR)
    assert found.shape == (GROUPS,) and len(set(found)) == GROUPS
    assert np.isclose(found.mean(), fidelity(noisy[1], noisy[0], EXTRACTOR)["FD-EffNetLite0"], rtol=0.2)


@pytest.fixture(scope="module")
def report(images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    small = ["--model", DEMO_MODEL, "--size", "64", "--dtype", "float32", "--rounds", "1", "--methods", *METHODS]
    assert run("latency.py", *small, "--out", folder / "latency.json").returncode == 0
    (folder / "quality.json").write_text((images / "quality.json").read_text())
    result = run("report.py", "--results", folder, "--images", images)
    assert result.returncode == 0, result.stderr
    return folder


def test_the_report_holds_every_method(report):
    for text in ((report / name).read_text() for name in ("report.html", "README.md")):
        assert all(method in text.replace("&#x27;", "'") for method in METHODS)


def test_the_report_in_a_browser(report, browser_page, tmp_path):
    """From a file, without a request: the slider uncovers the patched image, the wheel zooms a plot."""
    page = browser_page
    page.goto((report / "report.html").as_uri())
    assert page.title() == "agentsd: benchmarks"
    slider = page.locator(".pair input").first
    slider.fill("50")
    assert "50%" in page.locator(".pair").first.locator("img").nth(1).evaluate("image => image.style.clipPath")
    box = page.locator(".pair").first.bounding_box()
    page.screenshot(path=tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        left, top = int(box["x"]), int(box["y"])
        assert len(picture.convert("RGB").crop((left, top, left + 256, top + 256)).getcolors(1 << 16)) > 100
    assert not [url for url in page.asked_for if not url.startswith(("file:", "data:"))]


def test_plots_are_zoomed_by_the_wheel(browser_page, tmp_path):
    import plots  # noqa: PLC0415
    from report import report as html_of  # noqa: PLC0415

    latency = json.loads((BENCHMARKS / "results" / "latency-sd15-512-bfloat16.json").read_text())
    rows = [
        {"method": row["method"], "metrics": {"PSNR, dB": 20.0 + i, "FD-EffNetLite0": 9.0 - i}}
        for i, row in enumerate(latency["rows"])
    ]
    settings = {"model": "demo", "images": 4, "steps": 2}
    quality = {"kind": "quality", "settings": settings, "command": "", "hardware": latency["hardware"], "rows": rows}
    drawn = plots.plots([latency, quality])
    assert len(drawn) == 2  # one for each metric
    (tmp_path / "report.html").write_text(html_of([latency, quality], drawn, None))
    browser_page.goto((tmp_path / "report.html").as_uri())
    plot = browser_page.locator("svg").first
    before = plot.get_attribute("viewBox")
    plot.hover()
    browser_page.mouse.wheel(0, -100)
    browser_page.wait_for_function(
        "before => document.querySelector('svg').getAttribute('viewBox') != before", arg=before
    )


def test_the_front_is_what_no_other_point_passes():
    from plots import pareto  # noqa: PLC0415

    points = [(1.0, 9.0, "slow"), (2.0, 5.0, "middle"), (2.0, 4.0, "worse"), (1.5, 4.5, "inside"), (3.0, 1.0, "fast")]
    assert [name for *_, name in pareto(points, 1)] == ["slow", "middle", "fast"]
    assert [name for *_, name in pareto(points, -1)] == ["fast"]


def test_every_kind_of_call_is_timed_where_it_comes():
    """What is called is whole or cheap as its name says: the middle of the UNet ran, or did not."""
    from conftest import make_unet, unet_inputs  # noqa: PLC0415
    from methods import METHODS, Calls, trajectory  # noqa: PLC0415

    class Holder:
        """What methods take for a pipeline."""

    for (name, method), steps in itertools.product(METHODS.items(), (4, 25, 50)):
        timesteps, starts = trajectory(steps)
        for phase, start in starts.items():
            holder = Holder()
            holder.unet, holder.scheduler = make_unet(), SimpleNamespace(timesteps=timesteps, order=1)
            undo, ran = method.at(steps).apply(holder), []
            holder.unet.mid_block.resnets[0].register_forward_hook(lambda *_, ran=ran: ran.append(True))
            for i, call in enumerate(Calls(method, steps).of(phase)):
                ran.clear()
                sample, _, text = unet_inputs().values()
                holder.unet(sample, timesteps[start + i], text)
                assert bool(ran) == call.endswith("whole"), (name, steps, call)
            undo()


def test_methods_share_calls_that_only_come_more_or_less_often():
    from methods import METHODS, Calls  # noqa: PLC0415

    shared = {
        "agentsd quality": "agentsd balanced",
        "agentsd balanced, but N=4": "agentsd balanced",
        "DeepCache N=5": "DeepCache N=3",
        "tomesd r=0.4 + DeepCache N=5": "tomesd r=0.4 + DeepCache N=3",
    }
    alike = {name: Calls(method, 50).alike for name, method in METHODS.items()}
    assert all(alike[name] == alike[other] for name, other in shared.items())
    assert len(set(alike.values())) == len(METHODS) - len(shared)  # and no others do


def test_a_share_of_the_trajectory_stands_alone():
    from methods import agent, together, tome  # noqa: PLC0415

    with pytest.raises(ValueError, match=r"interval 0.125: give it in calls"):
        together(tome(0.4), agent(preset="balanced"))


def test_speed_is_that_of_the_steps_whose_quality_is_shown():
    from tables import speedup  # noqa: PLC0415

    calls = {"early whole": 1.0, "late whole": 1.0, "early cheap": 0.0}
    latency = {"rows": [{"method": m, "rounds": [{"calls": calls}]} for m in ("unpatched", "agentsd balanced")]}
    assert speedup(latency, "agentsd balanced", 20) == 20 / 8  # calls 0, 1, 3, 6, ... 18 are whole
    assert speedup(latency, "agentsd balanced", 50) == 50 / 10  # every sixth, and the second
    assert speedup(latency, "agentsd balanced, but N=4", 50) == 50 / 14  # by the same calls
    assert speedup(latency, "agentsd fast", 50) is None


def test_results_of_other_machines_are_other_plots():
    from plots import plots  # noqa: PLC0415

    def result(size: int, **other: object) -> dict:
        settings = {"model": "sd15", "size": size, "dtype": "float32", "batch": 2, "steps": 50, "ratios": []}
        hardware = {"cpu": "A", "cores": 2, "instructions": "AVX2"}
        return {
            "kind": "latency",
            "settings": {**settings, "compile": False, "batch": other.pop("batch", 2)},
            "hardware": {**hardware, **other},
            "rows": [{"method": "unpatched", "schedule": 1.0 * size, "speedup": 1.0}],
        }

    everywhere = [{}, {"cpu": "B"}, {"gpu": "C"}, {"batch": 1}]
    results = [result(size, **other) for other in everywhere for size in (256, 512, 768)]
    assert len(plots(results)) == len(everywhere)


def count(size: int, *names: str) -> dict:
    from counting import counted  # noqa: PLC0415
    from methods import METHODS  # noqa: PLC0415

    settings = {"model": "sd15", "size": size, "batch": 1, "steps": 10, "dtype": "float32", "device": "cpu"}
    return counted(SimpleNamespace(**settings, compile=False), {name: METHODS[name] for name in names})


def test_live_memory():
    """Views and what was there before hold nothing, and what is let go counts until then."""
    from counting import LiveMemory  # noqa: PLC0415

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


@pytest.mark.parametrize("size", [256, 512, 1024, 2048])
def test_memory_of_a_call_does_not_grow(size):
    """Beyond the indices of tokens: two for each token and block, and those of one matching."""
    unpatched, *patched = (
        found["peak_mb"]
        for found in count(
            size,
            "unpatched",
            "agentsd r=0.4 (the paper's schedule)",
            "agentsd r=0.4, merging in all steps",
            "agentsd r=0.4, MLP and cross-attention merged, too",
            "agentsd few_steps",
        ).values()
    )
    assert max(patched) <= unpatched * 1.005


def test_operations():
    """Counted, not timed: so with no attention at the top there is less than with any patch of it."""
    names = ("unpatched", "agentsd r=0.4 (the paper's schedule)", "no self-attention at the top (the limit)")
    found = count(128, *names, "agentsd balanced")
    plain, paper, limit = (found[name]["schedule"] for name in names)
    assert plain > paper > limit
    whole, cheap = found["agentsd balanced"]["calls"].values()
    assert found["agentsd balanced"]["schedule"] == 6 * whole + 4 * cheap  # calls 0, 1, 2, 4, 6 and 8 are whole
    assert 10 * whole == plain


def test_whole_pipelines(tmp_path):
    out = tmp_path / "latency.json"
    small = ["--model", DEMO_MODEL, "--size", "128", "--dtype", "float32", "--rounds", "1", "--steps", "2"]
    result = run("latency.py", *small, "--pipeline", "--methods", METHODS[1], "--out", out)
    assert result.returncode == 0, result.stderr
    assert [row["schedule"] > 0 for row in json.loads(out.read_text())["rows"]] == [True, True]
