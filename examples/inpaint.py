"""Inpainting: what is white in the mask is drawn anew.

python examples/inpaint.py --prompt "red heart on a blue background"
python examples/inpaint.py --model stable-diffusion-v1-5/stable-diffusion-inpainting --image room.png --mask mask.png
"""

from common import EXAMPLES, arguments, call, load, save
from diffusers import AutoPipelineForInpainting
from diffusers.utils import load_image

import agentsd

parser = arguments(__doc__)
parser.add_argument("--image", default=str(EXAMPLES / "images" / "apple.png"), help="file or address")
parser.add_argument("--mask", default=str(EXAMPLES / "images" / "mask.png"), help="file or address")
args = parser.parse_args()
pipe = load(AutoPipelineForInpainting, args)

agentsd.apply_patch(pipe, preset=args.preset, seed=args.seed)
image, mask = load_image(args.image), load_image(args.mask)
sides = {"height": image.height // 8 * 8, "width": image.width // 8 * 8}  # what the autoencoder can divide
save(pipe(image=image, mask_image=mask, **sides, **call(args)).images[0], args)
