"""An image for each line of a file. Run it again after a stop: an image that is there is not made twice.

python examples/prompt_file.py
python examples/prompt_file.py --prompts my.txt --out my_images --batch 8
"""

import json
from pathlib import Path

import torch
from common import EXAMPLES, arguments, call, load
from diffusers import AutoPipelineForText2Image

import agentsd

parser = arguments(__doc__)
parser.add_argument("--prompts", type=Path, default=EXAMPLES / "prompts.txt", help="text file, a prompt in each line")
parser.add_argument("--batch", type=int, default=4, help="images at a time (default: 4)")
parser.set_defaults(out=Path("images"))
args = parser.parse_args()
if not args.prompts.is_file():
    parser.error(f"--prompts {args.prompts}: there is no such file; give a text file with a prompt in each line")
prompts = [line.strip() for line in args.prompts.read_text().splitlines() if line.strip()]
args.out.mkdir(parents=True, exist_ok=True)
unlike = ("prompts", "prompt", "out", "batch")  # all else makes other images
made = {name: value for name, value in vars(args).items() if name not in unlike} | {"prompts": prompts}
record = args.out / "settings.json"
if record.exists() and json.loads(record.read_text()) != made:
    parser.error(f"--out {args.out}: it holds images of other prompts or settings; give another folder")
record.write_text(json.dumps(made, indent=2))
path_of = lambda i: args.out / f"{i:05d}.png"
lacking = [i for i in range(len(prompts)) if not path_of(i).exists()]
print(f"{len(prompts)} prompts, {len(prompts) - len(lacking)} of them done")

pipe = load(AutoPipelineForText2Image, args)
agentsd.apply_patch(pipe, ratio=args.ratio, seed=args.seed)
for start in range(0, len(lacking), args.batch):
    indices = lacking[start : start + args.batch]
    generators = [torch.Generator().manual_seed(args.seed + i) for i in indices]
    images = pipe(**call(args) | {"prompt": [prompts[i] for i in indices], "generator": generators}).images
    for i, image in zip(indices, images, strict=True):
        part = path_of(i).with_suffix(".part")
        image.save(part, format="PNG")
        part.replace(path_of(i))  # whole or not at all
        print(f"-> {path_of(i)}: {prompts[i]}")
