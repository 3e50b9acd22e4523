"""Every example runs as it stands, with the demo model and few steps, and so does the notebook."""

import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

EXAMPLES = ROOT / "examples"
SCRIPTS = ["text_to_image", "img2img", "inpaint", "controlnet", "lora", "with_deepcache", "compiled", "sdxl"]
NEEDS = {"lora": "peft", "with_deepcache": "DeepCache", "app": "gradio"}
OTHERS = {"quickstart", "prompt_file", "app", "common"}  # which have tests of their own, or none to run


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / f"{script}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SCRIPTS, *OTHERS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_example(script, tmp_path):
    if script in NEEDS:
        pytest.importorskip(NEEDS[script])
    result = run(script, "--steps", 4, "--out", tmp_path / "out.png")
    assert result.returncode == 0, result.stderr
    low, high = zip(*Image.open(tmp_path / "out.png").convert("RGB").getextrema(), strict=True)
    assert max(high) > min(low)  # more than one colour


def test_a_prompt_file_is_resumed(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple on a blue background\n\nhouse on an orange background\n")
    arguments = ["--steps", 2, "--batch", 1, "--prompts", prompts, "--out", tmp_path / "images"]
    first = run("prompt_file", *arguments)
    assert first.returncode == 0, first.stderr
    pictures = sorted((tmp_path / "images").glob("*.png"))
    contents = [picture.read_bytes() for picture in pictures]
    assert len(contents) == 2
    pictures[1].unlink()
    second = run("prompt_file", *arguments)
    assert "2 prompts, 1 of them done" in second.stdout
    assert [picture.read_bytes() for picture in pictures] == contents
    other = run("prompt_file", *arguments, "--ratio", 0.2)
    assert other.returncode == 2 and "images of other" in other.stderr.splitlines()[-1]


def test_a_prompt_file_that_is_not_there():
    result = run("prompt_file", "--prompts", "no.txt")
    assert result.returncode == 2 and "no.txt" in result.stderr.splitlines()[-1]


def test_notebook():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / "agentsd_colab.ipynb", as_version=4)
    assert any(cell.get("outputs") for cell in notebook.cells)  # stored from a real run
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
