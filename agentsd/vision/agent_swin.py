"""Agent-Swin: the Swin Transformer (arXiv 2103.14030), its first stages with agent attention over the whole map."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn

from agentsd.vision.attention import AgentAttention, Grid
from agentsd.vision.build import build, default_cfg, resize_positions
from agentsd.vision.pyramid import Block, Pyramid

DOWNSTREAM_AGENTS = ((9, 9), (12, 12), (14, 14), (7, 7))


def sides(window: Grid) -> Grid:
    """Rows and columns of the table of relative positions in a window."""
    return 2 * window[0] - 1, 2 * window[1] - 1


def window_of(index: Tensor) -> Grid:
    """The (rows, columns) of the window whose relative positions (N, N) these are: places in the table."""
    behind = index[0, 0] - index[0]  # of the first row 0, 1, 2 ...; the next begins a row of the table further
    columns = int((behind == torch.arange(len(behind), device=index.device)).sum())
    return len(behind) // columns, columns


class WindowBlock(SwinTransformerBlock):
    """timm's block of (shifted) windows, with the official order, buffers and resizing.

    A map that is no multiple of the window is padded before the shift, not after it.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.register_load_state_dict_pre_hook(self._resize_loaded)

    def _init_buffers(self) -> None:
        super()._init_buffers()
        self.register_buffer("attn_mask", self.attn_mask, persistent=True)
        self.attn.register_buffer("relative_position_index", self.attn.relative_position_index, persistent=True)

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window_size[1], 0, -height % self.window_size[0]))
        return super()._attn(x)[:, :height, :width]

    def _resize_loaded(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        key, index = (f"{prefix}attn.relative_position_{name}" for name in ("bias_table", "index"))
        if key in state_dict:
            told = sides(window_of(state_dict[index])) if index in state_dict else None
            state_dict[key] = resize_positions(state_dict[key][None], sides(self.window_size), told)[0]
        for name, buffer in self.named_buffers():
            if f"{prefix}norm1.weight" in state_dict:  # both follow from the window: keep those that were built
                state_dict[prefix + name] = buffer
        if self.attn_mask is None:
            state_dict.pop(f"{prefix}attn_mask", None)


class Stage(nn.Module):
    def __init__(self, blocks: nn.Module, downsample: nn.Module | None):
        super().__init__()
        self.blocks = blocks
        self.downsample = downsample


class AgentSwin(Pyramid):
    """Four stages of blocks, with patch merging between them and a norm behind the last.

    Args: as `Pyramid`, and
        embed_dim: channels of the first stage, doubled in each that follows.
        num_heads: of each stage.
        agents: agents of each stage.
        agent_blocks: how many blocks, from the front of each stage, have agent attention; the others have softmax
            attention in windows, every second one shifted.
        window_size: (rows, columns) of the softmax windows, by default the larger of 7 and 1/32 of the image.
        always_partition: shift windows also where one is the whole map, as the official dense prediction does.
        downstream_agent_shapes: (rows, columns) that agents are pooled to at run time, for each stage; by default
            the square that `agents` says.
        feature_norms: give out each stage's map through a norm of its own.
    """

    def __init__(
        self,
        img_size: int | Grid = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        agents: Sequence[int] = (9, 16, 49, 49),
        agent_blocks: Sequence[int] = (2, 2, 6, 0),
        window_size: Grid | None = None,
        always_partition: bool = False,
        downstream_agent_shapes: Sequence[Grid] | None = None,
        feature_norms: bool = False,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        **options: Any,
    ):
        dims = [embed_dim * 2**i for i in range(len(depths))]
        super().__init__(img_size, in_chans, num_classes, dims, depths, **options)
        self.patch_embed = PatchEmbed(
            None, 4, in_chans, embed_dim, norm_layer=nn.LayerNorm, output_fmt="NHWC", dynamic_img_pad=True
        )
        shapes: Sequence[Grid | None] = downstream_agent_shapes or [None] * len(depths)
        rows, columns = window_size or (max(7, side // 8) for side in self.grid(0))
        drops: dict[str, Any] = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        stages = []
        for i, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
            blocks: list[nn.Module] = []
            for j, rate in enumerate(self.drop_path_rates[i]):
                if j < agent_blocks[i]:
                    attention = AgentAttention(dim, heads, self.grid(i), agents[i], agent_shape=shapes[i], **drops)
                    blocks.append(Block(dim, attention, mlp_ratio, rate, 1e-5, proj_drop_rate))
                else:
                    window = WindowBlock(
                        dim,
                        self.grid(i),
                        heads,
                        window_size=(rows, columns),
                        shift_size=(rows // 2, columns // 2) if j % 2 else 0,
                        always_partition=always_partition,
                        dynamic_mask=self.dynamic_img_size,
                        mlp_ratio=mlp_ratio,
                        drop_path=rate,
                        **drops,
                    )
                    blocks.append(window)
            stages.append(Stage(nn.Sequential(*blocks), PatchMerging(dim) if i + 1 < len(depths) else None))
        self.layers = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(dims[-1])
        self.feature_norms = feature_norms
        if feature_norms:
            for i, dim in enumerate(dims):
                self.add_module(f"norm{i}", nn.LayerNorm(dim))
        self.finish()
        self.register_load_state_dict_pre_hook(self._keep_feature_norms)

    def stage_modules(self, stage: int) -> list[str]:
        return [f"layers.{stage}", f"layers.{stage - 1}.downsample", f"norm{stage}"]

    def forward_stage(self, stage: int, x: Tensor) -> Tensor:
        embed = self.get_submodule(f"layers.{stage - 1}.downsample" if stage else "patch_embed")
        return self.run_blocks(self.get_submodule(f"layers.{stage}.blocks"), embed(x))

    def forward_feature(self, stage: int, x: Tensor) -> Tensor:
        return self.get_submodule(f"norm{stage}")(x) if self.feature_norms else x

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As `Pyramid` does, and drops the norms of maps that are not given out: nothing would train them."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        for stage in range(self.num_stages):
            if self.feature_norms and stage not in take:
                delattr(self, f"norm{stage}")
        return take

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^layers\.(\d+)" if coarse else r"^layers\.(\d+)\.\w+\.(\d+)"
        return {"stem": r"^patch_embed", "blocks": [(blocks, None), (r"^layers\.(\d+)", (0,)), (r"^norm", (99999,))]}

    def _keep_feature_norms(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Classifiers know no norms of features: theirs stay as initialised."""
        state = self.state_dict().items()
        norms = {f"{prefix}{name}": value for name, value in state if name[:4] == "norm" and name[4].isdigit()}
        if f"{prefix}patch_embed.proj.weight" in state_dict and not norms.keys() & state_dict.keys():
            state_dict.update(norms)


def _create(variant: str, pretrained: bool, **options: Any) -> nn.Module:
    features = {
        "dynamic_img_size": True,
        "downstream_agent_shapes": DOWNSTREAM_AGENTS,
        "always_partition": True,
        "feature_norms": True,
    }
    return build(AgentSwin, variant, pretrained, features, **options)


_cfg = partial(default_cfg, first_conv="patch_embed.proj", pool_size=(7, 7))
default_cfgs = generate_default_cfgs(
    {
        "agent_swin_tiny.in1k": _cfg(),
        "agent_swin_small.in1k": _cfg(),
        "agent_swin_small.in1k_288": _cfg(input_size=(3, 288, 288), pool_size=(9, 9), crop_pct=1.0),
        "agent_swin_base.in1k": _cfg(),
        "agent_swin_base.in1k_384": _cfg(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0),
    }
)


@register_model
def agent_swin_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """Agent-Swin-T: 28.9M parameters, agent attention in three stages."""
    return _create("agent_swin_tiny", pretrained, **options)


@register_model
def agent_swin_small(pretrained: bool = False, **options: Any) -> nn.Module:
    """Agent-Swin-S: 49.7M parameters, agent attention in two stages."""
    sizes = {"depths": (2, 2, 18, 2), "agent_blocks": (2, 2, 0, 0)}
    return _create("agent_swin_small", pretrained, **{**sizes, **options})


@register_model
def agent_swin_base(pretrained: bool = False, **options: Any) -> nn.Module:
    """Agent-Swin-B: 88.1M parameters, agent attention in two stages and two blocks of the third."""
    sizes = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "agent_blocks": (2, 2, 2, 0)}
    return _create("agent_swin_base", pretrained, **{**sizes, **options})
