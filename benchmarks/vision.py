"""Throughput and peak memory of the vision models, in turn with timm's softmax twins.

python benchmarks/vision.py throughput --sizes 224 384 512 1024 --dtypes float32 bfloat16
python benchmarks/vision.py linear                       # time and memory of one module up to 65,536 tokens
python benchmarks/vision.py imagenet --model agent_pvt_tiny --checkpoint agent_pvt_t.pth --data imagenet/val
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from card import card, write_json
from torch import Tensor, nn

import agentsd.vision  # registers the models

# each family beside timm's: full attention over all tokens, reduced keys and values, windows
TWINS = {
    "deit_tiny": ("agent_deit_tiny", "deit_tiny_patch16_224"),
    "pvt_tiny": ("agent_pvt_tiny", "pvt_v2_b1"),
    "pvt_tiny, full attention": ("agent_pvt_tiny", "agent_pvt_tiny"),
    "swin_tiny": ("agent_swin_tiny", "swin_tiny_patch4_window7_224"),
}
FULL = {"attn_type": "BBBB", "sr_ratios": (1, 1, 1, 1)}  # Agent-PVT itself, with softmax over all tokens


def build(pair: str, twin: bool, size: int) -> nn.Module:
    name = TWINS[pair][twin]
    options: dict[str, Any] = {} if name.startswith("pvt_v2") else {"img_size": size}
    if twin and name.startswith("agent"):
        options |= FULL
    return timm.create_model(name, **options).eval()


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def seconds(call: Callable[[], Any], args: argparse.Namespace) -> float:
    """Median of as many calls as take `--least` seconds, two at the least, after one that is not counted."""
    clock, times = CLOCKS[args.clock], list[float]()
    while len(times) < 3 or sum(times[1:]) < args.least:
        start = clock()
        call()
        if args.device != "cpu":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return statistics.median(times[1:])


def peak_mb(call: Callable[[], Any], device: str) -> float | None:
    """The most that CUDA's allocator held. A CPU's is the process's own, told by `linear`."""
    if device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 2**20


@torch.inference_mode()
def throughput(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for size in args.sizes:
        for dtype in args.dtypes:
            for pair in args.pairs or TWINS:
                batch = max(1, args.batch * 224**2 // size**2)
                images = torch.randn(batch, 3, size, size, device=args.device, dtype=getattr(torch, dtype))
                row: dict[str, Any] = {"pair": pair, "size": size, "dtype": dtype, "batch": batch}
                for which in ("agent", "twin") * args.rounds:
                    model = build(pair, which == "twin", size).to(images)
                    try:
                        row.setdefault(which, []).append(
                            batch / seconds(lambda: model(images), args)  # noqa: B023
                        )
                        row[f"{which} MB"] = peak_mb(lambda: model(images), args.device)  # noqa: B023
                    except torch.OutOfMemoryError:
                        row[which] = [0.0]
                row |= {which: round(max(row[which]), 2) for which in ("agent", "twin")}
                row["ratio"] = round(row["agent"] / row["twin"], 2) if row["twin"] else None
                print(json.dumps(row), flush=True)
                rows.append(row)
    return rows


def one_length(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds and memory of one module at one length, in a process of its own so that its peak is its own."""
    from timm.layers import Attention  # noqa: PLC0415

    side = round(args.tokens**0.5)
    module: nn.Module
    if args.attention[0] == "agent":
        module = agentsd.vision.AgentAttention(192, 3, (side, side))
    else:
        module = Attention(192, 3, qkv_bias=True)
    module = module.eval().to(args.device)
    x = torch.randn(1, side * side, 192, device=args.device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.inference_mode():
        run: Callable[[], Tensor] = lambda: module(x)
        peak = peak_mb(run, args.device)
        taken = seconds(run, args)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return [
        {
            "attention": args.attention[0],
            "tokens": side * side,
            "seconds": round(taken, 5),
            "MB": round(grown if peak is None else peak, 1),
        }
    ]


def linear(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for attention in args.attention:
        for tokens in args.lengths:
            command = [sys.executable, __file__, "one", "--attention", attention, "--tokens", str(tokens)]
            command += ["--device", args.device, "--least", str(args.least), "--clock", args.clock]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)
    return rows


@torch.inference_mode()
def imagenet(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy of a checkpoint on a folder of classes' folders, in the authors' evaluation."""
    model = timm.create_model(args.model, checkpoint_path=args.checkpoint or "", img_size=args.sizes[0])
    model = model.eval().to(args.device)
    config = timm.data.resolve_data_config({"img_size": args.sizes[0]}, model=model)
    loader = torch.utils.data.DataLoader(
        timm.data.create_dataset("folder", str(args.data), transform=timm.data.create_transform(**config)),
        args.batch,
        num_workers=args.workers,
    )
    first = fifth = images = 0
    for batch, target in loader:
        ranked = model(batch.to(args.device)).topk(5).indices.cpu() == target[:, None]
        first, fifth, images = first + int(ranked[:, 0].sum()), fifth + int(ranked.sum()), images + len(target)
    return [{"model": args.model, "images": images, "top-1": first / images, "top-5": fifth / images}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("throughput", "linear", "one", "imagenet"))
    parser.add_argument("--pairs", nargs="+", choices=TWINS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 384, 512, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch", type=int, default=8, help="images at 224 pixels; fewer where they are larger")
    parser.add_argument("--rounds", type=int, default=2, help="times that both models are timed, in turn")
    parser.add_argument("--least", type=float, default=1.0, help="seconds that each is timed for, at the least")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="seconds of the wall's clock, or the processor's: those of all threads together, whoever else is at work",
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 16384, 65536])
    parser.add_argument("--attention", nargs="+", choices=("agent", "softmax"), default=["agent", "softmax"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--model", default="agent_pvt_tiny")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file for the rows and what they were measured on")
    args = parser.parse_args()
    rows = {"throughput": throughput, "linear": linear, "one": one_length, "imagenet": imagenet}[args.what](args)
    if args.what in ("one", "imagenet"):
        print(json.dumps(rows[0]))
    if args.output:
        about = {**card(args.device), "clock": args.clock, "timm": timm.__version__}
        write_json(args.output, {**about, "rows": rows})


if __name__ == "__main__":
    main()
