"""The command line, with the demo model and few steps: what it draws, how it resumes, and what it says of errors."""

import json
import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageChops

import agentsd
from agentsd.cli import COMMANDS, compare, main, parser, pictures
from agentsd.cli.options import CommandError, writing
from agentsd.cli.pipelines import demo_model
from agentsd.trials import Trial

PROMPTS = [f"{thing} on a blue background" for thing in ("red apple", "frog", "house", "hamburger", "rainbow", "cat")]
SMALL = ["--steps", "3", "--device", "cpu"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # other threads, other last bits
GENERATE = ["-m", "agentsd", "generate", *SMALL]
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]


def run(*arguments: object) -> int:
    """In this process, as the shell does; errors of argparse exit by themselves."""
    try:
        return main(list(map(str, arguments)))
    except SystemExit as exit:
        return exit.code or 0


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS))
    return path


@pytest.fixture(scope="module")
def one_thread():
    """As `ENVIRONMENT` has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(prompts, one_thread, tmp_path_factory):
    """The files that one process makes in one go, by name."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert run("generate", *SMALL, "--batch", 2, "--prompts", prompts, "--out", out) == 0
    assert len(contents(out)) == len(PROMPTS)
    return contents(out)


def contents(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


def wait_for_an_image(out, process) -> None:
    for _ in range(30_000):  # five minutes: beside other tests it takes a while
        if list(out.glob("*.png")):
            return
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    process.kill()
    pytest.fail("no image in five minutes")


def test_each_image_says_how_it_was_made(undisturbed, prompts, tmp_path):
    (tmp_path / "00003.png").write_bytes(undisturbed["00003.png"])
    with Image.open(tmp_path / "00003.png") as picture:
        made = json.loads(picture.text[pictures.KEY])
    assert (made["prompt"], made["seed"], made["num_inference_steps"]) == (PROMPTS[3], 3, 3)
    assert made["patch"] == {"preset": "balanced", "seed": 0}
    assert made["versions"]["agentsd"] == agentsd.__version__


def test_a_killed_batch_goes_on_bit_for_bit(undisturbed, prompts, tmp_path, capsys):
    command = [sys.executable, *GENERATE, "--batch", "2", "--prompts", prompts, "--out", tmp_path]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for_an_image(tmp_path, process)
        process.kill()
    there = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    assert 0 < len(there) < len(PROMPTS)
    (tmp_path / "00005.part").write_bytes(b"half a picture")
    assert run("generate", *SMALL, "--json", "--batch", 2, "--prompts", prompts, "--out", tmp_path) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["already_there"], told["drawn"]) == (len(there), len(PROMPTS) - len(there))
    assert contents(tmp_path) == undisturbed
    assert all(path.stat().st_mtime_ns == time for path, time in there.items())  # none was drawn twice


def test_two_processes_divide_the_prompts_and_one_is_killed(undisturbed, prompts, tmp_path):
    psutil = pytest.importorskip("psutil")
    command = [sys.executable, *LAUNCH, *GENERATE, "--json", "--batch", "2", "--prompts", prompts, "--out", tmp_path]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for_an_image(tmp_path, process)
        psutil.Process(process.pid).children(recursive=True)[-1].kill()
        process.communicate()
        assert process.returncode != 0
    there = len(contents(tmp_path))
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    told = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert sorted(one["process"] for one in told) == [0, 1]
    assert sorted(path for one in told for path in one["images"]) == [str(tmp_path / f"{i:05d}.png") for i in range(6)]
    assert (sum(one["already_there"] for one in told), sum(one["drawn"] for one in told)) == (there, 6 - there)
    assert contents(tmp_path) == undisturbed


