"""Results as tables, as a page, and as plots."""

import json
from pathlib import Path

import pytest
from running import BENCHMARKS, PAPER, run


def latency_result(size: int = 512, batch: int = 2, steps: int = 50, names=("unpatched", PAPER), **hardware) -> dict:
    settings = {"model": "sd15", "size": size, "dtype": "float32", "batch": batch, "steps": steps, "ratios": []}
    rows = [
        {
            "method": name,
            "mode": "eager",
            "ratio": None,
            "seconds": size / (i + 1),
            "speedup": i + 1.0,
            "spread": [i + 1.0, i + 1.0],
            "calls": {"least": 1.0, "most": 2.0},
            "peak_mb": 1024.0,
            "rounds": [{}],
        }
        for i, name in enumerate(names)
    ]
    return {
        "kind": "latency",
        "command": f"python benchmarks/latency.py --size {size}",
        "versions": {},
        "settings": {**settings, "modes": ["eager"]},
        "hardware": {"cpu": "A", "cores": 2, "instructions": "AVX2", **hardware},
        "rows": rows,
    }


def quality_result(names, steps: int = 50) -> dict:
    metrics = lambda i: {"PSNR, dB": 20.0 + i, "FD-EffNetLite0": 9.0 - i}
    rows = [{"method": n, "ratio": None, "metrics": metrics(i), "psnr": [10.0, 20.0 + i]} for i, n in enumerate(names)]
    settings = {"model": "demo", "images": 2, "steps": steps}
    hardware = {"cpu": "A", "cores": 2, "instructions": "AVX2"}
    result = {"kind": "quality", "settings": settings, "hardware": hardware, "command": "", "versions": {}}
    return {**result, "rows": rows}


FAST = "agentsd fast"
NAMES = ("unpatched", "tomesd r=0.4", PAPER, "DeepCache N=3", FAST)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A folder with a page, and in it another of every plot."""
    folder = tmp_path_factory.mktemp("report")
    for name, result in (("latency", latency_result(names=NAMES)), ("quality", quality_result(NAMES))):
        (folder / f"{name}.json").write_text(json.dumps(result))
    result = run("report.py", "--results", folder, "--plots", folder / "every")
    assert result.returncode == 0, result.stderr
    return folder


def test_the_page_holds_every_method_and_its_pictures(report):
    text = (report / "README.md").read_text()
    assert all(method in text for method in NAMES)
    assert {path.stem for path in (report / "plots").iterdir()} == {"fidelity", "images"}
    assert text.count("](plots/") == 2 and "## How fast" not in text  # no preset was timed beside balanced
    assert text.count("<details>") == text.count("</details>") == 2
    # a front for each metric, and the distribution
    assert len(list((report / "every").glob("*.svg"))) == 3


def test_the_committed_page_is_that_of_the_results():
    from report import RESULTS, load, page  # noqa: PLC0415

    text, pictures = page(load(RESULTS))
    assert (RESULTS / "README.md").read_text() == text
    assert {path.stem for path in (RESULTS / "plots").iterdir()} == set(pictures)


def test_timings_of_a_card_are_a_table():
    from overview import how_fast  # noqa: PLC0415

    names = ("unpatched", "DeepCache N=3", "agentsd balanced")
    cards = [latency_result(size, names=names, gpu="H100") for size in (512, 1024)]
    other = latency_result(names=names)
    text, pictures = how_fast([*cards, other, latency_result()])
    assert "H100, float32, batch 2, 50 steps:\n" in text and "2 cores, A, float32, batch 2, 50 steps:\n" in text
    assert text.count("| SD 1.5, 512 px | 512.0 | 3.00x | 2.00x |") == 2 and "tomesd" not in text  # none was timed
    assert list(pictures) == ["speed"] and not how_fast([other])[1]  # drawn of GPUs alone


def test_the_front_is_what_no_other_point_passes():
    from plots import pareto  # noqa: PLC0415

    points = [(1.0, 9.0, "slow"), (2.0, 5.0, "middle"), (2.0, 4.0, "worse"), (1.5, 4.5, "inside"), (3.0, 1.0, "fast")]
    assert [name for *_, name in pareto(points, 1)] == ["slow", "middle", "fast"]
    assert [name for *_, name in pareto(points, -1)] == ["fast"]


def test_results_of_other_machines_are_other_plots():
    from plots import plots  # noqa: PLC0415

    everywhere = [{}, {"cpu": "B"}, {"gpu": "C"}, {"batch": 1}]
    results = [latency_result(size, **other) for other in everywhere for size in (256, 512, 768)]
    assert len(plots(results)) == len(everywhere)


def test_speed_is_that_of_the_steps_whose_quality_is_shown():
    from plots import fronts  # noqa: PLC0415
    from tables import speedups  # noqa: PLC0415

    latency = latency_result(names=NAMES)
    assert speedups(latency, 50)[FAST] == 5 and not speedups(latency, 20)
    assert len(fronts([latency, quality_result(NAMES)])) == 2 and not fronts([latency, quality_result(NAMES, 20)])
    latency["speedups"] = {"20": {FAST: 2.0}}  # of results put together from single calls
    assert speedups(latency, 20) == {FAST: 2.0}


def test_gpus_come_first_and_what_was_counted_there_is_shown():
    from report import load  # noqa: PLC0415
    from tables import latency_rows  # noqa: PLC0415

    result = latency_result(gpu="H100")
    for row in result["rows"]:
        row |= {"host_ms": 4.0, "kernels": 1187.2, "copies": 0.1, "waits": 0.0, "device_ms": 12.34}
    heading, first, _ = latency_rows(result)
    shown = dict(zip(heading, first, strict=True))
    assert shown["kernels"] == "1,187" and shown["device_ms"] == "12.3" and shown["peak, GB"] == "1.00"
    kinds = ["gpu" in found["hardware"] for found in load(BENCHMARKS / "results")]
    assert kinds == sorted(kinds, reverse=True)


def test_lists_of_numbers_are_lines(tmp_path):
    from card import write_json  # noqa: PLC0415

    data = {"psnr": [1.5, -2e-05, 3], "rows": [{"name": "[1, 2]", "of": []}], "path": tmp_path}
    write_json(tmp_path / "x.json", data)
    assert json.loads((tmp_path / "x.json").read_text()) == {**data, "path": str(tmp_path)}
    assert '"psnr": [1.5, -2e-05, 3]' in (tmp_path / "x.json").read_text()
