"""Results as tables: for the terminal, and as Markdown for the README and the results page."""

from __future__ import annotations

import statistics
import sys
from typing import Any

from methods import METHODS, Calls
from rich.console import Console
from rich.table import Table

Rows = list[tuple[str, ...]]
ERROR = ", standard error"  # behind the name of a metric, in the JSON; in tables it stands beside the value
ABOVE = " above unpatched"


def latency_rows(result: dict[str, Any]) -> Rows:
    steps = result["settings"]["steps"]
    memory = ("peak, GB",) if result["hardware"].get("gpu") else ()
    calls = ("early call, s", "late call, s", "cheap call, s")
    counted = ("FLOPs",) if all("operations" in row for row in result["rows"]) else ()
    rows: Rows = [("method", "r %", *calls, *memory, *counted, f"{steps} steps, s", "speed-up")]
    operations = result["rows"][0]["operations"]["schedule"] if counted else 0
    for row in result["rows"]:
        timed = row["calls"]
        late = timed.get("late whole", timed.get("early whole"))
        cheap = [timed[kind] for kind in ("early cheap", "late cheap") if kind in timed]
        low, high = row["spread"]
        spread = f"{low:.2f}-{high:.2f}" if len(row["rounds"]) > 1 else "one round"
        rows.append(
            (
                row["method"],
                f"{100 * row['ratio']:.0f}" if row["ratio"] else "",
                f"{timed['early whole']:.2f}" if "early whole" in timed else "",
                f"{late:.2f}" if late is not None else "",
                " / ".join(f"{seconds:.2f}" for seconds in cheap),
                *(f"{row['peak_mb'] / 1024:.2f}" for _ in memory),
                *(f"{row['operations']['schedule'] / operations:.0%}" for _ in counted),
                f"{row['schedule']:.1f}",
                f"{row['speedup']:.2f}x ({spread})",
            )
        )
    return rows


def operations_rows(result: dict[str, Any]) -> Rows:
    kinds = ("early whole", "late whole", "early cheap", "late cheap")
    rows: Rows = [("method", "r %", *(f"{kind}, TFLOP" for kind in kinds), "of the schedule", "ratio", "peak, MB")]
    for row in result["rows"]:
        calls = [f"{row['calls'][kind] / 1e12:.3f}" if kind in row["calls"] else "" for kind in kinds]
        share = row["schedule"] / result["rows"][0]["schedule"]
        ratio = f"{100 * row['ratio']:.0f}" if row["ratio"] else ""
        rows.append((row["method"], ratio, *calls, f"{share:.1%}", f"{1 / share:.2f}x", f"{row['peak_mb']:,.0f}"))
    return rows


def quality_rows(result: dict[str, Any]) -> Rows:
    every = reversed(result["rows"])  # the first has the fewest
    names = dict.fromkeys(key for row in every for key in row["metrics"] if not key.endswith(ERROR))
    rows: Rows = [("method", *names)]
    for row in result["rows"]:
        rows.append((row["method"], *(with_error(row["metrics"], name) for name in names)))
    return rows


def with_error(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return ""
    if name + ERROR in metrics:
        return f"{metrics[name]:.1f} ± {metrics[name + ERROR]:.1f}"
    return f"{metrics[name]:.4g}"


def profile_rows(result: dict[str, Any]) -> Rows:
    kinds = list(dict.fromkeys(kind for shares in result["profile"].values() for kind in shares if kind != "seconds"))
    rows: Rows = [("method", *kinds)]
    for name, shares in result["profile"].items():
        rows.append((name, *(f"{shares[kind]:.1%}" if kind in shares else "" for kind in kinds)))
    return rows


def speedup(latency: dict[str, Any], method: str, steps: int) -> float | None:
    """That of a schedule of ``steps`` steps, put together from the calls that were timed: median over the rounds.

    A method that was not timed has the calls of one that was, if they only come more or less often; or else None.
    """
    rounds = {row["method"]: row["rounds"] for row in latency["rows"] if row["method"] in METHODS}
    calls = Calls(METHODS[method], steps)
    alike = (name for name in rounds if Calls(METHODS[name], steps).alike == calls.alike)
    timed = method if method in rounds else next(alike, None)
    if timed is None:
        return None
    seconds, base = calls.schedule, Calls(METHODS["unpatched"], steps).schedule
    pairs = zip(rounds["unpatched"], rounds[timed], strict=True)
    return statistics.median(base(plain["calls"]) / seconds(own["calls"]) for plain, own in pairs)


def title(result: dict[str, Any]) -> str:
    settings, hardware = result["settings"], result["hardware"]
    where = hardware.get("gpu") or f"{hardware['cores']} cores of {hardware['cpu']} ({hardware['instructions']})"
    if result["kind"] == "operations":
        return f"{settings['model']}, {settings['size']} px, one sample, {settings['steps']} steps, operations"
    if result["kind"] == "latency":
        compiled = ", compiled" * settings["compile"] + ", whole pipeline" * settings.get("pipeline", False)
        case = f"{settings['model']}, {settings['size']} px, {settings['dtype']}, batch {settings['batch']}"
        return f"{case}{compiled}, {where}"
    return f"{settings['model']}, {settings['images']} images, {settings['steps']} steps, {where}"


def print_table(result: dict[str, Any], rows: Rows) -> None:
    """On the terminal, as wide as it is; in a file or a pipe, wide enough for all."""
    table = Table(title=title(result))
    for i, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if i else "left", min_width=0 if i else 24, overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def markdown(rows: Rows) -> str:
    lines = [" | ".join(row) for row in rows]
    lines.insert(1, "|".join(["---"] + ["---:"] * (len(rows[0]) - 1)))
    return "\n".join(f"| {line} |" if not line.startswith("---") else f"|{line}|" for line in lines)
