"""The page of `agentsd app`: what its buttons do, several tabs at once, and the page in a real browser."""

import socket
import subprocess
import sys
import threading
import time
import urllib.request
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageChops

import agentsd
from agentsd.cli import main
from agentsd.cli.shared import Cancelled, SharedPipeline
from agentsd.trials import Trial

DEMO = ROOT / "examples" / "demo_model"
GIVEN = {"prompt": "cat on a pink background", "steps": 2, "guidance": 4.0, "seed": 1}
PATCH = {"schedule": "paper's schedule", "ratio": 0.4, "agent_steps": 0.4}
CALLS = 8  # of the UNet for a comparison in two steps, which are also drawn to warm up
WAIT = 300  # seconds: beside other tests everything takes a while


def test_without_gradio_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", "--model", "nothing-here"]) == 2
    assert capsys.readouterr().err == 'agentsd: app: it needs Gradio, which is an extra: pip install "agentsd[app]"\n'


def test_what_waits_for_the_pipeline_can_be_cancelled():
    shared, began, ended = SharedPipeline(SimpleNamespace(unet=torch.nn.Identity())), [], []

    def job():
        try:
            with shared.turn("other tab", lambda: None):
                began.append(True)
        except Cancelled:
            ended.append(True)

    with shared.turn("tab", lambda: None) as (_, arguments):
        thread = threading.Thread(target=job)
        thread.start()
        wait_until(lambda: len(shared._jobs) == 2)
        shared.cancel("other tab")
        assert arguments["callback_on_step_end"](None, 0, 0, {"latents": 1}) == {"latents": 1}  # it is not of this one
    thread.join(WAIT)
    assert ended and not began and not shared._jobs


gr = pytest.importorskip("gradio")
from gradio_client import Client  # noqa: E402

from agentsd.cli.page import Actions, page  # noqa: E402


def wait_until(true) -> None:
    for _ in range(100 * WAIT):
        if true():
            return
        time.sleep(0.01)
    pytest.fail(f"it does not come in {WAIT} seconds")


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionPipeline.from_pretrained(DEMO).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def actions(pipe):
    return Actions(pipe, {}, seconds=1)


def compared(actions, progress=lambda *_, **__: None, tuned=None, **given):
    tab = SimpleNamespace(session_hash="tab")
    return actions.compare(**GIVEN | PATCH | given, tuned=tuned, request=tab, progress=progress)


@pytest.mark.parametrize("schedule", ["paper's schedule", *agentsd.PRESETS])
def test_compare(actions, pipe, schedule):
    done = []
    progress = lambda part, **_: done.append(part)
    (plain, patched), unlike, rows, code, report = compared(actions, progress, schedule=schedule)
    assert plain.size == patched.size == (128, 128)
    assert [row[0] for row in rows] == ["unpatched", "agentsd"]
    assert done == [(i + 1, CALLS) for i in range(CALLS)]
    assert "transformer blocks patched" in report
    assert not agentsd.report(pipe).patched
    assert (unlike.getbbox() is None) == (ImageChops.difference(plain, patched).getbbox() is None)
    assert equal(drawn_by(code, pipe), patched)  # what is to be copied draws the same image


def drawn_by(code: str, pipe) -> Image.Image:
    names = {"pipe": pipe}
    exec(code, names)
    agentsd.remove_patch(pipe)
    return names["image"]


def equal(a: Image.Image, b: Image.Image) -> bool:
    return ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getbbox() is None


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"prompt": " "}, "prompt"),
        ({"seed": None}, "Seed"),
        ({"seed": -1}, "Seed"),
        ({"ratio": 0.8}, "ratio=0.8"),
        ({"schedule": "tuned"}, "tune first"),
        ({"steps": 2000}, "2000"),
    ],
)
def test_wrong_input_is_a_message(actions, pipe, wrong, message):
    with pytest.raises(gr.Error, match=message):
        compared(actions, **wrong)
    assert not agentsd.report(pipe).patched


