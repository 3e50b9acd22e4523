"""LoRA: load and unload them before or after the patch, as you like.

Without ``--lora`` it takes a small one with random weights, so that something is seen to change.

    python examples/lora.py
    python examples/lora.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --lora pcuenq/pokemon-lora --scale 0.8
"""

import torch
from common import arguments, call, load, save
from diffusers import AutoPipelineForText2Image
from peft import LoraConfig

import agentsd

parser = arguments(__doc__)
parser.add_argument("--lora", help="model id, folder or file of LoRA weights")
parser.add_argument("--scale", type=float, default=0.3, help="of the LoRA (default: 0.3)")
args = parser.parse_args()
pipe = load(AutoPipelineForText2Image, args)

agentsd.apply_patch(pipe, preset=args.preset, seed=args.seed)
if args.lora:
    pipe.load_lora_weights(args.lora, adapter_name="lora")
else:
    torch.manual_seed(args.seed)
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=layers, init_lora_weights=False), adapter_name="lora")
pipe.set_adapters("lora", args.scale)
save(pipe(**call(args)).images[0], args)
