"""torchvision's detectors on the pyramids' maps: Mask R-CNN and RetinaNet with any timm model that gives features."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import timm
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)


class FeaturePyramid(nn.Module):
    """A timm backbone and torchvision's feature pyramid network, as torchvision's detectors want them.

    Args:
        name: of a timm model that takes `features_only` and images of any size.
        out_indices: the stages whose maps go into the network.
        out_channels: channels of each of its maps.
        extra: what makes its coarser levels, of the channels of the last map.
        options: those of ``timm.create_model``.
    """

    def __init__(
        self,
        name: str,
        out_indices: tuple[int, ...],
        out_channels: int,
        extra: Callable[[int], ExtraFPNBlock],
        **options: Any,
    ):
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=out_indices, **options)
        channels = self.body.feature_info.channels()
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra(channels[-1]))
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> maps (B, out_channels, H / stride, W / stride), finest first."""
        maps = OrderedDict((str(level), x) for level, x in enumerate(self.body(images)))
        return self.fpn(maps)


def mask_rcnn(name: str, num_classes: int | None, backbone: dict[str, Any] | None = None, **options: Any) -> MaskRCNN:
    """Mask R-CNN on four maps of 256 channels, and a fifth pooled from the last.

    Args:
        name: of a timm model, such as "agent_pvt_tiny".
        num_classes: with the background, class 0; None where predictors are given among the options.
        backbone: options of ``timm.create_model``, such as ``{"checkpoint_path": "agent_pvt_t.pth"}``.
        options: those of torchvision's `MaskRCNN`, such as ``min_size``.
    """
    pyramid = FeaturePyramid(name, (0, 1, 2, 3), 256, lambda _: LastLevelMaxPool(), **(backbone or {}))
    return MaskRCNN(pyramid, num_classes, **options)


def retinanet(name: str, num_classes: int, backbone: dict[str, Any] | None = None, **options: Any) -> RetinaNet:
    """RetinaNet on the last three maps with 256 channels, and two more convolved from the last.

    Args: as `mask_rcnn`; the options are those of torchvision's `RetinaNet`.
    """
    pyramid = FeaturePyramid(name, (1, 2, 3), 256, lambda channels: LastLevelP6P7(channels, 256), **(backbone or {}))
    return RetinaNet(pyramid, num_classes, **options)
