"""Agent-DeiT: timm's vision transformer (arXiv 2010.11929, 2012.12877) with agent attention in its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from agentsd.vision.attention import AgentAttention, Grid
from agentsd.vision.build import build, default_cfg, grid_told, resize_positions

# Options of timm's vision transformer that agent attention has no place for, and the value that each has to keep
FIXED = {
    "qk_norm": False,
    "scale_attn_norm": False,
    "proj_bias": True,
    "attn_layer": None,
    "block_fn": None,
    "patch_drop_rate": 0.0,
    "dynamic_img_size": False,
}


class BlockAttention(AgentAttention):
    """`AgentAttention` as timm's vision transformer calls its attention."""

    def forward(  # type: ignore[override]
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("agent attention has no mask: tokens see each other through the agents")
        return super().forward(x)


class AgentDeiT(VisionTransformer):
    """timm's `VisionTransformer`, the attention of whose first blocks is exchanged.

    Args:
        img_size: pixels; the model takes this size only.
        agents: of each block, front to back; blocks behind the last of them keep softmax attention. None is 49 in all.
        options: those of `VisionTransformer`.

    Raises:
        ValueError: for an option that agent attention has no place for, or agents for more blocks than there are.
    """

    def __init__(self, img_size: int | Grid = 224, agents: Sequence[int] | None = None, **options: Any):
        for name, allowed in FIXED.items():
            if options.get(name, allowed) != allowed:
                raise ValueError(
                    f"{name}={options[name]!r}: Agent-DeiT has one image size, which is `img_size`, all its patches, "
                    f"and timm's block and plain attention; {name} may only be {allowed!r}, so leave it out"
                )
        super().__init__(img_size=img_size, **{k: v for k, v in options.items() if k not in FIXED})
        agents = [49] * len(self.blocks) if agents is None else agents
        if len(agents) > len(self.blocks):
            raise ValueError(f"agents={agents!r}: {len(agents)} numbers, for {len(self.blocks)} blocks; give no more")
        for block, number in zip(self.blocks, agents, strict=False):
            softmax = block.attn
            block.attn = BlockAttention(
                self.embed_dim,
                softmax.num_heads,
                self.patch_embed.grid_size,
                number,
                class_tokens=self.num_prefix_tokens,
                qkv_bias=softmax.qkv.bias is not None,
                attn_drop=softmax.attn_drop.p,
                proj_drop=softmax.proj_drop.p,
            ).to(softmax.qkv.weight)
        self.init_weights()
        self.register_load_state_dict_pre_hook(self._resize_loaded)

    def set_input_size(self, img_size: int | Grid | None = None, patch_size: int | Grid | None = None) -> None:
        raise NotImplementedError("give create_model the `img_size`: its checkpoints are resized as they are loaded")

    def no_weight_decay(self) -> set[str]:
        biases = {n for n, _ in self.named_parameters() if n.endswith("_bias")}
        return {"pos_embed", "cls_token"} | biases

    def _resize_loaded(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        key = f"{prefix}pos_embed"
        if key in state_dict:
            told = grid_told(state_dict, f"{prefix}blocks.0.attn")
            others = 0 if self.no_embed_class else self.num_prefix_tokens
            state_dict[key] = resize_positions(state_dict[key], self.patch_embed.grid_size, told, others)


def _create(variant: str, pretrained: bool, **options: Any) -> nn.Module:
    return build(AgentDeiT, variant, pretrained, **{"patch_size": 16, "depth": 12, "out_indices": 3, **options})


_cfg = partial(default_cfg, first_conv="patch_embed.proj")
default_cfgs = generate_default_cfgs(
    {
        "agent_deit_tiny.in1k": _cfg(),
        "agent_deit_small.in1k": _cfg(),
        "agent_deit_small.in1k_448": _cfg(input_size=(3, 448, 448)),
        "agent_deit_base.in1k": _cfg(),
    }
)


@register_model
def agent_deit_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """Agent-DeiT-T: 6.0M parameters."""
    return _create("agent_deit_tiny", pretrained, **{"embed_dim": 192, "num_heads": 3, **options})


@register_model
def agent_deit_small(pretrained: bool = False, **options: Any) -> nn.Module:
    """Agent-DeiT-S: 22.6M parameters."""
    return _create("agent_deit_small", pretrained, **{"embed_dim": 384, "num_heads": 6, **options})


@register_model
def agent_deit_base(pretrained: bool = False, **options: Any) -> nn.Module:
    """Agent-DeiT-B: 87.2M parameters, agent attention in the first four blocks."""
    sizes = {"embed_dim": 768, "num_heads": 12, "agents": (81,) * 4}
    return _create("agent_deit_base", pretrained, **{**sizes, **options})
