"""Together with DeepCache, which skips deep layers while agentsd makes the others cheaper.

agentsd has feature reuse of its own, which needs no second package: ``apply_patch(pipe, preset="balanced")``.

    python examples/with_deepcache.py
    python examples/with_deepcache.py --interval 5
"""

from common import arguments, call, load, save
from DeepCache import DeepCacheSDHelper
from diffusers import AutoPipelineForText2Image

import agentsd

parser = arguments(__doc__)
parser.add_argument("--interval", type=int, default=3, help="one full UNet call in so many (default: 3)")
parser.set_defaults(preset="few_steps")  # the one that reuses no features itself
args = parser.parse_args()
pipe = load(AutoPipelineForText2Image, args)

agentsd.apply_patch(pipe, preset=args.preset, seed=args.seed)
helper = DeepCacheSDHelper(pipe=pipe)
helper.set_params(cache_interval=args.interval, cache_branch_id=0)
helper.enable()
save(pipe(**call(args)).images[0], args)

helper.disable()  # each undoes its own, in whichever order
agentsd.remove_patch(pipe)
