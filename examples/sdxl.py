"""SDXL. Its self-attention starts at half the latents' resolution, and is found there.

Without ``--model`` it takes a small SDXL with random weights, which draws noise but shows that all works.

    python examples/sdxl.py
    python examples/sdxl.py --model stabilityai/stable-diffusion-xl-base-1.0 --prompt "a red fox" --steps 30
"""

from common import arguments, call, load, save, small_sdxl
from diffusers import StableDiffusionXLPipeline

import agentsd

parser = arguments(__doc__)
parser.set_defaults(model=None)
args = parser.parse_args()
pipe = load(StableDiffusionXLPipeline, args) if args.model else small_sdxl()

small = {} if args.model else {"min_tokens": 0}  # layers of fewer than 1,024 tokens are left alone by default
agentsd.apply_patch(pipe, preset=args.preset, seed=args.seed, **small)
save(pipe(**call(args)).images[0], args)
print(agentsd.report(pipe))
