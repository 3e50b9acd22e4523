"""The demo model of the Stable Diffusion 3 kind: it is small, and its card's snippet draws what it was asked for."""

import json
import re

import pytest
import torch
from conftest import ROOT

import agentsd

FOLDER = ROOT / "examples" / "demo_model_sd3"


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def drawn():
    """What the card's snippet leaves behind, in two steps."""
    snippet = snippets()[0]
    assert snippet.count("num_inference_steps=25") == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        names: dict = {}
        exec(snippet.replace("num_inference_steps=25", "num_inference_steps=2"), names)
    return names


def test_it_is_small_and_holds_no_pickles():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt")]


def test_the_card_s_snippet_draws_on_the_background_that_it_names(drawn):
    image = drawn["image"]
    assert image.size == (128, 128)
    red, _, blue = image.getpixel((120, 8))
    assert blue > red + 20


def test_its_words_are_those_of_the_demo_model(drawn):
    words = json.loads((ROOT / "examples" / "demo_model" / "tokenizer" / "vocab.json").read_text())
    assert drawn["pipe"].tokenizer.get_vocab() == drawn["pipe"].tokenizer_2.get_vocab() == words


def test_its_second_snippet_patches_it(drawn):
    pipe, (_, snippet) = drawn["pipe"], snippets()
    draw = lambda: pipe(
        "cat on a pink background", num_inference_steps=4, max_sequence_length=0, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    plain = draw()
    exec(snippet, drawn)
    assert agentsd.report(pipe).settings.cache_interval == agentsd.PRESETS["balanced"]["cache_interval"]
    patched = draw()
    assert agentsd.report(pipe).last == {"full": 3, "cached": 1}
    assert 0 < (patched - plain).abs().mean() < 0.02
    agentsd.remove_patch(pipe)
    assert torch.equal(draw(), plain)
