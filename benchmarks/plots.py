"""Plots of the results as SVG text: speed, quality against it, its distribution, and speed against the tokens."""

import io
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from methods import METHODS
from tables import ABOVE, ERROR, place, shorter, speedups, title

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

Result = dict[str, Any]
METRICS = {"PSNR, dB": 1, "PSNR p5": 1, "FD-EffNetLite0": -1, "FID": -1}  # 1 where more is better
# one figure is of at least so many methods, or sizes
LEAST_POINTS, LEAST_SIZES = 4, 3
mpl.rcParams["svg.hashsalt"] = "agentsd"  # equal figures are equal files
# the colours of Okabe and Ito, which colour-blind readers tell apart, and another marker for each
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#882255"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*", "<"]
mpl.rcParams["axes.prop_cycle"] = mpl.cycler(color=COLOURS, marker=MARKERS)
mpl.rcParams["font.size"] = 11
WIDTH = 6  # inches, so that letters are large enough on a phone


def svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.S)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def look(method: str) -> dict[str, str]:
    """Ours are squares, the others circles."""
    return {"color": COLOURS[1], "fmt": "s"} if "agentsd" in method else {"color": COLOURS[0], "fmt": "o"}


def pareto(points: list[tuple[float, float, str]], sign: int) -> list[tuple[float, float, str]]:
    """Those that no other point passes in both, by speed; ``sign`` is 1 where more of the second is better."""
    beaten = lambda p: any(q[0] >= p[0] and sign * q[1] >= sign * p[1] and q[:2] != p[:2] for q in points)
    return sorted(point for point in points if not beaten(point))


def points_of(latency: Result, quality: Result, metric: str) -> list[tuple[float, float, str]]:
    """Speed-up in the steps of the quality, that quality, and name of every method that has both."""
    speed = speedups(latency, quality["settings"]["steps"])
    rows = [row for row in quality["rows"] if row["method"] in METHODS and metric in row["metrics"]]
    return [(speed[row["method"]], row["metrics"][metric], row["method"]) for row in rows if row["method"] in speed]


def front(latency: Result, quality: Result, metric: str) -> str:
    """Quality against speed, one point per method with its standard error, the Pareto front drawn.

    A distance's is that of its difference to the unpatched one's, since both see the same prompts and seeds.
    """
    points = points_of(latency, quality, metric)
    best = pareto(points, METRICS[metric])
    keys = (metric + ERROR, metric + ABOVE + ERROR)
    errors = {row["method"]: [row["metrics"][key] for key in keys if key in row["metrics"]] for row in quality["rows"]}
    figure, axes = plt.subplots(figsize=(WIDTH, 5))
    axes.plot(*zip(*[point[:2] for point in best], strict=True), color="lightgray", marker="", zorder=0)
    for x, y, name in points:
        axes.errorbar(x, y, errors[name] or None, elinewidth=0.8, **look(name))
        above = 7 if "agentsd" in name else -14
        axes.annotate(shorter(name), (x, y), xytext=(0, above), textcoords="offset points", fontsize=10, ha="center")
    steps = quality["settings"]["steps"]
    axes.set(xlabel=f"speed-up, {steps} steps\n{place(latency)}", ylabel=metric)
    axes.margins(y=0.12)
    axes.set_xlim(0, 1.2 * max(x for x, *_ in points))  # room for names
    axes.grid(alpha=0.3)
    bars = ""
    if any(errors.values()):
        of_what = "" if metric + ERROR in quality["rows"][-1]["metrics"] else " of the difference to unpatched"
        bars = f"\nbars: standard error{of_what}"
    axes.set_title(f"{title(quality).rpartition(', ')[0]}{bars}", fontsize=10)
    return svg(figure)


def speeds(results: list[Result], methods: Sequence[str]) -> str:
    """Speed-ups of each method, a marker for each result, with the range over its rounds."""
    figure, axes = plt.subplots(figsize=(WIDTH - 1.5, 5.2))  # beside the names
    shown = [name for name in methods if any(row["method"] == name for result in results for row in result["rows"])]
    for i, result in enumerate(results):
        of = {row["method"]: row for row in result["rows"]}
        there = [name for name in shown if name in of]
        x = [of[name]["speedup"] for name in there]
        y = [shown.index(name) + 0.16 * (i - (len(results) - 1) / 2) for name in there]
        ends = [[abs(of[name]["speedup"] - of[name]["spread"][end]) for name in there] for end in (0, 1)]
        style = {"fmt": MARKERS[i % len(MARKERS)], "color": COLOURS[i % len(COLOURS)]}
        axes.errorbar(x, y, xerr=ends, elinewidth=0.8, markersize=5, label=place(result), **style)
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [shorter(name) for name in shown])
    axes.set(xlabel="speed-up", xlim=(0, None))
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    legend_below(axes)
    return svg(figure)


