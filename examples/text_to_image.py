"""Text to image.

python examples/text_to_image.py
python examples/text_to_image.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a red fox in the snow"
"""

from common import arguments, call, load, save
from diffusers import AutoPipelineForText2Image

import agentsd

args = arguments(__doc__).parse_args()
pipe = load(AutoPipelineForText2Image, args)

agentsd.apply_patch(pipe, preset=args.preset, seed=args.seed)
save(pipe(**call(args)).images[0], args)
print(agentsd.report(pipe))
