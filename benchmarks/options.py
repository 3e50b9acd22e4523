"""Options of a command as a dataclass, each declared once, and errors that say in one line what to put right."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import field, fields
from typing import Any, TypeVar

from agentsd.cli.options import at_least

T = TypeVar("T")


def option(default: Any, text: str, **how: Any) -> Any:
    """A field of the dataclass; ``how`` are arguments of `argparse`, whose ``type`` is that of the default.

    Where the default is an integer above 0, so must be what is given.
    """
    if isinstance(default, bool):
        how["action"] = argparse.BooleanOptionalAction
    elif isinstance(default, int) and default > 0:
        how["type"] = at_least(1)
    elif default is not None and not isinstance(default, list):
        how.setdefault("type", type(default))
    shown = "" if default is None or isinstance(default, list) else f" (default: {default})"
    return field(default_factory=lambda: copy(default), metadata={"help": text + shown, **how})


def parsed(options: type[T], text: str) -> T:
    """From the command line. What the dataclass raises as ValueError is an error of the command."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for one in fields(options):  # type: ignore[arg-type]
        parser.add_argument(f"--{one.name}", default=one.default_factory(), **one.metadata)
    try:
        return options(**vars(parser.parse_args()))
    except ValueError as error:
        parser.error(str(error))


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What a user can put right is said in one line, with exit code 2."""
    try:
        yield
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
