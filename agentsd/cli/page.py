"""The page of `agentsd app`, which needs Gradio: what its buttons do, and how it looks."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
from PIL import Image

import agentsd
from agentsd.cli import options, pictures
from agentsd.cli.compare import compare
from agentsd.cli.options import CommandError
from agentsd.cli.shared import Cancelled, SharedPipeline
from agentsd.tuning import WARM_UP

PAPER, TUNED = "paper's schedule", "tuned"
PRESETS = ["balanced", *(name for name in agentsd.PRESETS if name != "balanced")]
SCHEDULES = [*PRESETS, PAPER]
HEADINGS = ["", "time, s", "speed-up", "PSNR, dB"]
TUNED_IMAGES = 4
SNIPPET = """import agentsd
import torch

agentsd.apply_patch(pipe, {patch})
generator = torch.Generator().manual_seed({seed})
image = pipe(
    {prompt!r},
    {arguments},
    generator=generator,
).images[0]
"""

Settings = dict[str, Any]  # arguments of `agentsd.apply_patch`


class Actions:
    """What the buttons do. ``request`` names the browser tab, and ``progress`` is what is drawn over the results."""

    def __init__(self, pipe: Any, arguments: dict[str, Any], seconds: float) -> None:
        self.shared = SharedPipeline(pipe)
        self.arguments = arguments
        self.seconds = seconds

    def compare(
        self,
        prompt: str,
        steps: float,
        guidance: float,
        seed: float | None,
        schedule: str,
        ratio: float,
        agent_steps: float,
        tuned: Settings | None,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (how gradio finds it)
    ) -> tuple[tuple[Image.Image, Image.Image], Image.Image, list[list[str]], str, str]:
        """Both images, how they differ, the figures, the same as code, and the report as HTML."""
        arguments, seed = self.of_the_image(prompt, steps, guidance, seed)
        total = 2 * (int(steps) + min(WARM_UP, int(steps)))
        done = iter(range(1, total + 1))
        with said_in_the_page():
            patch = options.seeded(settings_of(schedule, ratio, agent_steps, tuned), seed)
            advance = lambda: progress((next(done), total), desc="without and with agentsd", unit="steps")
            with self.shared.turn(owner(request), advance) as (pipe, after_step):
                found = compare(pipe, [prompt], seed, {**arguments, **after_step}, patch)
                report = agentsd.report(pipe)._repr_html_()
        psnr = found.fidelities[0]
        rows = [
            ["unpatched", f"{found.plain_seconds:.2f}", "1.00x", ""],
            [
                "agentsd",
                f"{found.patched_seconds:.2f}",
                f"{found.speed_up:.2f}x",
                f"{psnr:.1f}" if math.isfinite(psnr) else "equal",
            ],
        ]
        images = found.plain[0], found.patched[0]
        return images, pictures.difference(*images), rows, snippet(patch, prompt, arguments, seed), report

    def tune(
        self,
        prompt: str,
        steps: float,
        guidance: float,
        seed: float | None,
        target: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, Any, Any, Any]:
        """Code with the settings found, these, the schedules with these among them, and what was tried."""
        arguments, seed = self.of_the_image(prompt, steps, guidance, seed)
        started: list[float] = []

        def advance() -> None:
            started.append(time.perf_counter())
            share = min((started[-1] - started[0]) / self.seconds, 1)
            progress(share, desc=f"trying settings, for about {self.seconds:g} seconds")

        with said_in_the_page(), self.shared.turn(owner(request), advance) as (pipe, after_step):
            how: dict[str, Any] = {"prompts": [prompt] * TUNED_IMAGES, "seconds": self.seconds, "seed": seed}
            found = agentsd.tune(pipe, target.strip() or None, progress=False, **how, **arguments, **after_step)
        tried = gr.Code(str(found), visible=True)
        if found.settings is None:  # what was found before remains
            return gr.skip(), gr.skip(), gr.skip(), tried
        code = snippet(options.seeded(found.settings, seed), prompt, arguments, seed)
        return code, found.settings, gr.Radio([*SCHEDULES, TUNED], value=TUNED), tried

    def cancel(self, request: gr.Request) -> None:
        if self.shared.cancel(owner(request)):  # the job's own word for it is lost: Gradio no longer listens to it
            gr.Info("Cancelled.", title="agentsd")

    def leave(self, request: gr.Request) -> None:
        """The tab is closed."""
        self.shared.cancel(owner(request))

    def of_the_image(
        self, prompt: str, steps: float, guidance: float, seed: float | None
    ) -> tuple[dict[str, Any], int]:
        """Arguments of the pipeline, and the seed. Raises gradio's error, which is shown in the page."""
        if not prompt.strip():
            raise gr.Error("Write what to draw into the prompt.", print_exception=False)
        if seed is None or not 0 <= seed < 2**63:
            raise gr.Error(f"Seed {seed}: give a whole number of 0 or more.", print_exception=False)
        return {**self.arguments, "num_inference_steps": int(steps), "guidance_scale": guidance}, int(seed)


