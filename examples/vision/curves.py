"""How trainings went, in curves and a table: python examples/vision/curves.py runs/classify-* --output curves.png"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib import pyplot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that train.py has written to")
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    args = parser.parse_args()
    histories = [json.loads((run / "history.json").read_text()) for run in args.runs]
    tasks = list(dict.fromkeys(history["task"] for history in histories))
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(4 * len(tasks), 3), squeeze=False, layout="constrained")
    print("| task | attention | parameters | steps of batch | seconds | |\n|---|---|---:|---:|---:|---|")
    for task, axis in zip(tasks, axes[0], strict=True):
        for history in (history for history in histories if history["task"] == task):
            evaluations, attention = history["evaluations"], history["attention"]
            figures = {name: value for name, value in evaluations[-1].items() if name not in ("step", "seconds")}
            first = next(iter(figures))
            axis.plot([e["step"] for e in evaluations], [e[first] for e in evaluations], marker=".", label=attention)
            axis.set(title=task, xlabel="step", ylabel=f"{first}, held-out emoji")
            told = ", ".join(f"{name} {value:.1%}" for name, value in figures.items())
            print(
                f"| {task} | {attention} | {history['parameters']:,} | {history['step']:,} of {history['batch']} "
                f"| {history['seconds']:,.0f} ({history['device']}) | {told} |"
            )
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(args.output, dpi=80)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
