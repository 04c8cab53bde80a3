"""What LION bundles get right on test scenes, with the right type of task and with the wrong one.

    python benchmarks/lion_quality.py lion.bundle [more.bundle ...] [--cases 500] [--wrong] [--no-tagger] [--json FILE]

One row per bundle and series of scenes, none of which any recipe trains on: exact answers to questions, captions that
name every object, boxes whose IoU is at least 0.5 and 0.75, exact names of regions. `--wrong` adds rows where the
router has the other type of task (the mixture's adapters are exchanged; the rule for boxes stays),
`--no-tagger` leaves the tags out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

import mllm_edge
from mllm_edge.bundle.sources import Task
from mllm_edge.evaluate.cases import scenes
from mllm_edge.evaluate.run import evaluate
from mllm_edge.runtime import Model

MEASURED = (
    ("questions", "exact"),
    ("captions", "all_named"),
    ("boxes", "box50"),
    ("boxes", "box75"),
    ("regions", "exact"),
)


def exchange(model: Model) -> None:
    """Give every task the other type."""
    for source in model.manifest.sources:
        if isinstance(source, Task):
            source.values.update({task: 1 - kind for task, kind in source.values.items()})


def measure(model: Model, series: str, cases: int) -> list[float]:
    """Percent, in the order of `MEASURED`."""
    found = {}
    for kind in dict(MEASURED):
        result = evaluate(model, scenes(f"{series}-{kind}", cases, "test"), None, False, False, lambda *_: None)
        found[kind] = result["scores"]
    return [found[kind][score] for kind, score in MEASURED]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+")
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wrong", action="store_true")
    parser.add_argument("--no-tagger", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table = Table(title=f"percent of {options.cases} each")
    for column in ("bundle", "scenes", "type", *(f"{kind}\n{score}" for kind, score in MEASURED)):
        table.add_column(column, justify="left" if column in ("bundle", "scenes", "type") else "right")
    rows = []
    for bundle in options.bundles:
        for wrong in (False, True) if options.wrong else (False,):
            with mllm_edge.load(bundle, threads=options.threads, tagger=not options.no_tagger) as model:
                if wrong:
                    exchange(model)
                for series in ("scenes", "wide"):
                    numbers = measure(model, series, options.cases)
                    kind = "wrong" if wrong else "right"
                    rows.append({"bundle": bundle, "scenes": series, "type": kind, "percent": numbers})
                    table.add_row(Path(bundle).stem, series, kind, *(f"{number:.1f}" for number in numbers))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
