"""Results as tables: for the terminal, and as Markdown for the README and the results page."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Rows = list[tuple[str, ...]]
ERROR = ", standard error"  # behind the name of a metric, in the JSON; in tables it stands beside the value
ABOVE = " above unpatched"
MODELS = {"sd15": "SD 1.5", "sdxl": "SDXL", "sd3-medium": "SD 3 medium", "sd35-large": "SD 3.5 large"}
MODELS |= {"flux": "Flux", "pixart": "PixArt"}
# of a call on a GPU, in the mean: the host until it has asked for all, and what the profiler counted
COUNTS = {"host_ms": "{:.1f}", "kernels": "{:,.0f}", "copies": "{:.1f}", "waits": "{:.1f}", "device_ms": "{:.1f}"}


def latency_rows(result: dict[str, Any]) -> Rows:
    rows, steps = result["rows"], result["settings"]["steps"]
    several = len({row["mode"] for row in rows}) > 1
    calls = list(dict.fromkeys(kind for row in rows for kind in row["calls"]))
    peak = "gpu" in result["hardware"]
    counts = [name for name in COUNTS if peak and any(name in row for row in rows)]
    counted = all("operations" in row for row in rows)
    heading = ["method", *["mode"] * several, "r %", *(f"{kind} call, s" for kind in calls), *counts]
    heading += ["peak, GB"] * peak + ["FLOPs"] * counted + [f"{steps} steps, s", "speed-up"]
    found: Rows = [tuple(heading)]
    for row in rows:
        cells = [row["method"], *[row["mode"]] * several, percent(row["ratio"])]
        cells += [short(row["calls"][kind]) if kind in row["calls"] else "" for kind in calls]
        cells += [COUNTS[name].format(row[name]) if name in row else "" for name in counts]
        cells += [f"{row['peak_mb'] / 1024:.2f}"] if peak else []
        if counted:
            cells.append(f"{row['operations']['total'] / rows[0]['operations']['total']:.0%}")
        low, high = row["spread"]
        spread = f"{low:.2f}-{high:.2f}" if len(row["rounds"]) > 1 else "one round"
        found.append((*cells, short(row["seconds"]), f"{row['speedup']:.2f}x ({spread})"))
    return found


def operations_rows(result: dict[str, Any]) -> Rows:
    rows = result["rows"]
    calls = list(dict.fromkeys(kind for row in rows for kind in row["calls"]))
    found: Rows = [("method", "r %", *(f"{kind} call, TFLOP" for kind in calls), "of all", "ratio", "peak, MB")]
    for row in rows:
        cells = [f"{row['calls'][kind] / 1e12:.3f}" if kind in row["calls"] else "" for kind in calls]
        share = row["total"] / rows[0]["total"]
        end = (f"{share:.1%}", f"{1 / share:.2f}x", f"{row['peak_mb']:,.0f}")
        found.append((row["method"], percent(row["ratio"]), *cells, *end))
    return found


def quality_rows(result: dict[str, Any]) -> Rows:
    every = reversed(result["rows"])  # the first has the fewest
    names = dict.fromkeys(key for row in every for key in row["metrics"] if not key.endswith(ERROR))
    rows: Rows = [("method", *names)]
    for row in result["rows"]:
        rows.append((row["method"], *(with_error(row["metrics"], name) for name in names)))
    return rows


def exactness_rows(result: dict[str, Any]) -> Rows:
    rows = result["rows"]
    return [tuple(rows[0]), *(tuple(row.values()) for row in rows)]


def profile_rows(result: dict[str, Any]) -> Rows:
    kinds = list(dict.fromkeys(kind for shares in result["profile"].values() for kind in shares if kind != "seconds"))
    rows: Rows = [("method", *kinds)]
    for name, shares in result["profile"].items():
        rows.append((name, *(f"{shares[kind]:.1%}" if kind in shares else "" for kind in kinds)))
    return rows


def rows_of(result: dict[str, Any]) -> Rows:
    kinds = {"latency": latency_rows, "operations": operations_rows, "quality": quality_rows}
    return (kinds | {"exactness": exactness_rows})[result["kind"]](result)


def percent(ratio: float | None) -> str:
    return f"{100 * ratio:.0f}" if ratio else ""


def short(seconds: float) -> str:
    """Seconds that are many without a fraction of use, and few with three digits."""
    return f"{seconds:.1f}" if seconds >= 100 else f"{seconds:.3g}" if seconds < 1 else f"{seconds:.2f}"


def with_error(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return ""
    if name + ERROR in metrics:
        return f"{metrics[name]:.1f} ± {metrics[name + ERROR]:.1f}"
    return f"{metrics[name]:.1f}" if name.startswith("PSNR") else f"{metrics[name]:.4g}"


def speedups(latency: dict[str, Any], steps: int) -> dict[str, float]:
    """By method, in trajectories of ``steps`` steps; none where these were not measured."""
    if str(steps) in latency.get("speedups", {}):  # results of single calls have them for several
        return latency["speedups"][str(steps)]
    rows = latency["rows"] if latency["settings"]["steps"] == steps else []
    return {row["method"]: row["speedup"] for row in rows if row["mode"] == rows[0]["mode"]}


def device(result: dict[str, Any]) -> str:
    hardware = result["hardware"]
    return hardware.get("gpu") or f"{hardware['cores']} cores, {hardware['cpu'].replace('(R)', '')}"


def case(result: dict[str, Any]) -> str:
    model = result["settings"]["model"]
    return f"{MODELS.get(model, model)}, {result['settings']['size']} px"


def kind(result: dict[str, Any]) -> str:
    settings = result["settings"]
    return f"{settings['dtype']}, batch {settings['batch']}, {settings['steps']} steps"


def place(result: dict[str, Any]) -> str:
    """A timing in few words: where, of what, and how."""
    return f"{device(result)}: {case(result)}, {kind(result)}"


def shorter(method: str) -> str:
    return method.replace(" (the paper's schedule)", ", the paper's").replace(" (the limit)", "")


def title(result: dict[str, Any]) -> str:
    settings, hardware = result["settings"], result["hardware"]
    if result["kind"] == "exactness":
        return "Cached calls whose inputs repeat, against full calls"
    where = hardware.get("gpu") or f"{hardware['cores']} cores of {hardware['cpu']} ({hardware['instructions']})"
    if result["kind"] == "operations":
        return f"{settings['model']}, {settings['size']} px, one sample, {settings['steps']} steps, operations"
    if result["kind"] == "latency":
        modes = "".join(f", {mode}" for mode in settings["modes"] if settings["modes"] != ["eager"])
        case = f"{settings['model']}, {settings['size']} px, {settings['dtype']}, batch {settings['batch']}"
        return f"{case}{modes.replace('compile', 'compiled')}, {where}"
    scheduler = f"{settings['scheduler']}, " if settings.get("scheduler") else ""
    return f"{settings['model']}, {settings['images']} images, {scheduler}{settings['steps']} steps, {where}"


def show(rows: Rows, title: str) -> None:
    """On the terminal, as wide as it is; in a file or a pipe, wide enough for all."""
    table = Table(title=title)
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if i else "left", min_width=0 if i else 24, overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def show_result(result: dict[str, Any], path: Path) -> None:
    """It was written to ``path``."""
    for rows in (rows_of(result), *([profile_rows(result)] if "profile" in result else [])):
        show(rows, title(result))
    print(*result.get("notes", []), f"-> {path}", sep="\n")


def markdown(rows: Rows) -> str:
    lines = [" | ".join(row) for row in rows]
    lines.insert(1, "|".join(["---"] + ["---:"] * (len(rows[0]) - 1)))
    return "\n".join(f"| {line} |" if not line.startswith("---") else f"|{line}|" for line in lines)
