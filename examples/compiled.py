"""With torch.compile: one graph a phase, before or after the patch, and none is compiled anew from step to step.

python examples/compiled.py
python examples/compiled.py --preset fast
"""

import time

from common import arguments, call, load, save
from diffusers import AutoPipelineForText2Image

import agentsd

parser = arguments(__doc__)
parser.add_argument("--preset", choices=agentsd.PRESETS, help="rather than the paper's schedule")
args = parser.parse_args()
pipe = load(AutoPipelineForText2Image, args)

agentsd.apply_patch(pipe, seed=args.seed, **({"preset": args.preset} if args.preset else {"ratio": args.ratio}))
pipe.unet.compile()  # in place: pipe.unet = torch.compile(pipe.unet) and compile_repeated_blocks() do as well
for run in ("first, which compiles", "second"):
    start = time.perf_counter()
    image = pipe(**call(args)).images[0]
    print(f"{run}: {time.perf_counter() - start:.1f} s")
save(image, args)
