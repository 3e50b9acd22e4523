"""The options that several commands take, and what they mean as arguments of `agentsd.apply_patch`."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import agentsd
from agentsd.idle import idle

UNPATCHED, PAPER = "none", "paper"  # beside the presets


class CommandError(Exception):
    """What the user can mend: it is said in one line, and the exit code is 2."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def add(commands: Any, name: str, run: Callable[..., Any], doc: str | None) -> argparse.ArgumentParser:
    """The parser of a command: the first line of its module's ``doc`` is its help, the rest the examples."""
    head, _, examples = (doc or "").partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=head, description=head, epilog=examples, formatter_class=form
    )
    parser.set_defaults(run=run)
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="demo", help="id, folder, or demo (default), which the repository has")
    group.add_argument("--device", help="cuda, mps, cpu (default: the best there is)")
    dtypes = ("float16", "bfloat16", "float32")
    group.add_argument("--dtype", choices=dtypes, help="default: float16, on a CPU float32")
    group.add_argument("--offload", action="store_true", help="keep the parts of the model on the CPU until they run")


def add_patch(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("patch")
    names = ", ".join((*agentsd.PRESETS, PAPER, UNPATCHED))
    group.add_argument(
        "--preset", default="balanced", help=f"{names}, or a file of `agentsd tune` (default: balanced)"
    )
    example = "settings beside it, as cache_interval=4"
    group.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=example)


def require_folder(path: Path) -> None:
    """Before anything is drawn, that there is a folder for what is to be written, and that it may be.

    Raises:
        CommandError: it may not.
    """
    if not path.parent.is_dir():
        raise CommandError(f"--out {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise CommandError(f"--out {path}: it is a folder; give a name in it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CommandError(f"--out {path}: permission denied")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What cannot be written is what the user can mend."""
    try:
        yield
    except OSError as error:
        raise CommandError(f"--out {path}: {error.strerror or error}") from None


def add_image(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("image")
    group.add_argument("--steps", type=at_least(1), default=25, help="denoising steps (default: 25)")
    group.add_argument("--guidance", type=finite, help="guidance scale (default: the pipeline's own)")
    group.add_argument("--negative-prompt", help="what is not to be seen")
    group.add_argument("--height", type=at_least(8), help="pixels (default: the model's own)")
    group.add_argument("--width", type=at_least(8), help="pixels (default: the model's own)")
    group.add_argument(
        "--seed", type=at_least(0, 2**63 - 1), default=0, help="of the first image; the next has the next (default: 0)"
    )


def add_prompts(parser: argparse.ArgumentParser, *, required: bool) -> None:
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument("--prompt", nargs="+", action="extend", help="one or more prompts")
    source.add_argument("--prompts", type=Path, metavar="FILE", help="text file, a prompt in each line")


def prompts_of(args: argparse.Namespace) -> list[str] | None:
    """What was given, by either way.

    Raises:
        CommandError: the file cannot be read, or has none.
    """
    if args.prompts is None:
        return args.prompt  # type: ignore[no-any-return]
    try:
        lines = args.prompts.read_text(encoding="utf-8-sig").splitlines()  # some editors begin with a mark
    except (OSError, ValueError) as error:
        raise CommandError(f"--prompts {args.prompts}: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise CommandError(f"--prompts {args.prompts}: it has no prompt; write one in each line")
    return prompts


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")


def at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    def whole(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or (most is not None and number > most):
            limits = f"{least} or more" if most is None else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed: expected a whole number, {limits}")
        return number

    return whole


def finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: expected a number")
    return number


def patch_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """The keyword arguments of `agentsd.apply_patch`, tried before a model is loaded; None is no patch at all.

    Raises:
        CommandError: there is no such preset, file or setting, or a value is out of range.
    """
    name, given = args.preset, dict(map(_assignment, args.set))
    if name == UNPATCHED:
        if given:
            raise CommandError(f"--set {args.set[0]}: there is no patch with --preset {UNPATCHED}")
        return None
    settings: dict[str, Any] = {}
    if name.endswith(".json"):  # as `agentsd.tune` saves them
        try:
            agentsd.Settings.of(Path(name), {})
            settings |= json.loads(Path(name).read_text())["settings"]
        except (OSError, TypeError, ValueError) as error:
            raise CommandError(f"--preset {name}: {error}") from None
    elif name != PAPER:
        if name not in agentsd.PRESETS:
            allowed = ", ".join((*agentsd.PRESETS, PAPER, UNPATCHED))
            raise CommandError(f"--preset {name}: expected one of {allowed}, or a file of `agentsd tune`")
        settings["preset"] = name
    try:
        return seeded(settings | given, args.seed if "seed" in args else None)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from None


def seeded(settings: dict[str, Any], seed: int | None) -> dict[str, Any]:
    """Arguments of `agentsd.apply_patch`, tried, with a seed for its random draws if it makes any.

    Raises:
        TypeError, ValueError: as `agentsd.apply_patch`.
    """
    both = settings if seed is None else {"seed": seed, **settings}
    chosen = agentsd.Settings.of(both.get("preset"), {k: v for k, v in both.items() if k != "preset"})
    return settings if idle(chosen, both.keys() & {"seed"}) else both


def _assignment(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise CommandError(f"--set {text}: expected NAME=VALUE, as cache_interval=4")
    try:
        return name, json.loads(value.replace("True", "true").replace("False", "false").replace("None", "null"))
    except ValueError:
        return name, value
