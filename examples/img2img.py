"""Image to image. Full calls are as far apart on average as in the whole schedule, and dense at the image's own start.

python examples/img2img.py --strength 0.6 --prompt "green apple on a pink background"
python examples/img2img.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --image sketch.png --prompt "a castle"
"""

from common import EXAMPLES, arguments, call, load, save
from diffusers import AutoPipelineForImage2Image
from diffusers.utils import load_image

import agentsd

parser = arguments(__doc__)
parser.add_argument("--image", default=str(EXAMPLES / "images" / "apple.png"), help="file or address")
parser.add_argument("--strength", type=float, default=0.6, help="0 keeps the image, 1 forgets it (default: 0.6)")
args = parser.parse_args()
pipe = load(AutoPipelineForImage2Image, args)

agentsd.apply_patch(pipe, preset=args.preset, seed=args.seed)
save(pipe(image=load_image(args.image), strength=args.strength, **call(args)).images[0], args)
