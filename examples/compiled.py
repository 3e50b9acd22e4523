"""With torch.compile: one graph for full calls and one for cached ones, and none is compiled anew from step to step.

python examples/compiled.py
python examples/compiled.py --preset fast
"""

import time

from common import arguments, call, load, save
from diffusers import AutoPipelineForText2Image

import agentsd

args = arguments(__doc__).parse_args()
pipe = load(AutoPipelineForText2Image, args)

agentsd.apply_patch(pipe, preset=args.preset, seed=args.seed)
pipe.unet.compile()  # in place: pipe.unet = torch.compile(pipe.unet) and compile_repeated_blocks() do as well
for run in ("first, which compiles", "second"):
    start = time.perf_counter()
    image = pipe(**call(args)).images[0]
    print(f"{run}: {time.perf_counter() - start:.1f} s")
save(image, args)
