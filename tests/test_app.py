"""The comparison page: its button's function, and the page in a real browser."""

import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from conftest import ROOT
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageChops

import agentsd

gr = pytest.importorskip("gradio")
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))
PROMPT = "cat on a pink background"
GIVEN = {"prompt": PROMPT, "ratio": 0.4, "agent_steps": 0.4, "steps": 2, "guidance": 4.0, "seed": 1}


@pytest.fixture(scope="module")
def comparison():
    from app import Comparison  # noqa: PLC0415

    pipe = StableDiffusionPipeline.from_pretrained(EXAMPLES / "demo_model").to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return Comparison(pipe)


@pytest.mark.parametrize("schedule", ["paper's schedule", *agentsd.PRESETS])
def test_compare(comparison, schedule):
    steps = []
    progress = lambda done, desc: steps.append((desc, *done))
    (plain, patched), unlike, rows, code, report = comparison(**GIVEN, schedule=schedule, progress=progress)
    assert plain.size == patched.size == (128, 128)
    assert [row[0] for row in rows] == ["unpatched", "agentsd"]
    assert steps == [(name, i, 2) for name in ("unpatched", "agentsd") for i in (1, 2)]
    assert "transformer blocks patched" in report
    assert not agentsd.report(comparison.pipe).patched
    assert (unlike.getbbox() is None) == (ImageChops.difference(plain, patched).getbbox() is None)
    names = {"pipe": comparison.pipe}
    exec(code, names)  # what is to be copied draws the same image
    agentsd.remove_patch(comparison.pipe)
    assert ImageChops.difference(names["image"], patched).getbbox() is None


@pytest.mark.parametrize(
    "wrong, message",
    [({"prompt": " "}, "prompt"), ({"seed": None}, "Seed"), ({"seed": -1}, "Seed"), ({"ratio": 0.8}, "ratio=0.8")],
)
def test_wrong_input_is_a_message(comparison, wrong, message):
    with pytest.raises(gr.Error, match=message):
        comparison(**GIVEN | wrong, schedule="paper's schedule", progress=lambda *_, **__: None)
    assert not agentsd.report(comparison.pipe).patched


@pytest.fixture(scope="module")
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "app.py"), "--port", str(port), "--steps", "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for _ in range(600):  # five minutes: beside other tests it takes a while
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=10).close()
                break
            except OSError:
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.5)
        else:
            process.terminate()
            pytest.fail(f"the page does not come up: {process.stdout.read()}")
        yield f"http://127.0.0.1:{port}"
        process.terminate()


def test_a_click_makes_two_pictures(address, browser_page, tmp_path):
    page = browser_page
    page.goto(address)
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("1 of 7 transformer blocks patched").wait_for(timeout=120_000)
    pictures = page.get_by_test_id("imageslider-image").all()
    assert len({picture.get_attribute("src") for picture in pictures}) == 2
    page.screenshot(path=tmp_path / "app.png", full_page=True)
    assert len(Image.open(tmp_path / "app.png").convert("RGB").getcolors(1 << 20)) > 1000
    assert page.get_by_text("1.00x").count()


def test_wrong_input_is_said_in_the_page(address, browser_page):
    page = browser_page
    page.goto(address)
    page.get_by_label("Prompt").fill(" ")
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("Write what to draw into the prompt.").wait_for(timeout=60_000)
    assert not page.get_by_text("Traceback").count()


def test_what_belongs_to_the_papers_schedule_is_shown_with_it(address, browser_page):
    page = browser_page
    page.goto(address)
    ratio = page.get_by_text("Ratio: share of the tokens to merge")
    page.get_by_label("balanced").wait_for()
    assert not ratio.is_visible()
    page.get_by_label("paper's schedule").check()
    ratio.wait_for(timeout=60_000)


def test_it_listens_on_this_computer_alone(address):
    with socket.socket() as probe, pytest.raises(OSError):
        probe.bind(("127.0.0.1", int(address.rsplit(":", 1)[1])))  # taken there
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", int(address.rsplit(":", 1)[1])))  # and nowhere else