@pytest.fixture(scope="module")
def served(pipe):
    """The page's address; its images are small."""
    small = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 64, "width": 64}
    blocks = page(pipe, GIVEN["prompt"], 0, small, seconds=1)
    url = blocks.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", share=False)[1]
    yield url
    blocks.close()


@pytest.fixture
def tab(served, tmp_path):
    return lambda: Client(served, verbose=False, download_files=tmp_path)


def images_of(result) -> list[bytes]:
    return [Image.open(path).convert("RGB").tobytes() for path in result[0]]


@pytest.fixture
def calls(pipe):
    """The thread of each UNet call so far; ``wait_in`` holds up the call of that number until it is released."""
    seen = SimpleNamespace(threads=[], wait_in=0, go_on=threading.Event())

    def before(*_):
        seen.threads.append(threading.get_ident())
        if len(seen.threads) == seen.wait_in:
            assert seen.go_on.wait(WAIT)

    handle = pipe.unet.register_forward_pre_hook(before)
    yield seen
    seen.go_on.set()
    handle.remove()


def test_two_tabs_at_once_have_what_each_has_alone(tab, calls):
    asked = [GIVEN | PATCH, GIVEN | PATCH | {"seed": 2, "agent_steps": 0.0}]
    tabs = [tab(), tab()]
    alone = [images_of(one.predict(**given, api_name="/compare")) for one, given in zip(tabs, asked, strict=True)]
    assert len({image for images in alone for image in images}) == 4
    calls.threads.clear()
    jobs = [one.submit(**given, api_name="/compare") for one, given in zip(tabs, asked, strict=True)]
    assert [images_of(job.result(WAIT)) for job in jobs] == alone
    assert len(calls.threads) == 2 * CALLS and len(list(groupby(calls.threads))) <= 2  # one after the other


@pytest.mark.parametrize("call", [1, 3, CALLS - 1], ids=["patched, to warm up", "unpatched", "patched"])
def test_a_cancelled_image_ends_with_its_step(tab, calls, pipe, call):
    one = tab()
    before = images_of(one.predict(**GIVEN, **PATCH, api_name="/compare"))
    calls.threads.clear()
    calls.wait_in = call
    job = one.submit(**GIVEN, **PATCH, api_name="/compare")
    wait_until(lambda: len(calls.threads) == call)
    assert bool(agentsd.report(pipe).patched) == (call != 3)
    tab().predict(api_name="/cancel")  # of another tab: not this image
    one.predict(api_name="/cancel")
    calls.go_on.set()
    with pytest.raises(Exception, match="Cancelled"):
        job.result(WAIT)
    assert len(calls.threads) == call
    assert not agentsd.report(pipe).patched
    assert images_of(one.predict(**GIVEN, **PATCH, api_name="/compare")) == before


def test_a_cancelled_job_in_the_queue_does_not_run(tab, calls):
    first, second = tab(), tab()
    calls.wait_in = 1
    running = first.submit(**GIVEN, **PATCH, api_name="/compare")
    wait_until(lambda: calls.threads)
    waiting = second.submit(**GIVEN, **PATCH, api_name="/compare")
    wait_until(lambda: waiting.status().code.name == "IN_QUEUE")
    waiting.cancel()
    calls.go_on.set()
    images = images_of(running.result(WAIT))
    assert images_of(second.predict(**GIVEN, **PATCH, api_name="/compare")) == images
    assert len(calls.threads) == 2 * CALLS


def test_what_gradio_gives_up_keeps_the_pipeline_until_it_has_ended(tab, calls):
    """Its `cancels` leaves a thread running, and begins the next job."""
    first, second = tab(), tab()
    calls.wait_in = 3
    given_up = first.submit(**GIVEN, **PATCH, api_name="/compare")
    wait_until(lambda: len(calls.threads) == 3)
    given_up.cancel()
    following = second.submit(**GIVEN, **PATCH, api_name="/compare")
    wait_until(lambda: following.status().code.name in ("STARTING", "PROCESSING", "PROGRESS"))
    time.sleep(0.5)  # in which it would draw
    assert len(calls.threads) == 3
    first.predict(api_name="/cancel")
    calls.go_on.set()
    images = images_of(following.result(WAIT))
    assert len(calls.threads) == 3 + CALLS
    assert images_of(second.predict(**GIVEN, **PATCH, api_name="/compare")) == images