def owner(request: gr.Request) -> str:
    return str(request.session_hash)


def settings_of(schedule: str, ratio: float, agent_steps: float, tuned: Settings | None) -> Settings:
    if schedule == PAPER:
        return {"ratio": ratio, "agent_steps": agent_steps}
    if schedule != TUNED:
        return {"preset": schedule}
    if tuned is None:  # asked by a program: the page offers it only once there are some
        raise ValueError("There are no tuned settings yet: tune first.")
    return tuned


def snippet(patch: Settings, prompt: str, arguments: dict[str, Any], seed: int) -> str:
    given, call = ([f"{name}={value!r}" for name, value in some.items()] for some in (patch, arguments))
    return SNIPPET.format(patch=", ".join(given), prompt=prompt, arguments=",\n    ".join(call), seed=seed)


@contextmanager
def said_in_the_page() -> Iterator[None]:
    """Of settings that do not go together, and of what the pipeline does not take."""
    try:
        yield
    except Cancelled:
        raise gr.Error("Cancelled.", title="agentsd", print_exception=False) from None
    except (CommandError, TypeError, ValueError) as error:
        raise gr.Error(str(error), print_exception=False) from None


def page(pipe: Any, prompt: str, seed: int, arguments: dict[str, Any], seconds: float) -> gr.Blocks:
    """The page of a loaded pipeline; ``arguments`` are those of its call that the page begins with."""
    actions = Actions(pipe, arguments, seconds)
    own = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
    with gr.Blocks(title="agentsd", analytics_enabled=False) as blocks:
        gr.Markdown("# agentsd\nThe same prompt and seed without (left) and with agentsd (right).")
        tuned = gr.State()
        with gr.Row():
            with gr.Column(scale=2):
                image = [
                    gr.Textbox(prompt, label="Prompt"),
                    gr.Slider(1, 100, arguments["num_inference_steps"], step=1, label="Denoising steps"),
                    gr.Slider(0, 20, arguments.get("guidance_scale", own), step=0.5, label="Guidance"),
                    gr.Number(seed, precision=0, label="Seed"),
                ]
                schedule = gr.Radio(SCHEDULES, value=SCHEDULES[0], label="Schedule")
                with gr.Group(visible=False) as of_paper:  # a preset has settings of its own
                    ratio = gr.Slider(0, 0.9, 0.4, step=0.05, label="Ratio: share of the tokens to merge")
                    share = "Agent steps: share of the steps under agent attention"
                    agent_steps = gr.Slider(0, 1, 0.4, step=0.05, label=share)
                with gr.Row():
                    compare_button = gr.Button("Compare", variant="primary")
                    cancel_button = gr.Button("Cancel", variant="stop")
                wanted = "2x, 35 dB, or nothing: as faithful as half the steps"
                target = gr.Textbox(label="Target to tune for", placeholder=wanted)
                tune_button = gr.Button("Tune for this machine")
            with gr.Column(scale=3):
                slider = gr.ImageSlider(label="unpatched | agentsd", type="pil", format="png", interactive=False)
                unlike = f"Their difference, {pictures.AMPLIFIED} times as bright"
                difference = gr.Image(label=unlike, format="png", height=200, interactive=False)
                figures = gr.Dataframe(headers=HEADINGS, label="Figures", wrap=True, interactive=False)
                code = gr.Code(label="To copy", language="python", interactive=False)
                tried = gr.Code(label="What was tried on this machine", interactive=False, visible=False)
                report = gr.HTML(label="What was patched")
        schedule.change(lambda name: gr.Group(visible=name == PAPER), schedule, of_paper, api_visibility="private")
        # each waits for the others of all tabs
        how: dict[str, Any] = {"concurrency_id": "pipeline", "concurrency_limit": 1}
        inputs = [*image, schedule, ratio, agent_steps, tuned]
        outputs = [slider, difference, figures, code, report]
        comparing = compare_button.click(actions.compare, inputs, outputs, show_progress_on=slider, **how)
        outputs = [code, tuned, schedule, tried]
        tuning = tune_button.click(actions.tune, [*image, target], outputs, show_progress_on=code, **how)
        # of these Gradio takes out of the queue what waits; what runs ends by `SharedPipeline`
        stops = [comparing, tuning]
        cancel_button.click(actions.cancel, None, None, cancels=stops, concurrency_limit=None)
        blocks.unload(actions.leave)
    return blocks
