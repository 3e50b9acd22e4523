"""ControlNet. With ``patch_controlnet=True`` and a ratio its own attention is patched as well.

Without ``--controlnet`` it takes an untrained one, made from the model's own UNet, which does not guide anything yet.

    python examples/controlnet.py
    python examples/controlnet.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --controlnet lllyasviel/sd-controlnet-canny --image edges.png --prompt "a castle"
"""

from common import DTYPE, EXAMPLES, arguments, call, load, precision, save
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel
from diffusers.utils import load_image

import agentsd

parser = arguments(__doc__)
parser.add_argument("--controlnet", help="model id or folder")
parser.add_argument("--image", default=str(EXAMPLES / "images" / "apple.png"), help="file or address")
args = parser.parse_args()
if args.controlnet:
    controlnet = ControlNetModel.from_pretrained(args.controlnet, **precision(DTYPE))
else:
    unet = UNet2DConditionModel.from_pretrained(args.model, subfolder="unet", **precision(DTYPE))
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 32)).to(DTYPE)
pipe = load(StableDiffusionControlNetPipeline, args, controlnet=controlnet)

agentsd.apply_patch(pipe, preset=args.preset, seed=args.seed)
save(pipe(image=load_image(args.image), **call(args)).images[0], args)
print(agentsd.report(pipe))
