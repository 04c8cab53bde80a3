"""How well a llava-smol bundle names drawings in a style not trained on, and on photographs not trained on.

    python -m mllm_edge.recipes.data.pictures data/smol
    python benchmarks/smol_quality.py llava-smol.bundle data/smol [--sheet answers.png] [--json out.json]

Right means: the answer, without its article, is one of the names that the emoji lists give the thing. Twelve answers of
each set, every 25th, are printed as they are. The sheet shows the same with their pictures; it is not for publishing
without the drawings' own licenses (CC-BY 4.0, Apache-2.0, MIT, CC BY-SA 4.0, GPL-2).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track

import mllm_edge
from mllm_edge.recipes.data.pictures.sprites import plain

SETS = {"style": "drawn in a style not trained on", "photos": "pasted on photographs not trained on"}
SHOWN = 25  # every 25th answer is shown


def answers(model: mllm_edge.Model, folder: Path, name: str, console: Console) -> list[dict[str, Any]]:
    """The entries of a set, each with the model's answer."""
    entries: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    for entry in track(entries, name, console=console):
        question = entry["conversations"][0]["value"].removeprefix("<image>\n")
        entry["answer"] = model.generate(question, image=folder / entry["image"], max_tokens=16).text.strip()
        entry["right"] = plain(entry["answer"]) in entry["names"]
    return entries


def sheet(found: list[dict[str, Any]], folder: Path, png: Path) -> None:
    """Draw pictures with their answers beneath."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(-(-len(found) // 6), 6, figsize=(12, 2.5 * -(-len(found) // 6)))
    for place, entry in zip(axes.flat, found, strict=False):
        with Image.open(folder / entry["image"]) as picture:
            place.imshow(picture)
        color = "tab:green" if entry["right"] else "tab:red"
        place.set_title(entry["answer"], fontsize=9, color=color, wrap=True)
    for place in axes.flat:
        place.axis("off")
    figure.tight_layout()
    figure.savefig(png, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("data", type=Path)
    parser.add_argument("--sheet", type=Path, metavar="PNG")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    console = Console(stderr=True)
    result: dict[str, Any] = {}
    shown = []
    with mllm_edge.load(options.bundle) as model:
        for name, title in SETS.items():
            found = answers(model, options.data, name, console)
            result[name] = round(100 * sum(entry["right"] for entry in found) / len(found), 1)
            print(f"{title}: {result[name]} % of {len(found)}")
            shown += found[::SHOWN]
    for entry in shown:
        thing, mark = entry["conversations"][1]["value"], "right" if entry["right"] else "wrong"
        print(f"| {entry['symbol']} | {thing} | {entry['answer']} | {mark} |")
    if options.sheet:
        sheet(shown, options.data, options.sheet)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
