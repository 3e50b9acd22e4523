"""The three tasks that the emoji scenes can teach: each has a model, a loss and an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from emoji_scenes import CLASSES, Batch, Scenes
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.transforms.functional import normalize

import agentsd.vision  # noqa: F401 (registers the models)
from agentsd.vision.detection import mask_rcnn

# A small Agent-PVT: 2.3 million parameters as a classifier, and no more agents than a stage of 64 pixels has tokens.
SMALL: dict[str, Any] = {
    "depths": (2, 2, 2, 2),
    "dims": (32, 64, 128, 256),
    "num_heads": (1, 2, 4, 8),
    "mlp_ratios": (4, 4, 4, 4),
    "agents": (9, 9, 9, 4),
}
FEATURES = {"downstream_agent_shapes": ((3, 3), (3, 3), (4, 4), (3, 3))}
COLOURS = ["#f4c20d", "#db4437", "#0f9d58", "#ff7043", "#4285f4", "#ab47bc", "#00acc1"]  # of CLASSES
ATTENTION: dict[str, dict[str, Any]] = {
    "agent": {"attn_type": "AAAA"},
    "softmax": {"attn_type": "BBBB", "sr_ratios": (1, 1, 1, 1)},  # over all tokens, as agent attention is
}


def normalised(images: Tensor) -> Tensor:
    return normalize(images, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


class Task:
    """What `train.py` needs to know of a task.

    Args:
        folder: of the emoji.
        device: where scenes are drawn.
    """

    size = 96
    things = 4
    scales = (0.2, 0.5)
    learning_rate = 1e-3
    batch = 64
    steps = 3000
    precision = "bf16"  # on a GPU

    def __init__(self, folder: Path, device: torch.device, seed: int = 0):
        drawn = {"size": self.size, "things": self.things, "scales": self.scales, "device": device}
        self.training = Scenes(folder, held_out=False, seed=seed, **drawn)
        self.held_out = Scenes(folder, held_out=True, seed=1, **drawn)

    @classmethod
    def options(cls, attention: str) -> dict[str, Any]:
        """timm's, for the small model of that attention."""
        return {**SMALL, **ATTENTION[attention], "img_size": cls.size}

    @classmethod
    def build(cls, attention: str) -> nn.Module:
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        raise NotImplementedError

    def evaluate(self, model: nn.Module, scenes: int) -> dict[str, float]:
        """Figures of about `scenes` scenes of held-out emoji, the same ones each time."""
        raise NotImplementedError

    def batches(self, scenes: int) -> Any:
        self.held_out.generator.manual_seed(1)
        for _ in range(0, scenes, self.batch):
            yield self.held_out.draw(self.batch)


