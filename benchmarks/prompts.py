"""What to draw: the demo model's captions, ImageNet's class names, or the lines of a file."""

import random
import sys
from pathlib import Path

TRAINER = Path(__file__).parent.parent / "examples" / "train_demo_model"


def load_prompts(source: str, count: int) -> list[str]:
    """``count`` prompts from ``demo``, ``imagenet`` or a text file, taken in turn where they are fewer.

    Raises:
        ValueError: the source is none of these, or has no prompt.
    """
    if source == "demo":
        return [scene.caption for scene in demo_scenes(count)]
    if source == "imagenet":
        from torchvision.models import ResNet18_Weights  # noqa: PLC0415

        lines = list(ResNet18_Weights.DEFAULT.meta["categories"])  # the paper's protocol: two images a class
    elif Path(source).is_file():
        lines = [line.strip() for line in Path(source).read_text().splitlines() if line.strip()]
    else:
        raise ValueError(f"--prompts {source}: give demo, imagenet, or a text file with a prompt in each line")
    if not lines:
        raise ValueError(f"--prompts {source}: the file has no line to draw")
    return [lines[i % len(lines)] for i in range(count)]


def demo_scenes(count: int) -> list:
    """The same scenes of the demo model's training data for everyone."""
    sys.path.insert(0, str(TRAINER))
    from scenes import BACKGROUNDS, PLACES, SIZES, Scene, things  # noqa: PLC0415

    rng = random.Random(0)
    draw = lambda: Scene(rng.choice(things()), *(rng.choice(list(x)) for x in (BACKGROUNDS, PLACES, SIZES)))
    return [draw() for _ in range(count)]