def test_prompts_of_any_alphabet_and_a_mark_before_them(tmp_path):
    """Some editors put a mark before the first letter, and some end lines as typewriters do."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_bytes("\ufeff林檎 苹果\r\ncafé\r\n".encode())
    arguments = ["generate", "--steps", 1, "--device", "cpu", "--preset", "none"]
    assert run(*arguments, "--prompts", prompts, "--seed", 2**63 - 1, "--out", out) == 0
    made = [json.loads(Image.open(path).text[pictures.KEY]) for path in sorted(out.glob("*.png"))]
    assert [(one["prompt"], one["seed"]) for one in made] == [("林檎 苹果", 2**63 - 1), ("café", 2**63)]


def test_an_interrupt_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("agentsd.cli.pipelines.load", interrupted)
    assert run("generate", *SMALL, "--prompt", "a", "--out", tmp_path) == 130
    assert capsys.readouterr().err == "agentsd: stopped\n"


def test_a_folder_holds_images_of_one_kind(tmp_path, capsys):
    """Other settings are an error; a second call with the same has nothing to do, and loads no model."""
    arguments = ["generate", *SMALL, "--prompt", PROMPTS[0], "--count", 2, "--out", tmp_path]
    assert run(*arguments, "--preset", "none") == 0
    first = contents(tmp_path)
    assert len(set(first.values())) == 2  # two seeds
    assert run(*arguments, "--preset", "none") == 0 and contents(tmp_path) == first
    assert "0 drawn, 2 were there" in capsys.readouterr().out
    assert run(*arguments, "--preset", "fast") == 2
    assert "have other patch; give another folder" in capsys.readouterr().err


def test_an_unpatched_image_is_that_of_diffusers(tmp_path):
    assert run("generate", *SMALL, "--prompt", PROMPTS[0], "--preset", "none", "--seed", 5, "--out", tmp_path) == 0
    pipe = StableDiffusionPipeline.from_pretrained(demo_model()).to(torch.float32)
    generator = torch.Generator().manual_seed(5)
    image = pipe(PROMPTS[0], num_inference_steps=3, guidance_scale=4.0, generator=generator).images[0]
    assert ImageChops.difference(Image.open(tmp_path / "00000.png"), image).getbbox() is None


def test_what_drew_nothing_leaves_a_folder_as_it_was(tmp_path, capsys):
    arguments = ["generate", "--device", "cpu", "--preset", "none", "--prompt", PROMPTS[0], "--out", tmp_path]
    assert run(*arguments, "--steps", 2000) == 2  # than the scheduler has
    assert "2000" in capsys.readouterr().err
    assert run(*arguments, "--steps", 1) == 0


def test_a_comparison_says_which_images_are_equal():
    black, gray, white = (Image.new("RGB", (8, 8), colour) for colour in ("black", "gray", "white"))
    said = lambda *patched: compare.Comparison([black] * len(patched), list(patched), 2.0, 1.0).line(5)
    assert said(black, black).endswith("speed-up 2.00x, 2 equal to unpatched")
    assert said(white, black, gray).endswith("PSNR to unpatched 3.0 dB (worst 0.0), 1 equal to unpatched")
    assert said(white).endswith("PSNR to unpatched 0.0 dB (worst 0.0)")


def test_compare(tmp_path, capsys):
    picture = tmp_path / "out.png"
    arguments = ["compare", *SMALL, "--steps", 8, "--prompt", *PROMPTS[:2], "--out", picture]
    assert run(*arguments) == 0
    assert "2 images of 128x128, 8 steps: unpatched" in capsys.readouterr().out
    assert run(*arguments, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["psnr"]) == 2 and told["speed_up"] > 0
    assert Image.open(picture).size == (8 + 2 * 200, 2 * 218 + 40)


def test_report(capsys):
    assert run("report", "--device", "cpu") == 0
    assert "1 of 7 transformer blocks patched, ratio 0, for 32x32 latents" in capsys.readouterr().out
    assert run("report", "--device", "cpu", "--preset", "paper", "--height", 256, "--width", 256, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["latent_size"] == [64, 64] and told["settings"]["agent_steps"] == 0.4


def test_settings_come_from_a_file(tmp_path, capsys):
    path = tmp_path / "mine.json"
    path.write_text('{"settings": {"ratio": 0, "cache_interval": 4, "cache_order": 1}}')
    assert run("report", "--device", "cpu", "--preset", path, "--set", "cache_cell=2", "use_rand=false", "--json") == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["cache_interval"], settings["cache_cell"], settings["use_rand"]) == (4, 2, False)


@pytest.mark.parametrize("settings", [{"preset": "fast", "ratio": 0.3}, None], ids=["found", "nothing gains"])
def test_what_tune_finds_is_a_preset(settings, tmp_path, monkeypatch, capsys):
    """Which settings these are is tested elsewhere, and hangs on the machine."""
    given = {}
    trial = Trial("unpatched", None, 2.0, 1.0, math.inf, math.inf)
    tuning = agentsd.Tuning(settings, "chosen", 1, (trial,), (), ())
    monkeypatch.setattr(agentsd, "tune", lambda pipe, target, **how: given.update(how, target=target) or tuning)
    path = tmp_path / "mine.json"
    assert run("tune", *SMALL, "--target", "2x", "--prompt", PROMPTS[0], "--out", path, "--json") == 0
    assert (given["target"], given["prompts"], given["num_inference_steps"]) == ("2x", PROMPTS[:1], 3)
    found = json.loads(capsys.readouterr().out)
    assert found["trials"][0]["worst"] is None and found["file"] == (str(path) if settings else None)
    assert path.exists() == (settings is not None)
    if settings:
        expected = agentsd.Settings.of("fast", {"ratio": 0.3, "min_tokens": 0})  # as the tests have it everywhere
        assert run("report", "--device", "cpu", "--preset", path, "--json") == 0
        assert json.loads(capsys.readouterr().out)["settings"] == asdict(expected)


def test_info(capsys):
    assert run("info") == 0
    assert "demo model: " in capsys.readouterr().out
    assert run("info", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["versions"]["agentsd"] == agentsd.__version__ and "cpu" in told["devices"]


def test_bench_hands_on(capfd):
    pytest.importorskip("rich", reason="the extra `bench` is not installed")
    assert run("bench", "latency", "--help") == 0
    assert "--no-profile" in capfd.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate"], "--prompt --prompts is required"),
        (["generate", "--prompt", "a", "--preset", "best"], "--preset best: expected one of quality, balanced"),
        (["generate", "--prompt", "a", "--preset", "no.json"], "no.json"),
        (["generate", "--prompt", "a", "--set", "ratio=0.9"], "ratio=0.9 is not allowed"),
        (["generate", "--prompt", "a", "--set", "ratoi=0.3"], "did you mean ratio?"),
        (["generate", "--prompt", "a", "--set", "ratio"], "expected NAME=VALUE"),
        (["generate", "--prompt", "a", "--steps", "0"], "'0' is not allowed"),
        (["generate", "--prompt", "a", "--seed", str(2**63)], f"expected a whole number, 0 to {2**63 - 1}"),
        (["generate", "--prompt", "a", "--guidance", "nan"], "'nan' is not allowed: expected a number"),
        (["generate", "--prompt", "a", "--out", __file__], "File exists"),
        (["generate", "--prompt", "a", "--out", "/proc/nowhere"], "/proc/nowhere"),
        (["generate", "--prompts", "no.txt"], "no.txt"),
        (["generate", "--prompts", os.devnull], "it has no prompt"),
        (["generate", "--prompts", __file__ + "/x"], "Not a directory"),
        (["generate", "--prompt", "a", "--model", "no/such/model"], "no/such/model"),
        (["compare", "--preset", "none"], "nothing to compare"),
        (["tune", "--target", "fast"], "expected a speed-up"),
        (["tune", "--target", "0.5x"], "expected a speed-up of 1 or more"),
        (["compare", "--out", "no/such/folder/out.png"], "no/such/folder"),
        (["report", "--device", "nothing"], "nothing"),
        (["nothing"], "invalid choice"),
    ],
)
def test_what_the_user_can_mend_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1] and not [line for line in said if "Traceback" in line]


def test_without_the_repository_it_says_where_the_demo_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("agentsd.cli.pipelines.REPOSITORY", tmp_path)
    monkeypatch.setattr("agentsd.cli.bench.FOLDER", tmp_path / "benchmarks")
    monkeypatch.chdir(tmp_path)
    for arguments in (["compare"], ["bench", "latency"]):
        assert run(*arguments) == 2
        assert "with the repository and not with the installed package" in capsys.readouterr().err
    assert run("info") == 0
    assert "not here: it comes with the repository" in capsys.readouterr().out


def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch, capsys):
    """Root may write everywhere, so that the system is only asked."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert run("compare", "--model", "nothing-here", "--out", tmp_path / "picture.png") == 2
    assert "permission denied" in capsys.readouterr().err
    monkeypatch.undo()
    with pytest.raises(CommandError, match="No such file"), writing(tmp_path / "nowhere" / "x.png"):
        (tmp_path / "nowhere" / "x.png").touch()


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_help_has_examples_that_parse(module, capsys):
    name = module.__name__.rpartition(".")[2]
    assert run(name, "--help") == 0
    examples = [line.split("agentsd ", 1)[1] for line in module.__doc__.splitlines() if line.startswith("    ")]
    assert len(examples) >= 2 and all(example in capsys.readouterr().out for example in examples[:1])
    for example in examples:
        parser().parse_args(shlex.split(example.partition(" | ")[0]))


def test_options_may_be_repeated(capsys):
    assert run("report", "--device", "cpu", "--set", "cache_interval=4", "--set", "cache_cell=3", "--json") == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["cache_interval"], settings["cache_cell"]) == (4, 3)


@pytest.mark.parametrize("out", ["picture", "picture.xyz", "nowhere/picture.png", "folder.png"])
def test_where_the_picture_goes_is_looked_at_before_anything_is_drawn(out, tmp_path, capsys):
    (tmp_path / "folder.png").mkdir()
    assert run("compare", "--model", "nothing-here", "--out", tmp_path / out) == 2
    assert "--out" in capsys.readouterr().err
