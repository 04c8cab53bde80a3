"""The connectors of the field on the tiny LLaVA, equal training: python benchmarks/connectors.py

    python benchmarks/connectors.py [--steps 400] [--cases 500] [--out runs/connectors] [--json FILE]

Each begins anew between the shipped encoder and the shipped decoder, which reads 64 rows of another connector so far,
and is trained with it by the recipe llava-wide for the same steps from the same pictures. Then its bundle (fp32, q8_0)
is asked questions about test scenes, and for the time to the first token of a picture that it has not seen, all bundles
in turn. Finished runs in --out are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

import mllm_edge
from mllm_edge.evaluate.cases import scenes
from mllm_edge.evaluate.run import evaluate
from mllm_edge.export.export import export
from mllm_edge.machine.facts import cpu_name
from mllm_edge.recipes import train
from mllm_edge.runtime import Model

KINDS = (("linear", 0), ("mlp2x_gelu", 0), ("qformer", 16), ("perceiver", 16), ("cabstractor", 16))


def made(kind: str, tokens: int, steps: int, place: Path) -> Path:
    """The bundle of a connector after training."""
    run, bundle = place / kind, place / f"{kind}.bundle"
    if not (run / "report.json").is_file():
        settings = ["init.llava=tiny", "init.vision_encoder=", f"connector={kind}", f"tokens={tokens}", f"out={run}"]
        train("llava-wide", [*settings, f"steps={steps}", "evaluate=0"], (run / "state").exists(), lambda *_: None)
    if not bundle.exists():
        export("llava", str(run / "checkpoint"), out=bundle)
    return bundle


def first_token_ms(model: Model, question: str, picture: Image.Image) -> float:
    """From the question to the first piece of its answer."""
    began = time.perf_counter()
    pieces = model.stream(question, picture)
    next(pieces)
    taken = 1000 * (time.perf_counter() - began)
    list(pieces)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/connectors"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    models = {}
    for kind, tokens in KINDS:
        model = models[kind] = mllm_edge.load(made(kind, tokens, options.steps, options.out), threads=1)
        stage = model.manifest.stage("connector")
        row: dict[str, Any] = {"connector": kind, "tokens": stage.outputs[0].shape[-2], "megabytes": stage.bytes / 1e6}
        for name in ("scenes-questions", "wide-questions"):
            data = scenes(name, options.cases, "test")
            result = evaluate(model, data, None, False, False, lambda *_: None)
            row[name] = result["scores"]["exact"]
        rows.append(row)
    times: dict[str, list[float]] = {kind: [] for kind in models}
    for case in scenes("scenes-questions", options.cases + options.repeat, "test").cases[options.cases :]:
        for kind, model in models.items():
            times[kind].append(first_token_ms(model, case.question, case.open()))
    table = Table(title=f"{options.steps} steps each, {cpu_name()}, one thread")
    for column in ("connector", "tokens", "MB", "scenes %", "wide %", "first token, ms"):
        table.add_column(column, justify="left" if column == "connector" else "right")
    for row in rows:
        row["first_token_ms"] = statistics.median(times[row["connector"]])
        scores = [f"{row[name]:.1f}" for name in ("scenes-questions", "wide-questions")]
        table.add_row(
            row["connector"], str(row["tokens"]), f"{row['megabytes']:.1f}", *scores, f"{row['first_token_ms']:.1f}"
        )
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"machine": cpu_name(), "steps": options.steps, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
