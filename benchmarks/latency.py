"""How much faster? Seconds a denoiser call of every method, in turn, on the real architectures.

Random weights by default: the speed is that of trained ones, and nothing is downloaded. A method's calls may cost
differently early and late in the trajectory, and with feature reuse whole or cheap, so one call of each kind is timed
in each round, and the schedule of ``--steps`` steps is put together from them. Ratios are taken within a round.
Methods that differ only in how often a call is whole share the calls of a round. What is unpatched is timed at the
beginning of a round and at its end.

    python benchmarks/latency.py --model sd15 --dtype bfloat16 --size 512
    python benchmarks/latency.py --model sdxl --dtype bfloat16 --size 1024 --methods "agentsd fast" --rounds 2
    python benchmarks/latency.py --model examples/demo_model --pipeline --dtype float32 --size 128

With ``--pipeline`` it is seconds an image of the whole pipeline: text encoder, every denoiser call, autoencoder.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES, flops
from card import card, errors_in_one_line, write_json
from counting import counted
from methods import Method, chosen
from rich.progress import Progress
from tables import latency_rows, print_table, profile_rows
from timing import DTYPES, Denoiser, Timed, WholePipeline

STEPS = 50
RESULTS = Path(__file__).parent.parent / "runs" / "results"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", help=f"{', '.join(ARCHITECTURES)}, a model id or a folder")
    parser.add_argument("--size", type=int, nargs="+", default=[512], help="pixels of a side (default: 512)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=2, help="samples a call; guidance makes two of one image")
    steps_help = "of the schedule that is put together (default: %(default)s)"
    parser.add_argument("--steps", type=int, default=STEPS, help=steps_help)
    parser.add_argument("--rounds", type=int, default=3, help="that count (default: 3)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them (default: 1)")
    parser.add_argument("--methods", nargs="+", help="names as in methods.py (default: all)")
    parser.add_argument("--ratios", nargs="+", type=float, default=[], help="agentsd and tomesd at these, too")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet for every method")
    parser.add_argument("--profile", action="store_true", help="where a call's time goes, by kind of layer")
    parser.add_argument("--pipeline", action="store_true", help="time whole images of a model that is no architecture")
    parser.add_argument("--out", type=Path, help="JSON file (default: runs/results/latency-...json)")
    args = parser.parse_args()
    for name in ("batch", "steps", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: give 1 or more")
    if args.warmup < 0:
        parser.error(f"--warmup {args.warmup}: give 0 or more")
    for size in args.size:
        if size < 64 or size % 64:
            parser.error(f"--size {size}: give a multiple of 64 pixels")
    if args.out and len(args.size) > 1:
        parser.error(f"--out {args.out}: each of {len(args.size)} sizes has a file of its own; leave it out")
    if args.pipeline and (args.model in ARCHITECTURES or args.profile):
        parser.error("--pipeline: give --model an id or a folder, and leave out --profile, which is of UNet calls")
    if args.profile and (args.compile or args.device != "cpu"):
        parser.error("--profile: leave out --compile, and give --device cpu: it times layers one by one as they run")
    return args


def out_of(args: argparse.Namespace) -> Path:
    unusual = ((args.device, "cpu"), (f"batch-{args.batch}", "batch-2"), (f"{args.steps}-steps", f"{STEPS}-steps"))
    suffix = "".join(f"-{value}" for value, usual in unusual if value != usual)
    suffix += "-compiled" * args.compile + "-pipeline" * args.pipeline
    name = f"latency-{Path(args.model).name}-{args.size}-{args.dtype}{suffix}.json"
    return args.out or RESULTS / name


def mean(first: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    """A round's baseline, timed before and after all methods: a machine that slows down or speeds up favours none."""
    calls = {kind: (seconds + last["calls"][kind]) / 2 for kind, seconds in first["calls"].items()}
    schedule = (first["schedule"] + last["schedule"]) / 2
    return {"calls": calls, "schedule": schedule, "peak_mb": highest(first, last)}


def highest(*rounds: dict[str, Any]) -> float | None:
    """The peak memory of all of them; None where it is not measured."""
    return max((found["peak_mb"] for found in rounds if found["peak_mb"] is not None), default=None)


def summary(name: str, method: Method, rounds: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [b["schedule"] / r["schedule"] for r, b in zip(rounds, base, strict=True)]
    return {
        "method": name,
        "ratio": method.ratio,
        "calls": {kind: statistics.median(r["calls"][kind] for r in rounds) for kind in rounds[0]["calls"]},
        "schedule": statistics.median(r["schedule"] for r in rounds),
        "speedup": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "peak_mb": highest(*rounds),
        "rounds": rounds,
    }


def measure(args: argparse.Namespace, methods: dict[str, Method]) -> dict[str, Any]:
    bench = WholePipeline(args) if args.pipeline else Denoiser(args)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    with Progress(transient=True) as progress:
        count = args.warmup + args.rounds
        task = progress.add_task(f"{args.size} px, interleaved rounds", total=count * (len(methods) + 1))
        for _ in range(count):
            timed: Timed = {}
            for name, method in methods.items():
                rounds[name].append(bench.round(method, timed))
                progress.advance(task)
            base = rounds["unpatched"]
            base[-1] = mean(base[-1], bench.round(methods["unpatched"], {}))
            progress.advance(task)
    measured = {name: kept[args.warmup :] for name, kept in rounds.items()}
    result: dict[str, Any] = {
        "kind": "latency",
        **card(args.device),
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "flops": flops(bench.unet, args.batch, args.size),
        "rows": [summary(name, method, measured[name], measured["unpatched"]) for name, method in methods.items()],
    }
    if not args.pipeline:
        operations = counted(args, methods)
        for row in result["rows"]:
            row["operations"] = operations[row["method"]]
    if args.profile:
        result["profile"] = {name: bench.profile(method) for name, method in methods.items()}
    return result


def main() -> None:
    args = parse_args()
    if (args.device, args.dtype) == ("cpu", "bfloat16") and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        slow = "note: this CPU has no instructions for bfloat16, and a call may take an hour: give --dtype float32"
        print(slow, file=sys.stderr)
    with errors_in_one_line():
        methods = chosen(args.methods, args.ratios)
        for size in args.size:
            one = argparse.Namespace(**{**vars(args), "size": size})
            result, out = measure(one, methods), out_of(one)
            write_json(out, result)
            print_table(result, latency_rows(result))
            if "profile" in result:
                print_table(result, profile_rows(result))
            print(f"-> {out}")


if __name__ == "__main__":
    main()