@pytest.mark.parametrize("settings", [{"preset": "fast", "ratio": 0.3}, None], ids=["found", "nothing gains"])
def test_what_tune_finds_can_be_chosen_in_that_tab(tab, monkeypatch, pipe, settings):
    """Which settings these are is tested elsewhere, and hangs on the machine."""
    given = {}
    trial = Trial("unpatched", None, 2.0, 1.0, float("inf"), float("inf"))
    tuning = agentsd.Tuning(settings, "this is why", 1, (trial,), (), ())
    monkeypatch.setattr(agentsd, "tune", lambda pipe, target, **how: given.update(how, target=target) or tuning)
    one = tab()
    code, schedule, tried = one.predict(**GIVEN, target=" 2x ", api_name="/tune")
    assert (given["target"], set(given["prompts"])) == ("2x", {GIVEN["prompt"]})
    assert (given["num_inference_steps"], given["guidance_scale"], given["seed"]) == (2, 4.0, 1)
    assert "this is why" in str(tried)
    chosen = GIVEN | PATCH | {"schedule": "tuned", "api_name": "/compare"}
    if settings is not None:
        assert "tuned" in str(schedule) and "preset='fast', ratio=0.3" in code
        result = one.predict(**chosen)
        assert equal(drawn_by(result[3], pipe), Image.open(result[0][1]))
        one = tab()  # another tab has no tuned settings
    with pytest.raises(Exception, match="tuned"):
        one.predict(**chosen)


def test_tuning_can_be_cancelled(tab, calls, pipe):
    one = tab()
    before = images_of(one.predict(**GIVEN, **PATCH, api_name="/compare"))
    calls.threads.clear()
    calls.wait_in = 12  # of a candidate
    job = one.submit(**GIVEN, target="", api_name="/tune")
    wait_until(lambda: len(calls.threads) == 12)
    assert agentsd.report(pipe).settings is not None
    one.predict(api_name="/cancel")
    calls.go_on.set()
    with pytest.raises(Exception, match="Cancelled"):
        job.result(WAIT)
    assert len(calls.threads) == 12
    assert agentsd.report(pipe).settings is None
    assert images_of(one.predict(**GIVEN, **PATCH, api_name="/compare")) == before


def test_a_wrong_target_is_a_message(tab):
    with pytest.raises(Exception, match="expected a speed-up"):
        tab().predict(**GIVEN, target="fast", api_name="/tune")


def test_a_port_that_is_taken_is_one_line(served, capsys):
    assert main(["app", "--device", "cpu", "--port", served.strip("/").rsplit(":", 1)[1]]) == 2
    assert "port" in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "agentsd", "app", "--port", str(port), "--steps", "3"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
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


def test_cancelling_is_said_in_the_page(served, browser_page, calls):
    browser_page.goto(served)
    calls.wait_in = 1
    browser_page.get_by_role("button", name="Compare").click()
    wait_until(lambda: calls.threads)
    browser_page.get_by_role("button", name="Cancel").click()
    browser_page.get_by_text("Cancelled.").wait_for(timeout=60_000)
    calls.go_on.set()


def test_closing_a_tab_ends_its_image(served, browser_page, calls, monkeypatch):
    cancel, cancelled = SharedPipeline.cancel, []
    monkeypatch.setattr(SharedPipeline, "cancel", lambda *given: cancelled.append(cancel(*given)))
    browser_page.goto(served)
    calls.wait_in = 3
    browser_page.get_by_role("button", name="Compare").click()
    wait_until(lambda: len(calls.threads) == 3)
    browser_page.close()
    wait_until(lambda: any(cancelled))  # tabs of other tests may be closed in the meantime
    calls.go_on.set()
    images_of(Client(served, verbose=False).predict(**GIVEN, **PATCH, api_name="/compare"))  # waits for its end
    assert len(calls.threads) == 3 + CALLS


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
