"""Put the README's table in, rendered from the results: `python benchmarks/readme.py`. A test checks that it was."""

from __future__ import annotations

import json
from pathlib import Path

from tables import latency_rows, markdown, speedup, title

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- table: python benchmarks/readme.py -->\n", "<!-- end of table -->"
METRICS = ("PSNR, dB", "FD-EffNetLite0")


def table() -> str:
    """Speed of the real architecture beside the quality of the demo model, for the methods that have both."""
    speed = json.loads((RESULTS / "latency-sd15-512-float32.json").read_text())
    quality = json.loads((RESULTS / "quality-demo_model-20-steps.json").read_text())
    metrics = {row["method"]: row["metrics"] for row in quality["rows"]}
    images, steps = quality["settings"]["images"], int(quality["settings"]["steps"])
    heading, *rows = latency_rows(speed)
    shown = [(heading[0], *heading[-2:], f"in {steps} steps", *METRICS)]
    for name, *_, seconds, ratio in rows:
        if name in metrics:
            psnr, distance = (metrics[name][metric] for metric in METRICS)
            values = (f"{speedup(speed, name, steps):.2f}x", f"{psnr:.1f}" if psnr < 100 else "", f"{distance:.1f}")
            shown.append((name, seconds, ratio, *values))
    return (
        f"Speed: {title(speed)}, random weights. Quality: demo model, {images} images, {steps} steps; PSNR to the "
        f"unpatched images, Frechet distance to real ones over EfficientNet-Lite0. All measured here:\n\n"
        f"{markdown(shown)}\n"
    )


def main() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + table() + END + rest.split(END, 1)[1])


if __name__ == "__main__":
    main()