class Classify(Task):
    """Which of the classes a picture of one emoji shows."""

    size, things, scales = 64, 1, (0.35, 0.9)

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, prob=0.5, label_smoothing=0.1, num_classes=len(CLASSES))
        self.cross_entropy = SoftTargetCrossEntropy()

    @classmethod
    def build(cls, attention: str) -> nn.Module:
        options = {"num_classes": len(CLASSES), "drop_path_rate": 0.1, **cls.options(attention)}
        return timm.create_model("agent_pvt_tiny", **options)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, target = self.mixup(normalised(batch.images), batch.labels[:, 0])
        return self.cross_entropy(model(images).float(), target)

    def evaluate(self, model: nn.Module, scenes: int) -> dict[str, float]:
        """Every held-out emoji as often as `scenes` asks for, so that each counts the same."""
        self.held_out.generator.manual_seed(1)
        emoji = torch.arange(len(self.held_out.emoji), device=self.held_out.device)[:, None]
        averages = {"accuracy": "micro", "accuracy of the mean class": "macro"}
        figures = {name: MulticlassAccuracy(len(CLASSES), average=a).to(emoji.device) for name, a in averages.items()}
        for _ in range(max(1, scenes // len(emoji))):
            predictions = model(normalised(self.held_out.draw(len(emoji), emoji).images))
            for accuracy in figures.values():
                accuracy.update(predictions, self.held_out.labels)
        return {name: accuracy.compute().item() for name, accuracy in figures.items()}


class Detect(Task):
    """Where emoji are and what they are: Mask R-CNN."""

    learning_rate, precision = 5e-4, "no"  # torchvision makes anchors in the maps' precision

    @classmethod
    def build(cls, attention: str) -> nn.Module:
        anchors = AnchorGenerator(tuple((side,) for side in (12, 18, 24, 36, 48)), ((0.5, 1.0, 2.0),) * 5)
        hidden = 256
        return mask_rcnn(
            "agent_pvt_tiny",
            None,
            {**cls.options(attention), **FEATURES},
            box_head=TwoMLPHead(256 * 7 * 7, hidden),
            box_predictor=FastRCNNPredictor(hidden, 1 + len(CLASSES)),
            mask_predictor=MaskRCNNPredictor(256, 64, 1 + len(CLASSES)),
            rpn_anchor_generator=anchors,
            min_size=cls.size,
            max_size=cls.size,
            rpn_pre_nms_top_n_train=500,
            rpn_post_nms_top_n_train=200,
            rpn_pre_nms_top_n_test=200,
            rpn_post_nms_top_n_test=100,
            box_batch_size_per_image=64,
            box_detections_per_img=20,
        )

    def targets(self, batch: Batch) -> list[dict[str, Tensor]]:
        boxes = batch.boxes()
        shown = [labels >= 0 for labels in batch.labels]
        return [
            {"boxes": boxes[i][ok], "labels": batch.labels[i][ok] + 1, "masks": batch.masks[i][ok].to(torch.uint8)}
            for i, ok in enumerate(shown)
        ]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        losses: dict[str, Tensor] = model(list(batch.images), self.targets(batch))
        return torch.stack(list(losses.values())).sum()

    def evaluate(self, model: nn.Module, scenes: int) -> dict[str, float]:
        """COCO's mAP of boxes and of masks, and of boxes whatever their class."""
        precision = MeanAveragePrecision(iou_type=("bbox", "segm"))
        found = MeanAveragePrecision()
        for batch in self.batches(scenes):
            predictions, targets = model(list(batch.images)), self.targets(batch)
            for prediction in predictions:
                prediction["masks"] = prediction["masks"][:, 0] > 0.5
            precision.update(predictions, targets)
            found.update(
                *([{**x, "labels": torch.zeros_like(x["labels"])} for x in y] for y in (predictions, targets))
            )
        result = precision.compute()
        return {
            "box mAP": result["bbox_map"].item(),
            "box mAP50": result["bbox_map_50"].item(),
            "mask mAP": result["segm_map"].item(),
            "box mAP of any class": found.compute()["map"].item(),
        }


class Segment(Task):
    """The class of every pixel: UPerNet."""

    @classmethod
    def build(cls, attention: str) -> nn.Module:
        options = {**cls.options(attention), **FEATURES}
        return smp.UPerNet("tu-agent_pvt_tiny", encoder_weights=None, decoder_channels=96, classes=8, **options)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(normalised(batch.images)).float(), batch.segmentation())

    def evaluate(self, model: nn.Module, scenes: int) -> dict[str, float]:
        device = self.held_out.device
        overlap = MulticlassJaccardIndex(1 + len(CLASSES)).to(device)
        right = MulticlassAccuracy(1 + len(CLASSES), average="micro").to(device)
        for batch in self.batches(scenes):
            classes, target = model(normalised(batch.images)).argmax(1), batch.segmentation()
            overlap.update(classes, target)
            right.update(classes, target)
        return {"mIoU": overlap.compute().item(), "pixel accuracy": right.compute().item()}


TASKS: dict[str, type[Task]] = {"classify": Classify, "detect": Detect, "segment": Segment}
