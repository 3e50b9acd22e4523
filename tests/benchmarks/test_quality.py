"""Images of every method, made once, whole, and never mixed up; and what is measured of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from running import BENCHMARKS, MERGING, PAPER, run

NOISE = (0, 5, 40)  # standard deviations, in levels of 255
FEW = ["--images", "4", "--steps", "2", "--batch", "2", "--methods", MERGING]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quality")
    result = run("quality.py", *FEW, "--folder", folder, "--out", folder / "quality.json")
    assert result.returncode == 0, result.stderr
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*.png"))}


def test_quality(images):
    rows = {row["method"]: row for row in json.loads((images / "quality.json").read_text())["rows"]}
    assert "PSNR, dB" not in rows["unpatched"]["metrics"]  # it is what the others are compared with
    metrics = rows[MERGING]["metrics"]
    assert len(rows[MERGING]["psnr"]) == 4
    assert metrics["PSNR, dB"] == pytest.approx(np.mean(rows[MERGING]["psnr"]), abs=0.01)
    assert 5 < metrics["PSNR least"] < metrics["PSNR, dB"] < 100
    assert metrics["FD-EffNetLite0"] > 0


def test_the_worst_image_is_shown_beneath_the_unpatched_one(images):
    result = json.loads((images / "quality.json").read_text())
    sheet = Image.open(images / result["worst"])
    (psnrs,) = (row["psnr"] for row in result["rows"] if row["psnr"])
    head, side = 26, 192
    for row, method in enumerate(("unpatched", "agentsd-balanced-r=0.4")):
        shown = sheet.crop((8, head + row * (head + side), 8 + side, (row + 1) * (head + side)))
        made = [Image.open(path).resize(shown.size) for path in sorted((images / method).glob("*.png"))]
        far = [np.abs(np.asarray(shown, dtype=float) - np.asarray(image)).mean() for image in made]
        assert np.argmin(far) == np.argmin(psnrs)


def test_resumed_equals_uninterrupted(images, tmp_path):
    """Killed after one image, in the middle of the next: the rest is made, nothing twice."""
    method = tmp_path / "agentsd-balanced-r=0.4"
    method.mkdir()
    (method / "00000.png").write_bytes((images / "agentsd-balanced-r=0.4" / "00000.png").read_bytes())
    (method / "00001.part").write_bytes(b"torn")
    made = (method / "00000.png").stat().st_mtime_ns
    out = tmp_path / "q.json"
    assert run("quality.py", *FEW, "--extractor", "none", "--folder", tmp_path, "--out", out).returncode == 0
    assert files(tmp_path) == files(images)
    assert (method / "00000.png").stat().st_mtime_ns == made
    assert not any("FD-" in key for row in json.loads(out.read_text())["rows"] for key in row["metrics"])


@pytest.mark.long  # the command line's test of two processes kills one, too
def test_two_processes_make_the_images_of_one(images, tmp_path):
    out = ["--extractor", "none", "--folder", tmp_path, "--out", tmp_path / "q.json"]
    script = [BENCHMARKS / "quality.py", *FEW, *out]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *map(str, script)]
    # `accelerate launch` does the same on GPUs; as many threads as one process has, for sums in the same order
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    assert files(tmp_path) == files(images)
    assert json.loads((tmp_path / "q.json").read_text())["settings"]["processes"] == 2


@pytest.mark.parametrize("other", [["--steps", "3"], ["--images", "3"], ["--guidance", "2"], ["--scheduler", "euler"]])
def test_images_of_other_settings_are_not_taken_for_this_run_s(images, other):
    result = run("quality.py", *FEW, "--folder", images, "--out", images / "q.json", *other)
    assert result.returncode == 2 and "give" in result.stderr.splitlines()[-1]


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


@pytest.fixture
def few_groups(monkeypatch) -> int:
    """Each takes a root of a matrix of 1280 x 1280."""
    monkeypatch.setattr("metrics.GROUPS", 4)
    return 4


def test_against_real_images_a_distance_says_how_sure_it_is(noisy, tmp_path, few_groups):
    """Images of three methods, each noisier than the one before: so many errors above what is unpatched."""
    from methods import METHODS  # noqa: PLC0415
    from quality import Study, measure  # noqa: PLC0415
    from tables import quality_rows  # noqa: PLC0415

    study = Study(folder=tmp_path, images=32, real=noisy[0])
    methods = {name: METHODS[name] for name in ("unpatched", PAPER, MERGING)}
    for name, source in zip(methods, noisy, strict=True):
        study.folder_of(name).symlink_to(source)
    result = measure(study, methods, [""] * 32)
    _, *rows = (row["metrics"] for row in result["rows"])
    above, error = (f"FD-EffNetLite0 above unpatched{what}" for what in ("", ", standard error"))
    assert rows[0][above] < rows[1][above]
    assert all(0 < row[error] < row[above] for row in rows)
    heading, *shown = quality_rows(result)
    assert above in heading and error not in heading
    assert ["±" in row[heading.index(above)] for row in shown] == [False, True, True]


def test_a_set_is_at_distance_0_from_itself_and_noise_drives_it_away(noisy):
    from metrics import EXTRACTOR, distances  # noqa: PLC0415

    same, little, much = (distances(folder, noisy[0], EXTRACTOR)["FD-EffNetLite0"] for folder in noisy)
    assert abs(same) < 1e-3 < little < much


def test_the_jackknife_s_error_of_a_mean_is_that_of_its_groups_means():
    from metrics import GROUPS, standard_error  # noqa: PLC0415

    values = np.random.default_rng(0).normal(size=(GROUPS, 7))
    without = np.array([np.delete(values, group, axis=0).mean() for group in range(GROUPS)])
    assert np.isclose(standard_error(without), values.mean(1).std(ddof=1) / np.sqrt(GROUPS))


def test_every_image_is_left_out_once(noisy, few_groups):
    from metrics import EXTRACTOR, distances, without_each_group  # noqa: PLC0415

    found = without_each_group(noisy[1], noisy[0], EXTRACTOR)
    assert found.shape == (few_groups,) and len(set(found)) == few_groups
    assert np.isclose(found.mean(), distances(noisy[1], noisy[0], EXTRACTOR)["FD-EffNetLite0"], rtol=0.2)


def test_a_mean_hides_the_worst_image_and_what_is_pooled_does_not():
    from metrics import of_psnrs  # noqa: PLC0415

    found = of_psnrs(np.array([40.0] * 99 + [10.0]))
    assert found["PSNR median"] == found["PSNR p5"] == 40
    assert found["PSNR least"] == 10 < found["PSNR p1"] < 40
    assert found["PSNR pooled"] == pytest.approx(-10 * np.log10((99 * 1e-4 + 0.1) / 100))
    assert found["PSNR, dB"] == pytest.approx(39.7)


def test_fidelity_is_that_of_torchmetrics_image_by_image(noisy):
    from metrics import MOST_DB, against_unpatched, pixels  # noqa: PLC0415
    from torchmetrics.functional.image import (  # noqa: PLC0415
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    found, psnrs = against_unpatched(noisy[1], noisy[0])
    pairs = [[pixels(folder / f"{i:05d}.png")[None] for folder in noisy[1::-1]] for i in range(32)]
    assert psnrs == pytest.approx([peak_signal_noise_ratio(a, b, data_range=1.0).item() for a, b in pairs], abs=0.01)
    ssims = [structural_similarity_index_measure(a, b, data_range=1.0).item() for a, b in pairs]
    assert found["SSIM"] == pytest.approx(np.mean(ssims), abs=1e-5)
    assert against_unpatched(noisy[0], noisy[0])[0]["PSNR least"] == MOST_DB