def legend_below(axes: Any) -> None:
    axes.legend(fontsize=10, loc="upper center", bbox_to_anchor=(0.4, -0.16), frameon=False)


def fronts(results: list[Result]) -> dict[str, str]:
    """By name, a front for every quality result, model, size and metric that share enough methods."""
    found = {}
    for quality in (r for r in results if r["kind"] == "quality"):
        for latency in (r for r in results if r["kind"] == "latency" and not r["settings"]["ratios"]):
            for metric in METRICS:
                patched = [name for *_, name in points_of(latency, quality, metric) if name != "unpatched"]
                if len(patched) >= LEAST_POINTS:
                    steps = quality["settings"]["steps"]
                    found[slug(f"front {title(latency)} {steps} steps {metric}")] = front(latency, quality, metric)
    return found


def distribution(quality: Result) -> str:
    """Every image's PSNR, by method from the worst to the best: what a mean hides is at the left."""
    figure, axes = plt.subplots(figsize=(WIDTH, 5))
    for row in (row for row in quality["rows"] if row.get("psnr")):
        psnrs = sorted(row["psnr"])
        share = [100 * (i + 0.5) / len(psnrs) for i in range(len(psnrs))]
        axes.plot(share, psnrs, label=row["method"], linewidth=1, marker="")
    axes.set(xscale="log", xlabel="share of the images, %: the worst at the left", ylabel="PSNR to unpatched, dB")
    axes.set_title(title(quality), fontsize=10)
    axes.grid(alpha=0.3)
    legend_below(axes)
    return svg(figure)


def series(results: list[Result]) -> dict[str, list[Result]]:
    """Latency results that differ in size alone and have several, by size. Compiled ones are none."""
    found: dict[str, list[Result]] = defaultdict(list)
    for result in (r for r in results if r["kind"] == "latency"):
        settings = result["settings"]
        if settings["modes"] == ["eager"] and not settings["ratios"]:
            case = title(result).replace(f", {settings['size']} px", "")
            found[f"{case}, {settings['steps']} steps"].append(result)
    by_size = lambda group: sorted(group, key=lambda result: result["settings"]["size"])
    return {case: by_size(group) for case, group in found.items() if len(group) >= LEAST_SIZES}


def growth(case: str, group: list[Result]) -> str:
    """Seconds of a trajectory, and the speed-up, against the tokens of the latents. Below 1 a method costs time."""
    figure, (seconds, gain) = plt.subplots(2, 1, figsize=(WIDTH, 8), sharex=True)
    methods: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for result in group:
        tokens = (result["settings"]["size"] // 8) ** 2
        for row in result["rows"]:
            methods[row["method"]].append((tokens, row["seconds"], row["speedup"]))
    for name, points in methods.items():
        if len(points) >= LEAST_SIZES:
            tokens, times, ratios = zip(*points, strict=True)
            seconds.plot(tokens, times, markersize=4, label=name)
            gain.plot(tokens, ratios, markersize=4, label=name)
    for axes in (seconds, gain):
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
    seconds.set(yscale="log", ylabel=f"{group[0]['settings']['steps']} steps, s")
    gain.set(xlabel="tokens of the latents", ylabel="speed-up")
    legend_below(gain)
    seconds.set_title(case.replace(", batch", ",\nbatch"), fontsize=10)
    return svg(figure)


def plots(results: list[Result]) -> dict[str, str]:
    """Every plot, by name."""
    growths = {slug(f"growth {case}"): growth(case, group) for case, group in series(results).items()}
    every = [r for r in results if r["kind"] == "quality" and any(row.get("psnr") for row in r["rows"])]
    return {**growths, **{slug(f"distribution {title(r)}"): distribution(r) for r in every}, **fronts(results)}
