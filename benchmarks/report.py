"""All results as one page, and on demand every plot.

python benchmarks/report.py                                # benchmarks/results/README.md, and its pictures
python benchmarks/report.py --html runs/report             # report.html and all plots as files, in runs/report
python benchmarks/report.py --html runs/report --images runs/quality    # with before-and-after sliders
"""

import base64
import html
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from options import option, parsed
from overview import overview
from plots import plots
from tables import Rows, markdown, profile_rows, rows_of, title

RESULTS = Path(__file__).with_name("results")
INTRODUCTION = """# Results

Speed is that of the real architectures with random weights, against PyTorch's fused attention; quality that of the
[demo model](../../examples/demo_model/README.md). [What was measured](../../docs/measured.md) explains them, and has
the paper's own figures and what nobody has measured yet.

Made by `python benchmarks/report.py` from the JSON files beside this page, which hold every raw figure. To add to it,
run `benchmarks/latency.py`, `quality.py` or `operations.py`, copy the JSON file from `runs/results/` to this folder,
and make the page anew. More plots, and sliders over images: `python benchmarks/report.py --html runs/report`.
"""
PROFILE = "Where the time goes, in all calls together:"
STYLE = """body{font:16px system-ui;max-width:1000px;margin:2em auto;padding:0 1em}
.pair{position:relative;display:inline-block;margin:.5em}.pair img{width:256px;display:block}
.pair img+img{position:absolute;top:0;left:0}.pair input{width:256px}svg{max-width:100%;height:auto}
figure{margin:1em 0}"""
SCRIPT = """document.querySelectorAll('.pair input').forEach(s=>s.oninput=()=>{
s.parentNode.querySelectorAll('img')[1].style.clipPath=`inset(0 0 0 ${s.value}%)`});
document.querySelectorAll('svg').forEach(s=>s.onwheel=e=>{e.preventDefault();
const b=s.viewBox.baseVal,k=e.deltaY<0?.9:1.1;b.x+=b.width*(1-k)/2;b.y+=b.height*(1-k)/2;b.width*=k;b.height*=k})"""


@dataclass
class Section:
    """The results of one command: a heading, lines of text, and tables with what stands above them."""

    heading: str
    lines: list[str]
    tables: list[tuple[str, Rows]]


def load(folder: Path) -> list[dict[str, Any]]:
    """The results of a folder: GPUs before CPUs, latency before quality, then by model, data type and size."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"), key=lambda path: path.stem)]

    def order(result: dict[str, Any]) -> tuple[Any, ...]:
        settings = result["settings"]
        without_gpu = "gpu" not in result["hardware"]
        return without_gpu, result["kind"], settings["model"], settings.get("dtype") or "", settings.get("size", 0)

    return sorted(found, key=order)


def sections(results: list[dict[str, Any]]) -> list[Section]:
    found = []
    for command, group in itertools.groupby(results, key=lambda result: result["command"]):
        first, *others = together = list(group)
        heading = title(first)
        if first["kind"] == "latency":
            heading += f", {first['settings']['steps']} steps{', by ratio' * bool(first['settings']['ratios'])}"
        if others:
            heading = heading.replace(f", {first['settings']['size']} px", "")
        versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
        notes = dict.fromkeys(note for result in together for note in result.get("notes", []))
        tables = [(f"{r['settings']['size']} pixels:" if others else "", rows_of(r)) for r in together]
        tables += [(PROFILE, profile_rows(result)) for result in together if "profile" in result]
        found.append(Section(heading, [f"`{command}`, {versions}", *notes], tables))
    return found


def page(results: list[dict[str, Any]]) -> tuple[str, dict[str, str]]:
    """The page as Markdown, its long tables folded away, and its pictures as SVG text, by name."""
    answers, pictures = overview(results)
    parts = [INTRODUCTION.rstrip(), *answers, "## Every run"]
    for section in sections(results):
        parts += [f"<details><summary>{html.escape(section.heading)}</summary>", *section.lines]
        for above, rows in section.tables:
            parts += [above] * bool(above) + [markdown(rows)]
        parts.append("</details>")
    return "\n\n".join(parts) + "\n", pictures


def report(drawn: dict[str, str], images: Path | None) -> str:
    """Every plot, to be zoomed, and sliders over images."""
    parts = ["<h2>Plots</h2><p>Zoom with the wheel.</p>", *(f"<figure>{text}</figure>" for text in drawn.values())]
    parts += ["<h2>Without and with</h2>", sliders(images)] if images else []
    head = f'<meta charset="utf-8"><title>agentsd: benchmarks</title><style>{STYLE}</style>'
    body = "\n".join(["<h1>agentsd: benchmarks</h1>", *parts])
    return f"<!doctype html>{head}{body}<script>{SCRIPT}</script>"


def sliders(folder: Path, count: int = 3) -> str:
    """Unpatched and patched on top of each other, for the first images of each method."""
    parts = []
    for method in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("real")):
        if method.name == "unpatched":
            continue
        parts.append(f"<h3>{html.escape(method.name)}</h3>")
        for path in sorted(method.glob("*.png"))[:count]:
            urls = [base64.b64encode(one.read_bytes()).decode() for one in (folder / "unpatched" / path.name, path)]
            pair = "".join(f'<img src="data:image/png;base64,{url}" alt="">' for url in urls)
            parts.append(f'<span class="pair">{pair}<input type="range" value="0" aria-label="compare"></span>')
    return "\n".join(parts)


@dataclass
class Options:
    """Where results are, and what to make of them."""

    results: Path = option(RESULTS, "folder of JSON files, and of the page", type=Path)
    html: Path | None = option(None, "folder for report.html and every plot", type=Path)
    images: Path | None = option(None, "folder that quality.py filled, for the sliders", type=Path)

    def __post_init__(self) -> None:
        if not any(self.results.glob("*.json")):
            raise ValueError(f"--results {self.results}: there is no JSON file; run latency.py or quality.py first")


def main() -> None:
    options = parsed(Options, __doc__)
    results = load(options.results)
    text, pictures = page(results)
    (options.results / "README.md").write_text(text)
    (options.results / "plots").mkdir(exist_ok=True)
    for name, picture in pictures.items():
        (options.results / "plots" / f"{name}.svg").write_text(picture)
    print(f"-> {options.results / 'README.md'}")
    if options.html:
        options.html.mkdir(parents=True, exist_ok=True)
        drawn = plots(results)
        for name, text in drawn.items():
            (options.html / f"{name}.svg").write_text(text)
        (options.html / "report.html").write_text(report(drawn, options.images))
        print(f"-> {options.html / 'report.html'}")


if __name__ == "__main__":
    main()
