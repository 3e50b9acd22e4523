"""The examples run: scenes say what they show, training resumes, its models are used, the benchmark counts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision.utils import save_image

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples/vision"
sys.path.insert(0, str(EXAMPLES))

from emoji_scenes import CLASSES, Scenes  # noqa: E402
from tasks import TASKS, Classify, normalised  # noqa: E402
from trained import load  # noqa: E402


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs and squares in the place of the npm package."""
    folder = tmp_path_factory.mktemp("emoji")
    (folder / "img/google/64").mkdir(parents=True)
    entries = []
    rows, columns = torch.meshgrid(*[torch.linspace(-1, 1, 64)] * 2, indexing="ij")
    for index in range(42):
        shape = (rows**2 + columns**2 < 0.8) if index % 2 else torch.ones(64, 64)
        colour = torch.rand(3, 1, 1, generator=torch.Generator().manual_seed(index)).expand(3, 64, 64)
        category = list(CLASSES.values())[index % len(CLASSES)]
        entries.append({"image": f"{index}.png", "category": category, "unified": str(index), "has_img_google": True})
        rgba = torch.cat([colour, shape[None].float()])
        from torchvision.transforms.functional import to_pil_image  # noqa: PLC0415

        to_pil_image(rgba, "RGBA").save(folder / "img/google/64" / f"{index}.png")
    (folder / "emoji.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def run(run_script: Callable) -> Callable[..., str]:
    """What a script prints."""

    def output(script: Path, *arguments: object) -> str:
        done = run_script(script, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return output


def test_scenes_say_what_they_show(emoji: Path) -> None:
    training, held_out = (Scenes(emoji, held_out=h, things=3, size=64) for h in (False, True))
    assert len(training.emoji) + len(held_out.emoji) == 42 and len(held_out.emoji) > 0
    batch = training.draw(16)
    boxes, segmentation = batch.boxes(), batch.segmentation()
    for scene, thing in (batch.labels >= 0).nonzero().tolist():
        left, top, right, bottom = boxes[scene, thing].int().tolist()
        mask = batch.masks[scene, thing]
        assert mask[top:bottom, left:right].sum() == mask.sum() > 0
        assert (segmentation[scene][mask] == batch.labels[scene, thing] + 1).all()
    assert (batch.masks.sum(1) <= 1).all(), "two things at one pixel"
    assert torch.equal(Scenes(emoji, held_out=False, things=3, size=64).draw(16).images, batch.images)


def test_twins_are_of_one_size() -> None:
    for task in TASKS.values():
        agent, softmax = (sum(p.numel() for p in task.build(a).parameters()) for a in ("agent", "softmax"))
        assert softmax < agent < 1.06 * softmax


@pytest.mark.parametrize("task", TASKS)
def test_training_goes_on_and_its_model_is_used(
    task: str, emoji: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    output, scene, drawn = tmp_path / "run", tmp_path / "scene.png", tmp_path / "drawn.png"
    common = (task, "--emoji", emoji, "--output", output, "--batch", 2, "--evaluate-scenes", 2, "--evaluations", 2)
    run(EXAMPLES / "train.py", *common, "--steps", 2)
    run(EXAMPLES / "train.py", *common, "--steps", 3, "--resume")
    history = json.loads((output / "history.json").read_text())
    assert history["step"] == 3 and history["evaluations"][-1]["step"] == 3
    save_image(Scenes(emoji, held_out=True, things=2).draw(1).images[0], scene)
    weights = ("--weights", output / "model.safetensors")
    printed = run(EXAMPLES / f"{task}.py", scene, *weights, "--output", drawn)
    assert drawn.exists()
    if task == "classify":
        assert all(name in CLASSES for name in printed.split("wrote")[0].split()[1::2])
        with pytest.raises(AssertionError, match="not for 'detect'"):
            run(EXAMPLES / "detect.py", scene, *weights)
        table = run(EXAMPLES / "curves.py", output, "--output", tmp_path / "curves.png")
        assert "| 3 of 2 |" in table and (tmp_path / "curves.png").exists()


def test_the_classifier_recognises_what_it_was_never_shown() -> None:
    """The first five held-out emoji of each class, by their code points: a guess is right once in seven."""
    file = EXAMPLES / "emoji_classifier.safetensors"
    assert file.stat().st_size < 5e6
    model, size = load(file, "classify")
    scenes = Scenes(ROOT / "tests/vision/data/emoji", held_out=True, things=1, size=size, scales=Classify.scales)
    assert scenes.labels.bincount().tolist() == [5] * len(CLASSES)
    which = torch.arange(len(scenes.emoji)).repeat(4)[:, None]
    right = model(normalised(scenes.draw(len(which), which).images)).argmax(1) == scenes.labels[which[:, 0]]
    assert right.float().mean() > 0.4


def test_the_quick_start_needs_no_arguments(tmp_path: Path, run: Callable[..., str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(EXAMPLES / "classify.py").endswith("wrote classified.png\n")
    assert (tmp_path / "classified.png").exists()


def test_benchmark_on_a_folder_of_images(tmp_path: Path, run: Callable[..., str]) -> None:
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        save_image(torch.rand(3, 40, 30), tmp_path / "data" / label / "0.png")
    script = ROOT / "benchmarks/vision.py"
    out = run(script, "imagenet", "--data", tmp_path / "data", "--sizes", 64, "--workers", 0, "--device", "cpu")
    assert json.loads(out.splitlines()[-1])["images"] == 2
    out = run(
        script, "linear", "--lengths", 64, "--least", 0.01, "--device", "cpu", "--output", tmp_path / "rows.json"
    )
    assert [row["tokens"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == [64, 64]
