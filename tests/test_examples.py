"""Every example runs as it stands, with the demo model and few steps, and so does the notebook."""

import re

import pytest
import torch
from conftest import ROOT, sweep
from PIL import Image

EXAMPLES = ROOT / "examples"
SCRIPTS = ["text_to_image", "img2img", "inpaint", "controlnet", "lora", "with_deepcache", "sdxl"]
SLOW = ["compiled"]  # by the C++ compiler
NEEDS = {"lora": "peft", "with_deepcache": "DeepCache"}
OTHERS = {"quickstart", "common"}  # which have tests of their own, or none to run


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


@pytest.mark.parametrize("steps", sweep([2], [None]), ids=["two steps an image", "as it stands"])
def test_notebook(steps):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / "agentsd_colab.ipynb", as_version=4)
    assert any(cell.get("outputs") for cell in notebook.cells)  # stored from a real run
    for cell in notebook.cells if steps else []:
        cell.source = re.sub(r"\bsteps=\d+( if gpu else \d+)?", f"steps={steps}", cell.source)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
