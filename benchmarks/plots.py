"""Plots of the results as SVG text: quality against speed, its distribution, and speed against the tokens."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from typing import Any

import matplotlib as mpl
from methods import METHODS
from tables import ABOVE, ERROR, speedups, title

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

Result = dict[str, Any]
METRICS = {"PSNR, dB": 1, "PSNR p5": 1, "FD-EffNetLite0": -1, "FID": -1}  # 1 where more is better
# one figure is of at least so many methods, or sizes
LEAST_POINTS, LEAST_SIZES = 4, 3
mpl.rcParams["svg.hashsalt"] = "agentsd"  # equal figures are equal files


def svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.S)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def colour(method: str) -> str:
    if "agentsd" not in method:
        return "tab:blue"
    return "tab:purple" if "DeepCache" in method else "tab:red"


def pareto(points: list[tuple[float, float, str]], sign: int) -> list[tuple[float, float, str]]:
    """Those that no other point passes in both, by speed; ``sign`` is 1 where more of the second is better."""
    beaten = lambda p: any(q[0] >= p[0] and sign * q[1] >= sign * p[1] and q[:2] != p[:2] for q in points)
    return sorted(point for point in points if not beaten(point))


def front_points(latency: Result, quality: Result, metric: str) -> list[tuple[float, float, str]]:
    """Speed-up in the steps of the quality, that quality, and name of every method that has both."""
    speed = speedups(latency, quality["settings"]["steps"])
    rows = [row for row in quality["rows"] if row["method"] in METHODS and metric in row["metrics"]]
    return [(speed[row["method"]], row["metrics"][metric], row["method"]) for row in rows if row["method"] in speed]


def front(latency: Result, quality: Result, metric: str) -> str:
    """Quality against speed, one point per method with its standard error, the Pareto front drawn.

    A distance's is that of its difference to the unpatched one's, since both see the same prompts and seeds.
    """
    points = front_points(latency, quality, metric)
    best = pareto(points, METRICS[metric])
    keys = (metric + ERROR, metric + ABOVE + ERROR)
    errors = {row["method"]: [row["metrics"][key] for key in keys if key in row["metrics"]] for row in quality["rows"]}
    figure, axes = plt.subplots(figsize=(9, 5.5))
    axes.plot(*zip(*[point[:2] for point in best], strict=True), color="lightgray", zorder=0)
    for x, y, name in points:
        axes.errorbar(x, y, errors[name] or None, fmt="o", color=colour(name), elinewidth=0.8)
        axes.annotate(name, (x, y), fontsize=7, xytext=(5, 3), textcoords="offset points")
    steps = quality["settings"]["steps"]
    axes.set(xlabel=f"speed-up, {steps} steps: {title(latency)}", ylabel=f"{metric}: {title(quality)}")
    axes.yaxis.label.set_size(7)
    axes.margins(x=0.15)
    if any(errors.values()):
        of_what = "" if metric + ERROR in quality["rows"][-1]["metrics"] else " of the difference to unpatched"
        axes.set_title(f"bars: standard error{of_what}", fontsize=8)
    return svg(figure)


def fronts(results: list[Result]) -> dict[str, str]:
    """By name, a front for every quality result, model, size and metric that share enough methods."""
    found = {}
    for quality in (r for r in results if r["kind"] == "quality"):
        for latency in (r for r in results if r["kind"] == "latency" and not r["settings"]["ratios"]):
            for metric in METRICS:
                patched = [name for *_, name in front_points(latency, quality, metric) if name != "unpatched"]
                if len(patched) >= LEAST_POINTS:
                    steps = quality["settings"]["steps"]
                    found[slug(f"front {title(latency)} {steps} steps {metric}")] = front(latency, quality, metric)
    return found


def distribution(quality: Result) -> str:
    """Every image's PSNR, by method from the worst to the best: what a mean hides is at the left."""
    figure, axes = plt.subplots(figsize=(9, 5.5))
    for row in (row for row in quality["rows"] if row.get("psnr")):
        psnrs = sorted(row["psnr"])
        share = [100 * (i + 0.5) / len(psnrs) for i in range(len(psnrs))]
        axes.plot(share, psnrs, label=row["method"], linewidth=1)
    axes.set(xscale="log", xlabel="share of the images, %: the worst at the left", ylabel="PSNR to unpatched, dB")
    axes.set_title(title(quality), fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
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
    figure, (seconds, gain) = plt.subplots(1, 2, figsize=(12, 4.8))
    methods: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for result in group:
        tokens = (result["settings"]["size"] // 8) ** 2
        for row in result["rows"]:
            methods[row["method"]].append((tokens, row["seconds"], row["speedup"]))
    for name, points in methods.items():
        if len(points) >= LEAST_SIZES:
            tokens, times, ratios = zip(*points, strict=True)
            seconds.plot(tokens, times, "o-", markersize=3, label=name)
            gain.plot(tokens, ratios, "o-", markersize=3, label=name)
    for axes in (seconds, gain):
        axes.set(xscale="log", xlabel="tokens of the latents")
        axes.grid(alpha=0.3)
    seconds.set(yscale="log", ylabel=f"{group[0]['settings']['steps']} steps, s")
    gain.set(ylabel="speed-up")
    gain.axhline(1, color="gray", linewidth=0.8)
    gain.legend(fontsize=7)
    figure.suptitle(case, fontsize=9)
    return svg(figure)


def plots(results: list[Result]) -> dict[str, str]:
    """Every plot, by name."""
    growths = {slug(f"growth {case}"): growth(case, group) for case, group in series(results).items()}
    every = [r for r in results if r["kind"] == "quality" and any(row.get("psnr") for row in r["rows"])]
    return {**growths, **{slug(f"distribution {title(r)}"): distribution(r) for r in every}, **fronts(results)}
