"""How much less is there to compute, and to hold in memory? Both counted, of a denoiser call that computes nothing.

Exact, the same on every machine, and at any size: what a method saves where arithmetic is all that costs. What it
saves in seconds, `latency.py` measures. The memory is that of the tensors of a call, with the features that are kept
for later ones, and without the weights.

    python benchmarks/operations.py --model sd15 --size 256 512 1024 2048
    python benchmarks/operations.py --model sdxl --size 1024
"""

from __future__ import annotations

import argparse
from pathlib import Path

from architectures import ARCHITECTURES
from card import card, errors_in_one_line, write_json
from counting import counted
from latency import RESULTS
from methods import chosen
from tables import operations_rows, print_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", help=f"{', '.join(ARCHITECTURES)}, a model id or a folder")
    parser.add_argument("--size", type=int, nargs="+", default=[512], help="pixels of a side (default: 512)")
    parser.add_argument("--steps", type=int, default=50, help="of the schedule (default: 50)")
    parser.add_argument("--methods", nargs="+", help="names as in methods.py (default: all)")
    args = parser.parse_args()
    for name, values in (("size", args.size), ("steps", [args.steps])):
        if min(values) < 1:
            parser.error(f"--{name} {min(values)}: give 1 or more")
    with errors_in_one_line():
        methods = chosen(args.methods, [])
        for size in args.size:
            settings = {**vars(args), "size": size, "batch": 1, "dtype": "float32", "device": "meta", "compile": False}
            found = counted(argparse.Namespace(**settings), methods)
            rows = [{"method": name, "ratio": methods[name].ratio, **counts} for name, counts in found.items()]
            result = {"kind": "operations", **card("meta"), "settings": settings, "rows": rows}
            out = RESULTS / f"operations-{Path(args.model).name}-{size}.json"
            write_json(out, result)
            print_table(result, operations_rows(result))
            print(f"-> {out}")


if __name__ == "__main__":
    main()
