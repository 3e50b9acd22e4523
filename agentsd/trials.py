"""What was tried in search of settings, and the choice between them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agentsd.reports import aligned

FAITHFUL = 35.0  # dB, beyond which faster comes before nearer
SAME = 1.03  # ratios of seconds below this are noise


@dataclass(frozen=True)
class Trial:
    """One way to draw the images.

    Attributes:
        settings: arguments of `agentsd.apply_patch`; None where nothing is patched.
        seconds: of an image, the median.
        speedup: over the unpatched pipeline.
        worst, mean: PSNR to the unpatched images, in dB: of the worst image, and on average.
    """

    name: str
    settings: dict[str, Any] | None
    seconds: float
    speedup: float
    worst: float
    mean: float


@dataclass(frozen=True)
class Tuning:
    """What `tune` found. Prints as a table; `save` writes what ``preset=Path(...)`` reads.

    Attributes:
        settings: arguments of `agentsd.apply_patch`; None where it is best to leave the pipeline unpatched.
        verdict: the choice, and why, in a sentence.
        images: how many were drawn for each trial.
        trials: all that was tried.
        advice: what gains beside a patch, with what was measured.
        untried: candidates for which there was no time.
    """

    settings: dict[str, Any] | None
    verdict: str
    images: int
    trials: tuple[Trial, ...]
    advice: tuple[str, ...]
    untried: tuple[str, ...]

    def save(self, path: str | Path) -> None:
        """As JSON.

        Raises:
            ValueError: it is best to leave the pipeline unpatched, so that there is nothing to save.
        """
        if self.settings is None:
            raise ValueError(f"there are no settings to save: {self.verdict}.")
        Path(path).write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: the PSNR of equal images is None."""
        found = asdict(self)
        for trial in found["trials"]:
            trial.update({name: None for name in ("worst", "mean") if not math.isfinite(trial[name])})
        return found

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("settings", "seconds", "speed-up", f"worst of {self.images}, dB", "mean, dB")]
        for trial in self.trials:
            decibels = (f"{trial.worst:.1f}", f"{trial.mean:.1f}") if math.isfinite(trial.worst) else ("same", "same")
            rows.append((trial.name, f"{trial.seconds:.2f}", f"{trial.speedup:.2f}x", *decibels))
        untried = [f"no time was left for: {', '.join(self.untried)}"] if self.untried else []
        return "\n".join([*aligned(rows), *untried, *self.advice, f"agentsd: {self.verdict}."])


def parse_target(text: str | None) -> tuple[str, float] | None:
    """``("x", 2.0)`` or ``("dB", 35.0)``."""
    found = re.fullmatch(r"\s*(?:p5\s*)?(?:>=\s*)?(\d+(?:\.\d+)?)\s*(x|dB)\s*", text) if text is not None else None
    if text is not None and (found is None or (found[2] == "x" and float(found[1]) < 1)):
        raise ValueError(
            f"target={text!r} is not allowed: expected a speed-up of 1 or more ('2x'), a fidelity ('35 dB'), or None."
        )
    return (found[2], float(found[1])) if found is not None else None


def choose(trials: list[Trial], wanted: tuple[str, float] | None) -> tuple[Trial | None, str]:
    """The trial to take, None for none, and why."""
    half = next((trial for trial in trials[1:] if trial.settings is None), None)
    candidates = [trial for trial in trials if trial.settings is not None and trial.speedup > SAME]
    if not candidates:
        return None, "leave it unpatched: nothing that was tried is faster here"
    if wanted is not None and wanted[0] == "x":
        reached = [trial for trial in candidates if trial.speedup >= wanted[1]]
        best = max(reached, key=lambda trial: trial.worst, default=None)
        asked = f"{wanted[1]:g}x"
    else:
        # fewer steps often give another image: what is near the unpatched one comes before what is faster
        goal = wanted[1] if wanted is not None else FAITHFUL
        least = goal if wanted is not None or half is None else half.worst
        pool = [*candidates, half] if half is not None and half.speedup > SAME else candidates
        reached = [trial for trial in pool if trial.worst >= least]
        best = max(reached, key=lambda trial: (min(trial.worst, goal), trial.speedup), default=None)
        asked = f"{least:.1f} dB" + (
            ", the fidelity of half the steps," if wanted is None and half is not None else ""
        )
        if best is not None and best is half:
            return None, f"leave it unpatched and halve the steps: {half.speedup:.2f}x with {half.worst:.1f} dB"
    if best is None:
        fastest = max(candidates, key=lambda trial: trial.speedup)
        near = f"{fastest.name} has {fastest.speedup:.2f}x with {fastest.worst:.1f} dB"
        return None, f"leave it unpatched: {asked} is reached by nothing that was tried; {near}"
    return best, f"{best.name}: {best.speedup:.2f}x, the worst image at {best.worst:.1f} dB"
