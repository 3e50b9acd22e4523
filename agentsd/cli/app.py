"""Open a page to compare in: a slider between the images without and with the patch, and settings for this machine.

It listens on this computer alone, unless --host or --share says otherwise.

Examples:

    agentsd app
    agentsd app --model stable-diffusion-v1-5/stable-diffusion-v1-5 --steps 50 --port 8000
    agentsd app --model path/to/folder --height 768 --width 768
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import Any

from agentsd.cli import compare, options, pipelines
from agentsd.cli.options import CommandError
from agentsd.tuning import PROMPTS


def add_parser(commands: Any) -> None:
    parser = options.add(commands, "app", run, __doc__)
    parser.add_argument("--prompt", help="that the page begins with")
    parser.add_argument("--seconds", type=options.at_least(1), default=60, help="to tune for, about (default: 60)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this computer alone)")
    parser.add_argument("--port", type=options.at_least(1, 65535), help="default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="a public link through Gradio's servers")
    options.add_image(parser)
    options.add_model(parser)


def run(args: argparse.Namespace) -> None:
    if find_spec("gradio") is None:
        raise CommandError('app: it needs Gradio, which is an extra: pip install "agentsd[app]"')
    from agentsd.cli import page  # noqa: PLC0415  (Gradio takes seconds to import, and the other commands none of it)

    pipe = pipelines.load(args)
    pipe.set_progress_bar_config(disable=True)
    prompt = args.prompt or (compare.PROMPTS if args.model == "demo" else PROMPTS)[0]
    blocks = page.page(pipe, prompt, args.seed, pipelines.call(args), args.seconds)
    try:
        blocks.launch(server_name=args.host, server_port=args.port, share=args.share, footer_links=[])
    except OSError as error:
        raise CommandError(f"app on {args.host}, port {args.port or 'any'}: {error}") from None
