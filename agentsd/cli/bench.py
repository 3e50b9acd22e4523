"""Run a benchmark of the repository; what follows its name goes to it.

Examples:

    agentsd bench latency --help
    agentsd bench latency --model sd15 --size 512
    agentsd bench quality --images 100 --steps 20
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

from agentsd.cli import options, pipelines
from agentsd.cli.options import CommandError

FOLDER = pipelines.REPOSITORY / "benchmarks"


def add_parser(commands: Any) -> None:
    parser = options.add(commands, "bench", run, __doc__)
    parser.add_argument("benchmark", choices=("latency", "quality"))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the benchmark")


def run(args: argparse.Namespace) -> int:
    script = FOLDER / f"{args.benchmark}.py"
    if not script.is_file():
        raise CommandError(
            "bench: the benchmarks come with the repository and not with the installed package; "
            'clone it, and there: pip install -e ".[bench]"'
        )
    return subprocess.run([sys.executable, str(script), *args.arguments], check=False).returncode
