"""On what a figure was measured."""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

PACKAGES = [
    "agentsd",
    "torch",
    "diffusers",
    "transformers",
    "tomesd",
    "DeepCache",
    "tgate",
    "cache-dit",
    "torch-fidelity",
]


def card(device: str) -> dict[str, Any]:
    """Hardware, software, and the command that was run."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    hardware = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    }
    if device.startswith("cuda"):
        hardware["gpu"] = torch.cuda.get_device_name(device)
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"command": shlex.join(["python", *sys.argv]), "hardware": hardware, "versions": versions}


def write_json(path: Path, data: Any) -> None:
    """Whole or not at all: a reader never sees half a file. A list of numbers is one line, a path is text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.with_suffix(path.suffix + ".part")
    text = json.dumps(data, indent=2, default=str)
    text = re.sub(r"\[\n([-+\d.e,\s]+?)\s*\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    torn.write_text(text + "\n")
    torn.replace(path)
