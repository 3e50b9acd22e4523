"""The table of docs/measured.md: speed of the real architecture beside the quality of the demo model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from methods import METHODS
from tables import ABOVE, markdown, speedups, title, with_error

PAGE = Path(__file__).parent.parent / "docs" / "measured.md"
BEGIN, END = "<!-- table: python benchmarks/report.py -->\n", "<!-- end of table -->"
PSNR, P5, DISTANCE = "PSNR, dB", "PSNR p5", "FD-EffNetLite0"


def table(results: Path) -> str:
    """Of the methods that have both, in as many steps."""
    load: Callable[[str], dict[str, Any]] = lambda name: json.loads((results / f"{name}.json").read_text())
    speed = load("latency-sd15-512-float32")
    qualities = [load(f"quality-demo_model-{steps}-steps") for steps in (50, 20)]
    metrics = [{row["method"]: row["metrics"] for row in quality["rows"]} for quality in qualities]
    steps, images = ([quality["settings"][key] for quality in qualities] for key in ("steps", "images"))
    ratios = [speedups(speed, n) for n in steps]
    names = {PSNR: "PSNR, dB,", P5: "PSNR, worst of 20,", DISTANCE + ABOVE: "distance above unpatched"}
    shown = [key for key in names if any(key in values for found in metrics for values in found.values())]
    columns = ["speed-up", *(names[key] for key in shown)]
    rows = [("method", *(f"{column} in {n} steps" for n in steps for column in columns))]
    for name in METHODS:
        measured = any(name in found for found in metrics) and all(name in found for found in ratios)
        if measured and name != "unpatched":
            cells = []
            for ratio, found in zip(ratios, metrics, strict=True):
                cells.append(f"{ratio[name]:.2f}x" if name in found else "")
                cells += [with_error(found.get(name, {}), key) for key in shown]
            rows.append((name, *cells))
    plain = " and ".join(f"{found['unpatched'][DISTANCE]:.1f}" for found in metrics)
    return (
        f"Speed: {title(speed)}, random weights, against fused attention. Quality, with standard errors: demo model, "
        f"{' and '.join(map(str, images))} images; PSNR to the unpatched ones, and how far the Frechet distance to "
        f"real images over EfficientNet-Lite0 is above that of the unpatched ones ({plain}). All measured here:\n\n"
        f"{markdown(rows)}\n"
    )


def write(results: Path) -> None:
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table(results) + END + rest.split(END, 1)[1])
