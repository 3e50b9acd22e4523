"""The head of the results page: a question, one picture and a short table each, made from the results.

A part whose results are not there is left out.
"""

from collections.abc import Callable
from typing import Any

from plots import distribution, front, growth, points_of, series, speeds
from tables import (
    ABOVE,
    Rows,
    case,
    device,
    exactness_rows,
    kind,
    markdown,
    quality_rows,
    short,
    shorter,
    title,
    with_error,
)

Result = dict[str, Any]
PAPER = "agentsd r=0.4 (the paper's schedule)"
PRESETS = ("agentsd balanced", "agentsd quality", "agentsd fast", "agentsd adaptive", "agentsd few_steps")
MAIN = (*PRESETS, "agentsd balanced, r=0.4", "DeepCache N=3", "DeepCache N=5", "tomesd r=0.4", PAPER)
SHORT = {
    "agentsd balanced": "balanced",
    "agentsd quality": "quality",
    "DeepCache N=3": "DeepCache N=3",
    "MagCache": "MagCache",
    "tomesd r=0.4": "tomesd",
    PAPER: "paper",
}
SAMPLERS = {None: "DDIM", "dpm++": "DPM-Solver++", "euler": "Euler"}  # the demo model's own is DDIM
MEMORY = ("unpatched", "agentsd balanced", "DeepCache N=3", "tomesd r=0.4")
FEWEST = 3  # methods of a picture
TRANSFORMERS = ("sd3-medium", "sd35-large", "flux", "pixart")
EXACT = (
    "Tiny transformers with random weights, the same inputs in every call, so that a cached call has to give what a "
    "full one gives. Exact is within 1e-6; an error is a share of the largest value. FirstBlockCache and TaylorSeer "
    "want a cache context, which most pipelines of diffusers do not set: in brackets what they give with one."
)


def runs(results: list[Result]) -> list[Result]:
    """Timings of a preset beside others, GPUs first, without those under a profiler and those by ratio."""
    timed = (r for r in results if r["kind"] == "latency")
    plain = (r for r in timed if not r["settings"]["ratios"] and not any("kernels" in row for row in r["rows"]))
    return [r for r in plain if any(row["method"] in PRESETS for row in r["rows"])]


def how_fast(results: list[Result]) -> tuple[str, dict[str, str]]:
    found = runs(results)
    groups: dict[str, Rows] = {}
    for result in found:
        for mode in dict.fromkeys(row["mode"] for row in result["rows"]):
            of = {row["method"]: row for row in result["rows"] if row["mode"] == mode}
            if "agentsd balanced" in of:
                how = "" if mode == "eager" else ", " + {"compile": "compiled"}.get(mode, mode)
                start = short(of["unpatched"]["seconds"]) if "unpatched" in of else ""
                cells = [f"{of[name]['speedup']:.2f}x" if name in of else "" for name in SHORT]
                heading = ("", "unpatched, s", *SHORT.values())
                rows = groups.setdefault(f"{device(result)}, {kind(result)}:", [heading])
                rows.append((case(result) + how, start, *cells))
    tables = [f"{above}\n\n{markdown(filled(rows))}" for above, rows in groups.items()]
    if not tables:
        return "", {}
    on_cards = [r for r in found if "gpu" in r["hardware"] and r["settings"]["modes"] == ["eager"]]
    pictures = {"speed": speeds(on_cards, MAIN)} if on_cards else {}
    shown = ["![Speed-up of each method; lines are the range over the rounds](plots/speed.svg)"] * bool(pictures)
    text = (
        "How many times as fast whole trajectories are as the unpatched ones. `balanced` is the preset to begin with, "
        "`paper` the paper's schedule at ratio 0.4. In the picture a line is the range over the rounds."
    )
    return "\n\n".join(["## How fast", text, *shown, *tables]), pictures


def filled(rows: Rows) -> Rows:
    """Without the columns in which nothing stands below the heading."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    return list(zip(*columns, strict=True))


def qualities(results: list[Result]) -> list[Result]:
    """Of the demo model with a UNet."""
    found = (r for r in results if r["kind"] == "quality" and "sd3" not in r["settings"]["model"])
    return sorted(found, key=lambda r: -r["settings"]["steps"])


def metrics_table(found: list[Result], names: dict[str, str]) -> str:
    """A row for each method, a column for each metric of each run that has any."""
    pairs = [(r, key) for r in found for key in names if any(key in row["metrics"] for row in r["rows"])]
    steps = lambda s: f"{SAMPLERS.get(name := s.get('scheduler'), name)} {s['steps']}, {s['images']} images"
    rows: Rows = [("method", *(f"{names[key]}, {steps(r['settings'])}" for r, key in pairs))]
    for name in MAIN:
        of = [next((row["metrics"] for row in r["rows"] if row["method"] == name), {}) for r, _ in pairs]
        if any(of):
            cells = [with_error(metrics, key) for metrics, (_, key) in zip(of, pairs, strict=True)]
            rows.append((shorter(name), *cells))
    return markdown(rows)


def how_faithful(results: list[Result]) -> tuple[str, dict[str, str]]:
    found = qualities(results)
    if not found:
        return "", {}
    text = (
        "How near an image is to the unpatched one of the same seed, on the demo model: mean PSNR with its standard "
        "error. Squares are ours; the grey line joins the best trade-offs."
    )
    parts, pictures = ["## How faithful", text], {}
    for quality in found:
        shown = {**quality, "rows": [row for row in quality["rows"] if row["method"] in MAIN]}
        speed = next((r for r in runs(results) if len(points_of(r, shown, "PSNR, dB")) >= FEWEST), None)
        if speed is not None:
            pictures["fidelity"] = front(speed, shown, "PSNR, dB")
            parts.append("![Fidelity against speed](plots/fidelity.svg)")
            break
    if listed := [r for r in found if has_worst(r)]:
        pictures["images"] = distribution(listed[0])
        parts.append("Each image for itself, the worst at the left:\n\n![PSNR of each image](plots/images.svg)")
        parts += worst_images(listed[0])
        images = listed[0]["settings"]["images"]
        parts.append(
            "The mean, and the worst of 20 images, in dB, by sampler and steps. Among "
            f"{images} images that rests on {max(1, round(images / 20))} of them."
        )
        parts.append(metrics_table(listed, {"PSNR, dB": "mean", "PSNR p5": "worst of 20"}))
    if means := [r for r in found if not has_worst(r)]:
        parts.append("The mean of more images, of older versions: the notes of [each run](#every-run) say which.")
        parts.append(metrics_table(means, {"PSNR, dB": "mean"}))
    return "\n\n".join(parts), pictures


def has_worst(result: Result) -> bool:
    """Whether each image's own figure is there."""
    return any(row.get("psnr") for row in result["rows"])


