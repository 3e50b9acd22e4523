"""What does it cost in quality? The same prompts and seeds for every method, measured against what is unpatched.

Resumable: an image that is there is not made again, and one is only there when it is whole. With several devices,
``accelerate launch benchmarks/quality.py ...`` gives each process its share of the images; on CPUs it is
``ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 benchmarks/quality.py ...``.

    python benchmarks/quality.py --model examples/demo_model --images 64
    python benchmarks/quality.py --images 512 --batch 512 --dtype float32 --scheduler dpm++ --steps 25 --extractor none
    python benchmarks/quality.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts imagenet \\
        --images 2000 --steps 50 --guidance 7.5 --real path/to/imagenet/pngs --extractor inception-v3-compat
"""

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from architectures import SCHEDULERS, load_pipeline
from card import card, write_json
from latency import DTYPES
from methods import LIMIT, chosen, fitting
from options import errors_in_one_line, option, parsed
from peers import Method
from prompts import load_prompts
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tables import ABOVE, ERROR, show_result

from agentsd.cli.pictures import save

ROOT = Path(__file__).parent.parent


@dataclass
class Study:
    """What is measured."""

    model: str = option(str(ROOT / "examples" / "demo_model"), "model id or folder")
    images: int = option(64, "of each method")
    first: int = option(0, "number of the first, its seed: for others than before")
    prompts: str = option("demo", "demo, imagenet, or a text file")
    scheduler: str | None = option(None, "which sampler (default: the model's own)", choices=SCHEDULERS)
    steps: int = option(20, "of a trajectory")
    guidance: float = option(4.0, "its scale")
    batch: int = option(8, "images at once")
    dtype: str | None = option(None, "default: float16 on a GPU, float32 on a CPU", choices=DTYPES)
    methods: list[str] | None = option(None, "names as in methods.py (default: all)", nargs="+")
    ratios: list[float] = option([], "agentsd and tomesd at these, too", nargs="+", type=float)
    real: Path | None = option(None, "folder of real images as PNG (default: none, or --emoji's scenes)", type=Path)
    emoji: Path | None = option(None, "img/google/64 of emoji-datasource-google: the demo model's data", type=Path)
    extractor: str = option("efficientnet-lite0", "of torch-fidelity: FID has inception-v3-compat; or none")
    clip: str | None = option(None, "model id or folder for the CLIP score")
    folder: Path = option(ROOT / "runs" / "quality", "of the images", type=Path)
    out: Path | None = option(None, "JSON file (default: runs/results/quality-...json)", type=Path)

    def __post_init__(self) -> None:
        if self.first < 0:
            raise ValueError(f"--first {self.first}: give 0 or more")
        for name, folder in (("real", self.real), ("emoji", self.emoji)):
            if folder is not None and not folder.is_dir():
                raise ValueError(f"--{name} {folder}: there is no such folder")
        if self.real and not any(self.real.glob("*.png")):
            raise ValueError(f"--real {self.real}: there is no PNG file right in this folder, and only such are read")

    @property
    def path(self) -> Path:
        scheduler = f"{self.scheduler}-" if self.scheduler else ""
        name = f"quality-{Path(self.model).name}-{scheduler}{self.steps}-steps.json"
        return self.out or ROOT / "runs" / "results" / name

    def folder_of(self, method: str) -> Path:
        """Of its images."""
        return self.folder / re.sub(r"[^a-z0-9.=]+", "-", method.lower()).strip("-")

    def settings(self) -> dict[str, Any]:
        """For the result: paths without what lies before the project, the same wherever it is."""
        text = lambda value: str(value).replace(f"{ROOT}/", "") if isinstance(value, (str, Path)) else value
        return {name: text(value) for name, value in asdict(self).items()}


# what images depend on, beside the method
WANTED = ("model", "first", "prompts", "scheduler", "steps", "guidance", "batch", "dtype")


def images_in(folder: Path) -> int:
    """How many images there are, of all processes."""
    return len(list(folder.glob("*.png")))


def claim(study: Study, name: str, method: Method) -> None:
    """Make the folder of a method's images.

    Raises:
        ValueError: it is there with images of other settings, or with more than are asked for.
    """
    settings, folder = study.settings(), study.folder_of(name)
    wanted = {key: settings[key] for key in WANTED} | {"method": method.settings}
    made = folder / "settings.json"
    if made.exists() and json.loads(made.read_text()) != wanted:
        raise ValueError(f"{folder} holds images of other settings: give another --folder, or delete it")
    if images_in(folder) > study.images:
        raise ValueError(f"{folder} holds more than --images {study.images}: give as many, or another --folder")
    write_json(made, wanted)


