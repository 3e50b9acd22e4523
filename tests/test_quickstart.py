"""The README's first command, with fewer steps, and the demo model it uses."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageChops
from safetensors.torch import load_file

import agentsd

DEMO_MODEL = ROOT / "examples" / "demo_model"
EXAMPLES = ROOT / "examples"


def test_quickstart(tmp_path):
    picture = tmp_path / "out.png"
    prompts = ["red apple on a blue background", "cat on a pink background"]
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--no-real-size", "--steps", "3", "--prompt", *prompts]
    result = subprocess.run([*command, "--out", str(picture)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for words in ("2 images of 128x128, 3 steps", "speed-up", "PSNR to unpatched", "transformer blocks patched"):
        assert words in result.stdout
    sheet = Image.open(picture).convert("RGB")
    left, right = (sheet.crop((8 + i * 200, 0, 200 + i * 200, sheet.height)) for i in range(2))
    assert ImageChops.difference(left, right).getbbox() is not None  # two prompts, two columns
    top, bottom = (sheet.crop((0, row * 218 + 26, sheet.width, row * 218 + 218)) for row in range(2))
    assert ImageChops.difference(top, bottom).getbbox() is not None  # the patch changes something


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--set", "ratio=0.9"], "ratio=0.9 is not allowed"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--out", "no/such/folder/out.png"], "no/such/folder"),
        (["--steps", "0"], "--steps"),
    ],
)
def test_wrong_arguments_are_said_in_one_line(run_script, arguments, message):
    result = run_script(EXAMPLES / "quickstart.py", "--no-real-size", *arguments)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_quickstart_takes_the_demo_model_with_a_transformer(run_script, tmp_path):
    model, picture = EXAMPLES / "demo_model_sd3", tmp_path / "out.png"
    arguments = ("--model", model, "--steps", 3, "--prompt", "cat on a pink background", "--out", picture)
    result = run_script(EXAMPLES / "quickstart.py", *arguments)
    assert result.returncode == 0, result.stderr
    for words in ("1 images of 128x128, 3 steps", "1 of 6 transformer blocks patched", "of the denoiser"):
        assert words in result.stdout
    assert picture.exists()


@pytest.fixture(scope="module")
def demo() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(DEMO_MODEL).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_demo_model_is_a_small_stable_diffusion(demo):
    assert sum(f.stat().st_size for f in DEMO_MODEL.rglob("*")) <= 25e6
    assert not [f for f in DEMO_MODEL.rglob("*") if f.suffix in (".bin", ".pt", ".ckpt")]
    scheduler = demo.scheduler.config
    assert (scheduler.prediction_type, scheduler.beta_schedule) == ("epsilon", "scaled_linear")
    layers = agentsd.report(agentsd.apply_patch(demo)).patched
    agentsd.remove_patch(demo)
    assert len(layers) == 3
    assert all(layer.phases["merge"].tokens >= 1024 and layer.phases["agent"].agents for layer in layers)


def test_the_demo_model_has_the_same_words_for_older_transformers(demo):
    """Transformers 5 reads `tokenizer.json`, transformers 4 `vocab.json`, `merges.txt` and prefixed weights."""
    folder = DEMO_MODEL / "tokenizer"
    merges = folder.joinpath("merges.txt").read_text().splitlines()[1:]
    model = json.loads(folder.joinpath("tokenizer.json").read_text())["model"]
    assert json.loads(folder.joinpath("vocab.json").read_text()) == model["vocab"] == demo.tokenizer.get_vocab()
    assert [line.split() for line in merges] == [list(pair) for pair in model["merges"]]
    weights = load_file(DEMO_MODEL / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in weights)


def test_guidance_steers_the_demo_model(demo):
    """The same seed under two captions: what the captions say of the background is what differs."""
    colours = {}
    for background in ("pink", "blue"):
        generator = torch.Generator().manual_seed(0)
        caption = f"red apple on a {background} background"
        image = demo(caption, num_inference_steps=12, guidance_scale=5.0, generator=generator).images[0]
        colours[background] = [image.getpixel((x, y)) for x in (8, 120) for y in (8, 120)]
    for pink, blue in zip(colours["pink"], colours["blue"], strict=True):
        assert pink[0] > blue[0] + 40  # red
        assert blue[2] > pink[2] + 10  # blue


def test_the_preset_is_timed_by_its_own_calls(monkeypatch, capsys):
    """A call that is booked as cached is one: of a round's calls the last alone leaves the middle out."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import quickstart  # noqa: PLC0415

    def small(device: str) -> UNet2DConditionModel:
        blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
        sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2}
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, **blocks, **sizes).eval()
        unet.register_forward_pre_hook(lambda *_: calls.append(False))
        unet.mid_block.resnets[0].register_forward_pre_hook(lambda *_: calls.__setitem__(-1, True))
        return unet

    calls: list[bool] = []
    monkeypatch.setattr(quickstart, "real_size_unet", small)
    quickstart.time_real_size("cpu", seconds=0.0)
    rounds = "".join("full " if full else "cached\n" for full in calls).splitlines()
    assert rounds == ["full full full cached"] * len(rounds)  # the first is unpatched
    assert 'preset="balanced"' in capsys.readouterr().out


def test_things_have_short_names():
    lines = (EXAMPLES / "train_demo_model" / "things.txt").read_text().splitlines()
    names = [line.split(" ", 1)[1] for line in lines if not line.startswith("#")]
    assert 100 <= len(names) <= 150
    assert len(set(names)) == len(names)
    assert max(len(name.split()) for name in names) <= 3


def test_the_model_card_gives_the_evaluation():
    card = (DEMO_MODEL / "README.md").read_text()
    evaluation = json.loads((DEMO_MODEL / "evaluation.json").read_text())
    for part in ("trained scenes", "unseen combinations"):
        figures = [f"{evaluation[part][method]:.0%}" for method in ("real images", "unpatched", "agentsd")]
        assert f"| {part} | {' | '.join(figures)} |" in card
