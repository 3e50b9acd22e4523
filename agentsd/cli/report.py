"""Say what the patch does to each layer of a model.

Examples:

    agentsd report
    agentsd report --model stable-diffusion-v1-5/stable-diffusion-v1-5 --preset paper --height 768 --width 768
    agentsd report --preset fast --set cache_interval=4 --json
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import agentsd
from agentsd.cli import options, pipelines


def add_parser(commands: Any) -> None:
    parser = options.add(commands, "report", run, __doc__)
    parser.add_argument("--height", type=options.at_least(8), help="pixels; one step is drawn to see its tokens")
    parser.add_argument("--width", type=options.at_least(8), help="pixels (default: the model's own size)")
    options.add_json(parser)
    options.add_patch(parser)
    options.add_model(parser)


def run(args: argparse.Namespace) -> None:
    patch = options.patch_of(args)
    pipe = pipelines.load(args)
    pipelines.patch(pipe, patch)
    size = {name: value for name, value in (("height", args.height), ("width", args.width)) if value is not None}
    if size:
        pipe.set_progress_bar_config(disable=True)
        pipelines.draw(pipe, [""], [0], {"num_inference_steps": 1, **size})
    report = agentsd.report(pipe)
    print(json.dumps(report.to_dict()) if args.json else report)