def generate(
    pipe: Any, study: Study, name: str, method: Method, prompts: list[str], show: Callable[[int], None]
) -> None:
    """The images of one method that are not there yet: this process's share of them.

    Batches are always the same ones, since the sums of a batch depend on its size in the last bit: where a stop left
    one half done, it is drawn again, and what is lacking of it is saved. ``show`` is told how many images there are,
    those of all processes.
    """
    state, folder = PartialState(), study.folder_of(name)
    path = lambda i: folder / f"{i:05d}.png"
    numbers = range(study.first, study.first + study.images)
    batches = [numbers[start : start + study.batch] for start in range(0, study.images, study.batch)]
    # zeros would stand for the text of an encoder that is absent
    options = {"max_sequence_length": 0} if getattr(pipe, "text_encoder_3", pipe) is None else {}
    missing = [indices for indices in batches if not all(path(i).exists() for i in indices)]
    state.wait_for_everyone()  # nobody draws before all have seen what is missing
    for indices in missing[state.process_index :: state.num_processes]:
        # a batch knows nothing of those before it: tomesd draws from where it left off, since it was applied
        torch.manual_seed(indices[0])
        undo = method.apply(pipe)
        try:
            images = method.images(
                pipe,
                [prompts[i - study.first] for i in indices],
                num_inference_steps=study.steps,
                guidance_scale=study.guidance,
                generator=[torch.Generator().manual_seed(i) for i in indices],
                **options,
            ).images
        finally:
            undo()
        for i, image in zip(indices, images, strict=True):
            if not path(i).exists():
                save(image, path(i), {"method": name, "seed": i})
        show(images_in(folder))
    state.wait_for_everyone()
    show(images_in(folder))


def real_images(study: Study) -> Path | None:
    if study.real or not study.emoji:
        return study.real
    from prompts import demo_scenes  # noqa: PLC0415
    from scenes import Scenes  # noqa: PLC0415  (the trainer's folder is on the path once scenes are asked for)

    folder, scenes = study.folder / f"real-{study.first}-{study.images}", Scenes(study.emoji)
    folder.mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(demo_scenes(study.first + study.images)[study.first :], study.first):
        if not (folder / f"{i:05d}.png").exists():
            save(scenes.render(scene), folder / f"{i:05d}.png", {"scene": i})
    return folder


def measure(study: Study, methods: dict[str, Method], prompts: list[str]) -> dict[str, Any]:
    import metrics  # noqa: PLC0415  (slow to import, and a later step)

    unpatched, real = study.folder_of("unpatched"), real_images(study)
    apart = study.extractor != "none"
    notes = ["no real images: the distances are those to the unpatched images"] if apart and not real else []
    rows: list[dict[str, Any]] = []
    distance, replicates = metrics.distance_name(study.extractor), {}
    with tempfile.TemporaryDirectory() as features:
        for name, method in methods.items():
            folder, patched = study.folder_of(name), name != "unpatched"
            values, psnrs = metrics.against_unpatched(folder, unpatched) if patched else ({}, [])
            if apart and (real or patched):
                values |= metrics.distances(folder, real or unpatched, study.extractor, features)
            if apart and real and study.images >= 2 * metrics.GROUPS:
                replicates[name] = metrics.without_each_group(folder, real, study.extractor, features)
            if name in replicates and patched:
                values[distance + ABOVE] = values[distance] - rows[0]["metrics"][distance]
                above = replicates[name] - replicates["unpatched"]
                values[distance + ABOVE + ERROR] = metrics.standard_error(above)
            more, missing = metrics.learned(folder, unpatched, prompts, study.clip)
            notes += [line for line in missing if line not in notes]
            rows.append({"method": name, "ratio": method.ratio, "metrics": values | more, "psnr": psnrs})
    found = {"rows": rows, "notes": notes}
    if shown := {row["method"]: row["psnr"] for row in rows if row["psnr"]}:
        picture = study.path.with_suffix(".jpg")
        metrics.worst({name: study.folder_of(name) for name in shown}, unpatched, shown).save(picture, quality=80)
        found["worst"] = picture.name
    return found


def main() -> None:
    study = parsed(Study, __doc__)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # which only accelerate's Accelerator reads
    study.dtype = study.dtype or ("float32" if state.device.type == "cpu" else "float16")
    with errors_in_one_line():
        methods = {name: m for name, m in chosen(study.methods, study.ratios).items() if name != LIMIT}
        prompts = load_prompts(study.prompts, study.first + study.images)[study.first :]
        pipe = load_pipeline(study.model, DTYPES[study.dtype], str(state.device), study.scheduler)
        methods = fitting(methods, pipe)
        study.path.parent.mkdir(parents=True, exist_ok=True)
        if state.is_main_process:
            for name, method in methods.items():
                claim(study, name, method)
    state.wait_for_everyone()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not state.is_main_process) as progress:
        for name, method in methods.items():
            task = progress.add_task(name, total=study.images, completed=images_in(study.folder_of(name)))
            show = lambda images, task=task: progress.update(task, completed=images)
            generate(pipe, study, name, method, prompts, show)
    if state.is_main_process:
        settings = {**study.settings(), "processes": state.num_processes}
        found = measure(study, methods, prompts)
        result = {"kind": "quality", **card(str(state.device)), "settings": settings, **found}
        write_json(study.path, result)
        show_result(result, study.path)


if __name__ == "__main__":
    main()
