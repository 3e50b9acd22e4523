"""Every example runs as it stands, with the demo model and few steps, and so does the notebook."""

import re

import pytest
import torch
from conftest import ROOT, sweep
from PIL import Image

EXAMPLES = ROOT / "examples"
PROMPT_FILE = EXAMPLES / "prompt_file.py"
SCRIPTS = ["text_to_image", "img2img", "inpaint", "controlnet", "lora", "with_deepcache", "sdxl"]
SLOW = ["compiled"]  # by the C++ compiler
NEEDS = {"lora": "peft", "with_deepcache": "DeepCache", "app": "gradio"}
OTHERS = {"quickstart", "prompt_file", "app", "common"}  # which have tests of their own, or none to run


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SCRIPTS, *SLOW, *OTHERS}


@pytest.mark.parametrize("script", sweep(SCRIPTS, SLOW))
def test_example(run_script, script, tmp_path):
    if script in NEEDS:
        pytest.importorskip(NEEDS[script])
    assert run_script(EXAMPLES / f"{script}.py", "--steps", 4, "--out", tmp_path / "out.png").returncode == 0
    torch.compiler.reset()
    low, high = zip(*Image.open(tmp_path / "out.png").convert("RGB").getextrema(), strict=True)
    assert max(high) > min(low)  # more than one colour


def test_a_prompt_file_is_resumed(run_script, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple on a blue background\n\nhouse on an orange background\n")
    arguments = ["--steps", 2, "--batch", 1, "--prompts", prompts, "--out", tmp_path / "images"]
    first = run_script(PROMPT_FILE, *arguments)
    assert first.returncode == 0
    pictures = sorted((tmp_path / "images").glob("*.png"))
    contents = [picture.read_bytes() for picture in pictures]
    assert len(contents) == 2
    pictures[1].unlink()
    second = run_script(PROMPT_FILE, *arguments)
    assert "2 prompts, 1 of them done" in second.stdout
    assert [picture.read_bytes() for picture in pictures] == contents
    other = run_script(PROMPT_FILE, *arguments, "--ratio", 0.2)
    assert other.returncode == 2 and "images of other" in other.stderr.splitlines()[-1]


def test_a_prompt_file_that_is_not_there(run_script):
    result = run_script(PROMPT_FILE, "--prompts", "no.txt")
    assert result.returncode == 2 and "no.txt" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("steps", sweep([2], [None]), ids=["two steps an image", "as it stands"])
def test_notebook(steps):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / "agentsd_colab.ipynb", as_version=4)
    assert any(cell.get("outputs") for cell in notebook.cells)  # stored from a real run
    for cell in notebook.cells if steps else []:
        cell.source = re.sub(r"\bsteps=\d+( if gpu else \d+)?", f"steps={steps}", cell.source)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
