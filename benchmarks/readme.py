"""Put the README's table in, rendered from the results: `python benchmarks/readme.py`. A test checks that it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from methods import METHODS
from tables import ABOVE, markdown, speedup, title, with_error

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- table: python benchmarks/readme.py -->\n", "<!-- end of table -->"
PSNR, DISTANCE = "PSNR, dB", "FD-EffNetLite0"


def table() -> str:
    """Speed of the real architecture beside the quality of the demo model in as many steps, for methods with both."""
    speed = load("latency-sd15-512-float32")
    qualities = [load(f"quality-demo_model-{steps}-steps") for steps in (50, 20)]
    metrics = [{row["method"]: row["metrics"] for row in quality["rows"]} for quality in qualities]
    steps, images = (tuple(quality["settings"][key] for quality in qualities) for key in ("steps", "images"))
    columns = ("speed-up", "PSNR, dB,", "distance above unpatched")
    heading = ("method", *(f"{column} in {n} steps" for n in steps for column in columns))
    plain = " and ".join(f"{found['unpatched'][DISTANCE]:.1f}" for found in metrics)
    rows = [heading]
    for name in METHODS:
        ratios = [speedup(speed, name, int(n)) for n in steps]
        if name != "unpatched" and any(name in found for found in metrics) and None not in ratios:
            cells = []
            for ratio, values in zip(ratios, (found.get(name, {}) for found in metrics), strict=True):
                cells.append(f"{ratio:.2f}x" if values else "")
                cells += [with_error(values, key) for key in (PSNR, DISTANCE + ABOVE)]
            rows.append((name, *cells))
    return (
        f"Speed: {title(speed)}, random weights, against fused attention. Quality, with standard errors: demo model, "
        f"{' and '.join(images)} images; PSNR to the unpatched ones, and how far the Frechet distance to real images "
        f"over EfficientNet-Lite0 is above that of the unpatched ones ({plain}). All measured here:\n\n"
        f"{markdown(rows)}\n"
    )


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def main() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + table() + END + rest.split(END, 1)[1])


if __name__ == "__main__":
    main()
