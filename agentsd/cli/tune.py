"""Find settings for a model on this machine, and write them where --preset FILE reads them.

Examples:

    agentsd tune
    agentsd tune --target 2x --steps 50 --out mine.json
    agentsd tune --model stable-diffusion-v1-5/stable-diffusion-v1-5 --target "35 dB" --prompts prompts.txt
    agentsd generate --preset mine.json --prompt "a red fox in the snow"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import agentsd
from agentsd.cli import compare, options, pipelines
from agentsd.cli.options import CommandError
from agentsd.tuning import PROMPTS


def add_parser(commands: Any) -> None:
    parser = options.add(commands, "tune", run, __doc__)
    target = "a speed-up (2x) or the fidelity of the worst image (35 dB); default: as faithful as half the steps"
    parser.add_argument("--target", help=target)
    options.add_prompts(parser, required=False)
    parser.add_argument("--seconds", type=options.at_least(1), default=60, help="about how long (default: 60)")
    parser.add_argument("--out", type=Path, default=Path("agentsd.json"), help="file (default: agentsd.json)")
    options.add_json(parser)
    options.add_image(parser)
    options.add_model(parser)


def run(args: argparse.Namespace) -> None:
    prompts = options.prompts_of(args) or (compare.PROMPTS if args.model == "demo" else PROMPTS)
    options.require_folder(args.out)
    if args.out.suffix != ".json":
        raise CommandError(f"--out {args.out}: give a name in .json, as --preset wants it")
    pipe = pipelines.load(args)
    how = {"seconds": args.seconds, "seed": args.seed, **pipelines.call(args)}
    try:
        found = agentsd.tune(pipe, args.target, prompts=prompts, **how)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from None
    if found.settings is not None:
        with options.writing(args.out):
            found.save(args.out)
    saved = str(args.out) if found.settings is not None else None
    print(json.dumps(found.to_dict() | {"file": saved}) if args.json else found)
    if saved and not args.json:
        print(f"-> {saved}")
