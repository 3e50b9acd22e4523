"""All results as one Markdown page and one self-contained HTML file.

python benchmarks/report.py                   # benchmarks/results/README.md and report.html
python benchmarks/report.py --images runs/quality   # with a before-and-after slider for each method
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import re
from pathlib import Path
from typing import Any

from plots import plots
from tables import latency_rows, markdown, operations_rows, profile_rows, quality_rows, title

RESULTS = Path(__file__).with_name("results")
INTRODUCTION = """# Results

Made by `python benchmarks/report.py` from the JSON files beside this page, which hold every raw figure. Measured on
CPUs alone: speed on the real architectures with random weights, quality on the demo model, whose 32x32 latents have
1,024 tokens. Speed-ups are medians of ratios taken within a round, against PyTorch's fused attention; the range is
that of the rounds. Operations and the peak of memory are counted: of the tensors of a call and of the features that it
keeps, without weights and the workspace of kernels. What the paper measured (an RTX 4090, naive attention) is in the
README, and is labelled so. Nobody has measured yet, to our knowledge: FID of this implementation with trained Stable
Diffusion weights, and its speed on a GPU against fused attention.
"""
PROFILE = "Where the time goes, in all calls of a round together: a schedule has fewer whole ones to each cheap one."
STYLE = """body{font:16px system-ui;max-width:1000px;margin:2em auto;padding:0 1em}table{border-collapse:collapse}
td,th{padding:.25em .7em;border-bottom:1px solid #ccc;text-align:right}td:first-child,th:first-child{text-align:left}
.pair{position:relative;display:inline-block;margin:.5em}.pair img{width:256px;display:block}
.pair img+img{position:absolute;top:0;left:0}.pair input{width:256px}svg{max-width:100%;height:auto}
figure{margin:1em 0}"""
SCRIPT = """document.querySelectorAll('.pair input').forEach(s=>s.oninput=()=>{
s.parentNode.querySelectorAll('img')[1].style.clipPath=`inset(0 0 0 ${s.value}%)`});
document.querySelectorAll('svg').forEach(s=>s.onwheel=e=>{e.preventDefault();
const b=s.viewBox.baseVal,k=e.deltaY<0?.9:1.1;b.x+=b.width*(1-k)/2;b.y+=b.height*(1-k)/2;b.width*=k;b.height*=k})"""


def load(folder: Path) -> list[dict[str, Any]]:
    """The results of a folder, latency before quality, by model, data type and size."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    order = lambda r: (r["kind"], r["settings"]["model"], r["settings"].get("dtype", ""), r["settings"].get("size", 0))
    return sorted(found, key=order)


def rows_of(result: dict[str, Any]) -> list[tuple[str, ...]]:
    return {"latency": latency_rows, "operations": operations_rows, "quality": quality_rows}[result["kind"]](result)


def page(results: list[dict[str, Any]], drawn: dict[str, str]) -> str:
    parts = [INTRODUCTION, "\n".join(f"- [{heading(result)}](#{anchor(heading(result))})" for result in results)]
    parts += ["## Plots", "\n".join(f'<img src="plots/{name}.svg" alt="{name}" width="49%">' for name in drawn)]
    for result in results:
        parts += [f"## {heading(result)}", f"`{result['command']}`", versions(result), markdown(rows_of(result))]
        parts += result.get("notes", [])
        if "profile" in result:
            parts += [PROFILE, markdown(profile_rows(result))]
    return "\n\n".join(parts) + "\n"


def heading(result: dict[str, Any]) -> str:
    """One for each result: those of the same case differ in steps, or in whether ratios are compared."""
    if result["kind"] != "latency":
        return title(result)
    return f"{title(result)}, {result['settings']['steps']} steps{', by ratio' * bool(result['settings']['ratios'])}"


def anchor(text: str) -> str:
    """Of a heading, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-")


def versions(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in result["versions"].items())


def sliders(folder: Path, count: int = 3) -> str:
    """Unpatched and patched on top of each other, for the first images of each method."""
    parts = []
    for method in sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(("real", "unpatched"))
    ):
        parts.append(f"<h3>{html.escape(method.name)}</h3>")
        for path in sorted(method.glob("*.png"))[:count]:
            pair = [data_url(folder / "unpatched" / path.name), data_url(path)]
            images = "".join(f'<img src="{url}" alt="">' for url in pair)
            parts.append(f'<span class="pair">{images}<input type="range" value="0" aria-label="compare"></span>')
    return "\n".join(parts)


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def html_table(rows: list[tuple[str, ...]]) -> str:
    cells = lambda row, tag: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
    first, *rest = (cells(row, "td" if i else "th") for i, row in enumerate(rows))
    return f"<table><tr>{first}</tr>{''.join(f'<tr>{row}</tr>' for row in rest)}</table>"


def report(results: list[dict[str, Any]], drawn: dict[str, str], images: Path | None) -> str:
    parts = []
    for result in results:
        parts.append(f"<h2>{html.escape(heading(result))}</h2><p><code>{html.escape(result['command'])}</code></p>")
        parts += [html_table(rows_of(result)), *(f"<p>{html.escape(note)}</p>" for note in result.get("notes", []))]
        if "profile" in result:
            parts += [f"<p>{PROFILE}</p>", html_table(profile_rows(result))]
    figures = [f"<figure>{text}</figure>" for text in drawn.values()]
    pictures = ["<h2>Without and with</h2>", sliders(images)] if images else []
    body = "\n".join(["<h2>Plots</h2><p>Zoom with the wheel.</p>", *figures, *pictures, *parts])
    head = f'<meta charset="utf-8"><title>agentsd: benchmarks</title><style>{STYLE}</style>'
    return f"<!doctype html>{head}<h1>agentsd: benchmarks</h1>{body}<script>{SCRIPT}</script>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON files")
    parser.add_argument("--images", type=Path, help="folder that quality.py filled, for the sliders")
    args = parser.parse_args()
    results = load(args.results)
    if not results:
        parser.error(f"--results {args.results}: there is no JSON file; run latency.py or quality.py first")
    drawn, folder = plots(results), args.results / "plots"
    folder.mkdir(exist_ok=True)
    for old in (*folder.glob("growth-*.svg"), *folder.glob("front-*.svg")):
        old.unlink()
    for name, text in drawn.items():
        (folder / f"{name}.svg").write_text(text)
    (args.results / "README.md").write_text(page(results, drawn))
    (args.results / "report.html").write_text(report(results, drawn, args.images))
    print(f"-> {args.results / 'README.md'}, {args.results / 'report.html'}")


if __name__ == "__main__":
    main()
