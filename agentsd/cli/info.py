"""Say what this machine has, and what will be fast on it.

Examples:

    agentsd info
    agentsd info --json | jq .devices
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import agentsd
from agentsd.cli import bench, options, pipelines
from agentsd.cli.options import CommandError

PACKAGES = ("torch", "diffusers", "transformers", "accelerate")
PEERS = ("tomesd", "DeepCache")


def add_parser(commands: Any) -> None:
    options.add_json(options.add(commands, "info", run, __doc__))


def run(args: argparse.Namespace) -> None:
    versions = {name: _version(name) for name in (*PACKAGES, *PEERS)}
    versions = {"agentsd": agentsd.__version__, "Python": platform.python_version(), **versions}
    found, said, demo, benchmarks = devices(), advice(), _demo(), _benchmarks()
    if args.json:
        told = {"versions": versions, "devices": found, "advice": said, "demo_model": demo, "benchmarks": benchmarks}
        print(json.dumps(told))
        return
    print(", ".join(f"{name} {value}" for name, value in versions.items() if value))
    print(*(f"{name}: {has}" for name, has in found.items()), sep="\n")
    print(f"demo model: {demo or 'not here: it comes with the repository'}")
    print(f"benchmarks: {benchmarks or 'not here: they come with the repository'}")
    print(*said, sep="\n")


def devices() -> dict[str, str]:
    """The accelerators that PyTorch sees, and the CPU."""
    found = {}
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{card.name}, {card.total_memory / 2**30:.0f} GB, capability {card.major}.{card.minor}"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple's GPU"
    half = "bfloat16 in hardware" if pipelines.has_fast_bfloat16() else "bfloat16 is emulated"
    instructions = torch.backends.cpu.get_cpu_capability()
    return found | {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {instructions}, {half}"}


def advice() -> list[str]:
    """What the measurements of the documentation say of such a machine (docs/measured.md)."""
    if torch.cuda.is_available():
        dtype, more = "float16 on the GPU", ["add cuda_graphs=True: twice as fast again at 512 pixels on an H200"]
    elif torch.backends.mps.is_available():
        dtype, more = "float16 on Apple's GPU", ["nobody has measured an Apple GPU yet: try agentsd compare"]
    else:
        dtype, more = "--dtype bfloat16" if pipelines.has_fast_bfloat16() else "float32", []
    return [f"advice: {dtype}, 20 steps or more, preset balanced", *more]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _demo() -> str | None:
    try:
        return str(pipelines.demo_model())
    except CommandError:
        return None


def _benchmarks() -> str | None:
    return str(bench.FOLDER) if bench.FOLDER.is_dir() else None