def worst_images(result: Result) -> list[str]:
    if "worst" not in result:
        return []
    above = f"The worst of these {result['settings']['images']} images, beneath the unpatched ones"
    picture = f"![The worst images of each method]({result['worst']})"
    return [f"<details><summary>{above}</summary>", picture, "</details>"]


def how_good(results: list[Result]) -> tuple[str, dict[str, str]]:
    distances = {"FD-EffNetLite0" + ABOVE: "distance", "FID" + ABOVE: "FID"}
    found = [r for r in qualities(results) if any(set(distances) & set(row["metrics"]) for row in r["rows"])]
    if not found:
        return "", {}
    plain = " and ".join(f"{r['rows'][0]['metrics'].get('FD-EffNetLite0', 0):.1f}" for r in found)
    text = (
        "How much farther from real images the patched images are than the unpatched ones: a Fréchet distance over "
        f"the features of EfficientNet-Lite0, not the FID of papers. The unpatched ones are at {plain}. What is less "
        "than two standard errors from 0 cannot be told from it."
    )
    return f"## How good\n\n{text}\n\n{metrics_table(found, distances)}", {}


def how_it_grows(results: list[Result]) -> tuple[str, dict[str, str]]:
    parts, pictures = [], {}
    if longest := sorted(series(results).items(), key=lambda item: -len(item[1])):
        pictures["growth"] = growth(*longest[0])
        parts.append("Attention grows with the square of the tokens, so patches of it gain more on larger images.")
        parts.append("![Time and speed-up against tokens](plots/growth.svg)")
    counted = sorted(
        (r for r in results if r["kind"] == "operations" and r["settings"]["model"] == "sd15"),
        key=lambda r: r["settings"]["size"],
    )
    if counted:
        rows: Rows = [("pixels", *MEMORY)]
        for result in counted:
            peaks = {row["method"]: f"{row['peak_mb']:,.0f}" for row in result["rows"]}
            rows.append((str(result["settings"]["size"]), *(peaks.get(name, "") for name in MEMORY)))
        parts.append("Memory of one call of Stable Diffusion 1.5's UNet, one sample, in MB, weights not counted:")
        parts.append(markdown(rows))
    return "\n\n".join(["## How it grows", *parts]) if parts else "", pictures


def on_transformers(results: list[Result]) -> tuple[str, dict[str, str]]:
    """How many times fewer operations, how faithful, and whether exact where inputs repeat."""
    parts = []
    counted = [r for r in results if r["kind"] == "operations" and r["settings"]["model"] in TRANSFORMERS]
    if counted:
        saved = [{row["method"]: r["rows"][0]["total"] / row["total"] for row in r["rows"]} for r in counted]
        names = dict.fromkeys(name for ratios in saved for name in ratios if name != "unpatched")
        rows: Rows = [("times fewer operations", *(f"{case(r)}, {r['settings']['steps']} steps" for r in counted))]
        rows += [(name, *(f"{of[name]:.2f}x" if name in of else "" for of in saved)) for name in names]
        about = "Operations, counted; [seconds](#how-fast) where they were timed. TaylorSeer skips attention alone."
        parts += [about, markdown(rows)]
    for r in (r for r in results if r["kind"] == "quality" and "sd3" in r["settings"]["model"]):
        parts += [f"PSNR to the unpatched images, in dB: {title(r)}.", markdown(quality_rows(r)), *worst_images(r)]
    for r in (r for r in results if r["kind"] == "exactness"):
        parts += [EXACT, markdown(exactness_rows(r))]
    return "\n\n".join(["## Transformers", *parts]) if parts else "", {}


QUESTIONS: tuple[Callable[[list[Result]], tuple[str, dict[str, str]]], ...] = (
    how_fast,
    how_faithful,
    how_good,
    how_it_grows,
    on_transformers,
)


def overview(results: list[Result]) -> tuple[list[str], dict[str, str]]:
    """Markdown of each question, and the pictures as SVG text, by name."""
    answers = [question(results) for question in QUESTIONS]
    pictures = {name: text for _, drawn in answers for name, text in drawn.items()}
    return [text for text, _ in answers if text], pictures
