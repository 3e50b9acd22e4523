"""Quick start: the same prompts and seeds without and with agentsd, side by side.

Without arguments it uses the demo model beside this file, which needs no download and is small; so it then times a few
UNet calls at the size of Stable Diffusion 1.5, where the tokens are many and the gain is.

    python examples/quickstart.py
    python examples/quickstart.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a red fox in the snow"
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from common import precision
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import agentsd
from agentsd.schedule import full_calls

SCHEDULE = 50  # steps of the preset's schedule
DEMO_MODEL = Path(__file__).with_name("demo_model")
DEMO_PROMPTS = [
    "red apple on a blue background",
    "small frog on a purple background",
    "house on an orange background",
    "blue heart on a yellow background",
    "hamburger on a gray background",
    "small rainbow on a green background",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="model id or folder (default: the demo model)")
    parser.add_argument("--prompt", nargs="+", help="one or more prompts")
    parser.add_argument("--ratio", type=float, default=0.4, help="share of the tokens to merge (default: 0.4)")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (default: 25)")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default: 0)")
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("quickstart.png"), help="default: quickstart.png")
    parser.add_argument("--no-real-size", action="store_true", help="skip the timing at Stable Diffusion 1.5's size")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: give 1 or more")
    if not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {args.out.parent}")
    return args


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def generate(pipe, args, label: str, steps: int) -> tuple[list[Image.Image], float]:
    """All images of a row, and the seconds they took."""
    pipe.set_progress_bar_config(desc=label)
    generators = [torch.Generator("cpu").manual_seed(args.seed + i) for i in range(len(args.prompt))]
    start = time.perf_counter()
    images = pipe(args.prompt, num_inference_steps=steps, guidance_scale=args.guidance, generator=generators).images
    return images, time.perf_counter() - start


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = np.square(np.asarray(a, dtype=np.float64) - np.asarray(b)).mean()
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def side_by_side(rows: list[tuple[str, list[Image.Image]]], prompts: list[str]) -> Image.Image:
    """One labelled picture: a row of images per method, the prompts underneath."""
    side, gap, head, foot = 192, 8, 26, 40
    font, small = ImageFont.load_default(size=16), ImageFont.load_default(size=12)
    width = gap + len(prompts) * (side + gap)
    sheet = Image.new("RGB", (width, len(rows) * (head + side) + foot), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (label, images) in enumerate(rows):
        top = row * (head + side)
        draw.text((gap, top + 4), label, "black", font)
        for i, image in enumerate(images):
            sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (gap + i * (side + gap), top + head))
    for i, prompt in enumerate(prompts):
        left, bottom = gap + i * (side + gap), len(rows) * (head + side) + 4
        draw.multiline_text((left, bottom), wrapped(prompt, small, side), "dimgray", small, spacing=2)
    return sheet


def wrapped(text: str, font, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    return "\n".join(lines[:2])


def real_size_unet(device: str) -> UNet2DConditionModel:
    """The UNet of Stable Diffusion 1.5 with random weights: its speed is that of the trained one."""
    fast_half = device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    unet = unet.to(torch.bfloat16 if fast_half else torch.float32).to_empty(device=device).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return unet


@torch.inference_mode()
def time_real_size(ratio: float, device: str, seconds: float = 45.0) -> None:
    """Median seconds of a UNet call at 512x512, the variants in turn for about ``seconds``."""
    unet = real_size_unet(device)
    like = next(unet.parameters())
    sample, text = (torch.randn(1, *shape).to(like) for shape in ((4, 64, 64), (77, 768)))
    variants = {"unpatched": None, "agent step": {"agent_steps": 1.0}, "merging step": {"agent_steps": 0.0}}
    variants["preset"] = {"preset": "fast"}
    full_ones = full_calls(SCHEDULE, agentsd.Settings(**agentsd.PRESETS["fast"]))
    times: dict[str, list[float]] = {name: [] for name in [*variants, "preset, cached"]}
    began = time.perf_counter()

    def call(name: str, timestep: int) -> None:
        start = time.perf_counter()
        unet(sample, torch.tensor(timestep), text).sample.float().mean().item()  # reading a value waits for the device
        times[name].append(time.perf_counter() - start)
        bar.update()

    with tqdm(desc="UNet calls at 512x512", unit="call") as bar:
        while min(map(len, times.values())) < 2 or time.perf_counter() - began < seconds:
            for name, settings in variants.items():
                if settings is not None:
                    agentsd.apply_patch(unet, **({"ratio": ratio} if "preset" not in settings else {}), **settings)
                call(name, 500)
                if name == "preset":  # go on to the first step that takes the deep features of those before
                    for i in range(1, full_ones.index(False) + 1):
                        call("preset" if full_ones[i] else "preset, cached", 500 - i)
                agentsd.remove_patch(unet)
    plain, agent, merging, full, cached = (statistics.median(t[1:]) for t in times.values())  # the first warms up
    fast = (full_ones.count(True) * full + full_ones.count(False) * cached) / SCHEDULE
    print(
        f"\nStable Diffusion 1.5's UNet, random weights, 512x512, batch 1, {str(unet.dtype)[6:]}, {device}, ratio "
        f"{ratio:g}, against fused attention:\n"
        f"  unpatched {plain:.2f} s   agent step {agent:.2f} s ({plain / agent:.2f}x)   "
        f"merging step {merging:.2f} s ({plain / merging:.2f}x)   "
        f"whole schedule {plain / (0.4 * agent + 0.6 * merging):.2f}x\n"
        f'  apply_patch(pipe, preset="fast"): {fast:.2f} s a step ({plain / fast:.2f}x)'
    )


def main() -> None:
    args = parse_args()
    demo = args.model == str(DEMO_MODEL)
    args.prompt = args.prompt or DEMO_PROMPTS
    try:
        dtype = torch.float32 if args.device == "cpu" else torch.float16
        pipe = DiffusionPipeline.from_pretrained(args.model, **precision(dtype)).to(args.device)
        with agentsd.patched(pipe, ratio=args.ratio):
            generate(pipe, args, "warm-up", steps=1)
    except (OSError, TypeError, ValueError) as error:
        print(f"quickstart: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None

    plain, plain_seconds = generate(pipe, args, "unpatched", args.steps)
    agentsd.apply_patch(pipe, ratio=args.ratio, seed=args.seed)
    patched, patched_seconds = generate(pipe, args, "agentsd", args.steps)
    print(agentsd.report(pipe), "\n")
    agentsd.remove_patch(pipe)

    fidelity = statistics.mean(min(psnr(a, b), 100.0) for a, b in zip(plain, patched, strict=True))
    speed_up = f"{plain_seconds / patched_seconds:.2f}x"
    print(
        f"{len(plain)} images of {plain[0].width}x{plain[0].height}, {args.steps} steps: unpatched "
        f"{plain_seconds:.1f} s, agentsd {patched_seconds:.1f} s, speed-up {speed_up}, PSNR to unpatched "
        f"{fidelity:.1f} dB"
    )
    rows = [(f"unpatched, {plain_seconds:.1f} s", plain), (f"agentsd, {patched_seconds:.1f} s", patched)]
    side_by_side(rows, args.prompt).save(args.out)
    print(f"saved {args.out}")
    if demo and not args.no_real_size:
        del pipe
        print("\nThe demo model has 1,024 tokens and little attention to save: no speed-up is to be expected there.")
        print("At Stable Diffusion 1.5's 4,096 tokens and 320 channels:")
        time_real_size(args.ratio, args.device)


if __name__ == "__main__":
    main()
