"""A page that compares: the same prompt and seed without and with agentsd, a slider between the two pictures.

It listens on this computer alone, unless --host says otherwise.

    pip install -e ".[app]" && python examples/app.py
    python examples/app.py --model stable-diffusion-v1-5/stable-diffusion-v1-5
"""

from __future__ import annotations

import time
from typing import Any

import gradio as gr
import torch
from common import arguments, load
from diffusers import AutoPipelineForText2Image
from PIL import Image, ImageChops

import agentsd
from agentsd.cli.pictures import psnr

PAPER = "paper's schedule"
OTHERS = [name for name in agentsd.PRESETS if name != "balanced"]
HEADINGS = ["", "seconds", "speed-up", "PSNR, dB"]
AMPLIFIED = 8
SNIPPET = """import agentsd
import torch

agentsd.apply_patch(pipe, {patch})
generator = torch.Generator().manual_seed({seed})
image = pipe(
    {prompt!r}, num_inference_steps={steps}, guidance_scale={guidance:g}, generator=generator
).images[0]
"""


class Comparison:
    """What the page's button does."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        pipe("", num_inference_steps=1)  # the first image takes longer, whoever draws it

    def __call__(
        self,
        prompt: str,
        schedule: str,
        ratio: float,
        agent_steps: float,
        steps: float,
        guidance: float,
        seed: float | None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (how gradio finds it)
    ) -> tuple[tuple[Image.Image, Image.Image], Image.Image, list[list[str]], str, str]:
        """Both pictures, how they differ, the figures, the same as code, and the report as HTML."""
        if not prompt.strip():
            raise gr.Error("Write what to draw into the prompt.", print_exception=False)
        if seed is None or not 0 <= seed < 2**63:
            raise gr.Error(f"Seed {seed}: give a whole number of 0 or more.", print_exception=False)
        settings = {"ratio": ratio, "agent_steps": agent_steps} if schedule == PAPER else {"preset": schedule}
        images, seconds = [], []
        try:
            for label in ("unpatched", "agentsd"):
                if label == "agentsd":
                    agentsd.apply_patch(self.pipe, seed=int(seed), **settings)
                start = time.perf_counter()
                images.append(self.draw(label, prompt, int(steps), guidance, int(seed), progress))
                seconds.append(time.perf_counter() - start)
            report = agentsd.report(self.pipe)._repr_html_()
        except ValueError as error:  # of settings that do not go together
            raise gr.Error(str(error), print_exception=False) from None
        finally:
            agentsd.remove_patch(self.pipe)
        rows = [
            ["unpatched", f"{seconds[0]:.2f}", "1.00x", ""],
            ["agentsd", f"{seconds[1]:.2f}", f"{seconds[0] / seconds[1]:.2f}x", f"{psnr(*images):.1f}"],
        ]
        patch = ", ".join(f"{name}={value!r}" for name, value in {**settings, "seed": int(seed)}.items())
        code = SNIPPET.format(patch=patch, prompt=prompt, steps=int(steps), guidance=guidance, seed=int(seed))
        return (images[0], images[1]), difference(*images), rows, code, report

    def draw(self, label: str, prompt: str, steps: int, guidance: float, seed: int, progress: Any) -> Image.Image:
        def advance(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            progress((step + 1, steps), desc=label)
            return tensors

        generator = torch.Generator().manual_seed(seed)
        return self.pipe(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            callback_on_step_end=advance,
        ).images[0]


def difference(a: Image.Image, b: Image.Image) -> Image.Image:
    """Black where both are equal."""
    return ImageChops.difference(a, b).point(lambda value: min(AMPLIFIED * value, 255))


def page(pipe: Any, defaults: Any) -> gr.Blocks:
    with gr.Blocks(title="agentsd") as blocks:
        gr.Markdown("# agentsd\nThe same prompt and seed without (left) and with agentsd (right).")
        with gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Textbox(defaults.prompt, label="Prompt")
                schedule = gr.Radio(["balanced", *OTHERS, PAPER], value="balanced", label="Schedule")
                with gr.Group(visible=False) as of_paper:  # a preset has settings of its own
                    ratio = gr.Slider(0, 0.9, 0.4, step=0.05, label="Ratio: share of the tokens to merge")
                    share = "Agent steps: share of the steps under agent attention"
                    agent_steps = gr.Slider(0, 1, 0.4, step=0.05, label=share)
                inputs = [
                    *(prompt, schedule, ratio, agent_steps),
                    gr.Slider(1, 100, defaults.steps, step=1, label="Denoising steps"),
                    gr.Slider(1, 15, defaults.guidance, step=0.5, label="Guidance"),
                    gr.Number(defaults.seed, precision=0, label="Seed"),
                ]
                button = gr.Button("Compare", variant="primary")
            with gr.Column(scale=3):
                outputs = [
                    gr.ImageSlider(label="unpatched | agentsd", type="pil", interactive=False),
                    gr.Image(label=f"Their difference, {AMPLIFIED} times as bright", height=200, interactive=False),
                    gr.Dataframe(headers=HEADINGS, label="Figures", interactive=False),
                    gr.Code(label="To copy", language="python", interactive=False),
                    gr.HTML(label="What was patched"),
                ]
        schedule.change(lambda name: gr.Group(visible=name == PAPER), schedule, of_paper)
        button.click(Comparison(pipe), inputs, outputs, concurrency_limit=1)
    return blocks


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this computer alone)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--share", action="store_true", help="a public link through Gradio's servers")
    args = parser.parse_args()
    pipe = load(AutoPipelineForText2Image, args)
    page(pipe, args).launch(server_name=args.host, server_port=args.port, share=args.share)


if __name__ == "__main__":
    main()
