"""Put the README's table in, rendered from the results: `python benchmarks/readme.py`. A test checks that it was."""

from __future__ import annotations

import json
from pathlib import Path

from tables import latency_rows, markdown, title

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "benchmarks" / "results" / "latency-sd15-512-bfloat16.json"
BEGIN, END = "<!-- table: python benchmarks/readme.py -->\n", "<!-- end of table -->"
SHOWN = ("unpatched", "tomesd r=0.4", "agentsd r=0.4 (the paper's schedule)", "DeepCache N=3", "agentsd quality")
SHOWN += ("agentsd balanced", "agentsd fast")


def table() -> str:
    result = json.loads(SOURCE.read_text())
    rows = [row for row in latency_rows(result) if row[0] in ("method", *SHOWN)]
    short = [(row[0], row[-2], row[-1]) for row in rows]
    return f"{title(result)}, random weights, measured here:\n\n{markdown(short)}\n"


def main() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + table() + END + rest.split(END, 1)[1])


if __name__ == "__main__":
    main()
