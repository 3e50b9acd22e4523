"""How much faster? Seconds a denoiser call of every method, in turn, on the real architectures.

Random weights by default: the speed is that of trained ones, and nothing is downloaded. A method's calls may cost
differently early and late in the trajectory, and with feature reuse whole or cheap, so one call of each kind is timed
in each round, and the schedule of ``--steps`` steps is put together from them. Ratios are taken within a round.

    python benchmarks/latency.py --model sd15 --dtype bfloat16 --size 512
    python benchmarks/latency.py --model sdxl --dtype bfloat16 --size 1024 --methods "agentsd fast" --rounds 2
    python benchmarks/latency.py --model examples/demo_model --pipeline --dtype float32 --size 128

With ``--pipeline`` it is seconds an image of the whole pipeline: text encoder, every denoiser call, autoencoder.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from architectures import ARCHITECTURES, flops, load_unet, random_inputs
from card import card, write_json
from diffusers import DiffusionPipeline
from measure import PeakMemory, breakdown
from methods import PHASES, Calls, Method, chosen
from rich.console import Console
from rich.progress import Progress
from tables import latency_table, profile_table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STEPS = 50


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", help=f"{', '.join(ARCHITECTURES)}, a model id or a folder")
    parser.add_argument("--size", type=int, nargs="+", default=[512], help="pixels of a side (default: 512)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=2, help="samples a call; guidance makes two of one image")
    steps_help = "of the schedule that is put together (default: %(default)s)"
    parser.add_argument("--steps", type=int, default=STEPS, help=steps_help)
    parser.add_argument("--rounds", type=int, default=3, help="after one that warms up (default: 3)")
    parser.add_argument("--methods", nargs="+", help="names as in methods.py (default: all)")
    parser.add_argument("--ratios", nargs="+", type=float, default=[], help="agentsd and tomesd at these, too")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet for every method")
    parser.add_argument("--profile", action="store_true", help="where a call's time goes, by kind of layer")
    parser.add_argument("--pipeline", action="store_true", help="time whole images of a model that is no architecture")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/latency-...json)")
    args = parser.parse_args()
    for name in ("batch", "steps", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: give 1 or more")
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
    return args.out or Path(__file__).with_name("results") / name


class Denoiser:
    """Times single UNet calls."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.unet = load_unet(args.model, DTYPES[args.dtype], args.device)
        self.extra = random_inputs(self.unet, args.batch, args.size)
        self.sample, self.text = (self.extra.pop(name) for name in ("sample", "encoder_hidden_states"))
        if args.compile:
            self.unet.compile()
        self.spent = 0.0  # seconds, in all calls
        # methods that follow a pipeline's scheduler find a schedule that holds the calls to be timed
        timesteps = [start - i for start in PHASES.values() for i in range(12)]
        self.scheduler = SimpleNamespace(timesteps=torch.tensor(timesteps), order=1)

    @torch.inference_mode()
    def call(self, timestep: int) -> float:
        start = time.perf_counter()
        output = self.unet(self.sample, torch.tensor(timestep), self.text, **self.extra).sample
        output.float().mean().item()  # reading a value waits for the device
        seconds = time.perf_counter() - start
        self.spent += seconds
        return seconds

    def round(self, method: Method) -> dict[str, Any]:
        calls, seconds = Calls(method, self.args.steps), dict[str, float]()
        with PeakMemory(self.args.device) as memory:
            for phase in PHASES:
                undo = method.apply(self)
                try:
                    if self.args.compile:
                        self.run(phase, calls.of(phase))
                    seconds |= self.run(phase, calls.of(phase))  # of each kind, the last
                finally:
                    undo()
        return {"calls": seconds, "schedule": calls.schedule(seconds), "peak_mb": memory.peak_mb}

    def run(self, phase: str, names: list[str]) -> dict[str, float]:
        return {name: self.call(PHASES[phase] - i) for i, name in enumerate(names)}

    def all_seconds(self, method: Method) -> float:
        """Seconds of all the calls of a round, those that are there for others to follow among them."""
        before = self.spent
        self.round(method)
        return self.spent - before


class WholePipeline:
    """Times whole images; ``batch`` counts those of the denoiser, of which guidance makes two an image."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=DTYPES[args.dtype]).to(args.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.unet = self.pipe.unet
        if args.compile:
            self.unet.compile()

    def round(self, method: Method) -> dict[str, Any]:
        undo = method.apply(self.pipe)
        try:
            if self.args.compile:
                self.image()
            with PeakMemory(self.args.device) as memory:
                start = time.perf_counter()
                self.image()
                seconds = time.perf_counter() - start
        finally:
            undo()
        return {"calls": {}, "schedule": seconds, "peak_mb": memory.peak_mb}

    def image(self) -> None:
        sides = {"height": self.args.size, "width": self.args.size}
        prompts = ["a photograph"] * max(1, self.args.batch // 2)
        self.pipe(prompts, num_inference_steps=self.args.steps, **sides)


def summary(name: str, method: Method, rounds: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [b["schedule"] / r["schedule"] for r, b in zip(rounds, base, strict=True)]
    return {
        "method": name,
        "ratio": method.ratio,
        "calls": {kind: statistics.median(r["calls"][kind] for r in rounds) for kind in rounds[0]["calls"]},
        "schedule": statistics.median(r["schedule"] for r in rounds),
        "speedup": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "peak_mb": max(r["peak_mb"] for r in rounds),
        "rounds": rounds,
    }


def measure(args: argparse.Namespace, methods: dict[str, Method]) -> dict[str, Any]:
    bench = WholePipeline(args) if args.pipeline else Denoiser(args)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    with Progress(transient=True) as progress:
        task = progress.add_task(f"{args.size} px, interleaved rounds", total=(args.rounds + 1) * len(methods))
        for _ in range(args.rounds + 1):
            for name, method in methods.items():
                rounds[name].append(bench.round(method))
                progress.advance(task)
    measured = {name: kept[1:] for name, kept in rounds.items()}  # the first round warms up
    result: dict[str, Any] = {
        "kind": "latency",
        **card(args.device),
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "flops": flops(bench.unet, args.batch, args.size),
        "rows": [summary(name, method, measured[name], measured["unpatched"]) for name, method in methods.items()],
    }
    if args.profile:
        result["profile"] = {
            name: breakdown(lambda m=method: bench.all_seconds(m), bench.unet) for name, method in methods.items()
        }
    return result


def main() -> None:
    args = parse_args()
    if (args.device, args.dtype) == ("cpu", "bfloat16") and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print("note: this CPU has no instructions for bfloat16; --dtype float32 is faster here", file=sys.stderr)
    try:
        methods = chosen(args.methods, args.ratios)
        for size in args.size:
            one = argparse.Namespace(**{**vars(args), "size": size})
            result, out = measure(one, methods), out_of(one)
            write_json(out, result)
            Console().print(latency_table(result))
            if "profile" in result:
                Console().print(profile_table(result))
            print(f"-> {out}")
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
