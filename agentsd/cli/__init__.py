"""The command line: `agentsd`, or `python -m agentsd`. Each command is a module, which adds its parser and runs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import agentsd
from agentsd.cli import app, bench, compare, generate, info, report, tune
from agentsd.cli.options import CommandError, Parser

COMMANDS = (generate, compare, tune, app, report, info, bench)
STOPPED = 130  # the exit code of a program that was interrupted


def parser() -> Parser:
    root = Parser(prog="agentsd", description="Stable Diffusion in diffusers, faster.")
    root.add_argument("--version", action="version", version=f"agentsd {agentsd.__version__}")
    commands = root.add_subparsers(metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add_parser(commands)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 2 for what the user can mend, said in one line, 130 if stopped."""
    args = parser().parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except CommandError as error:
        print(f"agentsd: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("agentsd: stopped", file=sys.stderr)
        return STOPPED
