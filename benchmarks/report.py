"""All results as one page, with its pictures, and the table of docs/measured.md; on demand every plot.

python benchmarks/report.py                        # benchmarks/results/README.md
python benchmarks/report.py --plots runs/plots     # and every plot, as SVG files in this folder
"""

import html
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measured
from options import option, parsed
from overview import overview
from plots import plots
from tables import markdown, profile_rows, rows_of, title

RESULTS = Path(__file__).with_name("results")
INTRODUCTION = """# Results

Speed is that of the real architectures with random weights, against PyTorch's fused attention; quality that of the
[demo model](../../examples/demo_model/README.md). [What was measured](../../docs/measured.md) explains them, and has
the paper's own figures and what nobody has measured yet.

Made by `python benchmarks/report.py` from the JSON files beside this page, which hold every raw figure. To add to it,
run `benchmarks/latency.py`, `quality.py` or `operations.py`, copy the JSON file from `runs/results/` to this folder,
and make the page anew. Every plot: `python benchmarks/report.py --plots runs/plots`.
"""
PROFILE = "Where the time goes, in all calls together:"


def load(folder: Path) -> list[dict[str, Any]]:
    """The results of a folder: GPUs before CPUs, latency before quality, then by model, data type and size."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"), key=lambda path: path.stem)]

    def order(result: dict[str, Any]) -> tuple[Any, ...]:
        settings = result["settings"]
        without_gpu = "gpu" not in result["hardware"]
        return without_gpu, result["kind"], settings["model"], settings.get("dtype") or "", settings.get("size", 0)

    return sorted(found, key=order)


def runs(results: list[dict[str, Any]]) -> Iterator[str]:
    """Of each command, folded away: what was run with what, and its tables."""
    for command, group in itertools.groupby(results, key=lambda result: result["command"]):
        first, *others = together = list(group)
        heading = title(first)
        if first["kind"] == "latency":
            heading += f", {first['settings']['steps']} steps{', by ratio' * bool(first['settings']['ratios'])}"
        if others:
            heading = heading.replace(f", {first['settings']['size']} px", "")
        yield f"<details><summary>{html.escape(heading)}</summary>"
        yield f"`{command}`, {', '.join(f'{name} {version}' for name, version in first['versions'].items())}"
        yield from dict.fromkeys(note for result in together for note in result.get("notes", []))
        for result in together:
            if others:
                yield f"{result['settings']['size']} pixels:"
            yield markdown(rows_of(result))
        for result in together:
            if "profile" in result:
                yield from (PROFILE, markdown(profile_rows(result)))
        yield "</details>"


def page(results: list[dict[str, Any]]) -> tuple[str, dict[str, str]]:
    """The page as Markdown, its long tables folded away, and its pictures as SVG text, by name."""
    answers, pictures = overview(results)
    return "\n\n".join([INTRODUCTION.rstrip(), *answers, "## Every run", *runs(results)]) + "\n", pictures


def draw(folder: Path, pictures: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        (folder / f"{name}.svg").write_text(picture)


@dataclass
class Options:
    """Where results are, and what to make of them."""

    results: Path = option(RESULTS, "folder of JSON files, and of the page", type=Path)
    plots: Path | None = option(None, "folder for every plot", type=Path)

    def __post_init__(self) -> None:
        if not any(self.results.glob("*.json")):
            raise ValueError(f"--results {self.results}: there is no JSON file; run latency.py or quality.py first")


def main() -> None:
    options = parsed(Options, __doc__)
    results = load(options.results)
    text, pictures = page(results)
    (options.results / "README.md").write_text(text)
    draw(options.results / "plots", pictures)
    if options.plots:
        draw(options.plots, plots(results))
    if options.results.resolve() == RESULTS:
        measured.write(RESULTS)
    print(f"-> {options.results / 'README.md'}")


if __name__ == "__main__":
    main()
