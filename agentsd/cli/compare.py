"""Draw the same prompts and seeds without and with the patch: one picture, and a line of figures.

Examples:

    agentsd compare
    agentsd compare --preset fast --steps 50
    agentsd compare --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a red fox in the snow" --out fox.png
    agentsd compare --json | jq .speed_up
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

import agentsd
from agentsd.cli import options, pictures, pipelines
from agentsd.cli.options import CommandError
from agentsd.tuning import WARM_UP

PROMPTS = [
    "red apple on a blue background",
    "small frog on a purple background",
    "house on an orange background",
    "blue heart on a yellow background",
    "hamburger on a gray background",
    "small rainbow on a green background",
]


def add_parser(commands: Any) -> None:
    parser = options.add(commands, "compare", run, __doc__)
    parser.add_argument("--prompt", nargs="+", action="extend", help="prompts (default: six of the demo's)")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), help="the picture (default: compare.png)")
    options.add_json(parser)
    options.add_patch(parser)
    options.add_image(parser)
    options.add_model(parser)


@dataclass(frozen=True)
class Comparison:
    """Images without and with the patch, and the seconds that each row took."""

    plain: list[Image.Image]
    patched: list[Image.Image]
    plain_seconds: float
    patched_seconds: float

    @property
    def speed_up(self) -> float:
        return self.plain_seconds / self.patched_seconds

    @property
    def fidelities(self) -> list[float]:
        """PSNR of each patched image to its unpatched one, in dB."""
        return [pictures.psnr(*pair) for pair in zip(self.plain, self.patched, strict=True)]

    def line(self, steps: int) -> str:
        psnr = self.fidelities
        size = "x".join(map(str, self.plain[0].size))
        unlike = [value for value in psnr if math.isfinite(value)]
        equal = f"{len(psnr) - len(unlike)} equal to unpatched" if len(unlike) < len(psnr) else ""
        near = f"PSNR to unpatched {statistics.mean(unlike):.1f} dB (worst {min(unlike):.1f})" if unlike else ""
        return (
            f"{len(psnr)} images of {size}, {steps} steps: unpatched {self.plain_seconds:.1f} s, agentsd "
            f"{self.patched_seconds:.1f} s, speed-up {self.speed_up:.2f}x, {', '.join(filter(None, (near, equal)))}"
        )

    def picture(self, prompts: list[str]) -> Image.Image:
        rows = [
            (f"unpatched, {self.plain_seconds:.1f} s", self.plain),
            (f"agentsd, {self.patched_seconds:.1f} s", self.patched),
        ]
        return pictures.side_by_side(rows, prompts)


def compare(
    pipe: Any, prompts: list[str], seed: int, arguments: dict[str, Any], patch: dict[str, Any] | None
) -> Comparison:
    """Draws both rows; the pipeline stays patched.

    Raises:
        CommandError: the pipeline cannot be patched like this.
    """
    if patch is None:
        raise CommandError(f"--preset {options.UNPATCHED}: there is nothing to compare with")
    seeds = [seed + i for i in range(len(prompts))]
    try:
        few = arguments | {"num_inference_steps": min(WARM_UP, arguments["num_inference_steps"])}
        with agentsd.patched(pipe, **patch):  # the first call of a kind takes longer, whoever makes it
            pipelines.draw(pipe, prompts, seeds, few)
        pipelines.draw(pipe, prompts, seeds, few)
        start = time.perf_counter()
        plain = pipelines.draw(pipe, prompts, seeds, arguments)
        between = time.perf_counter()
        agentsd.apply_patch(pipe, **patch)
        begin = time.perf_counter()
        patched = pipelines.draw(pipe, prompts, seeds, arguments)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from None
    return Comparison(plain, patched, between - start, time.perf_counter() - begin)


def run(args: argparse.Namespace) -> None:
    patch = options.patch_of(args)
    pictures.require_place(args.out)
    prompts = args.prompt or PROMPTS
    pipe = pipelines.load(args)
    found = compare(pipe, prompts, args.seed, pipelines.call(args), patch)
    with options.writing(args.out):
        found.picture(prompts).save(args.out)
    if args.json:
        told = {"unpatched_seconds": found.plain_seconds, "agentsd_seconds": found.patched_seconds}
        psnr = [value if math.isfinite(value) else None for value in found.fidelities]
        print(json.dumps({"speed_up": found.speed_up, **told, "psnr": psnr, "picture": str(args.out)}))
    else:
        print(f"{found.line(args.steps)}\n-> {args.out}")
