"""Exact answers of LLaVA bundles on held-out questions about scenes.

    python benchmarks/llava_quality.py llava.bundle [more.bundle ...] [--questions 1000] [--json out.json]

Every question is about a scene of the test split, which no recipe trains on, and is asked through the bundle with the
short-answer wording of LLaVA's benchmarks. A second set asks about (color, shape) pairs held out of training; both
again about wide scenes. Exact means: the answer's text equals the expected word or phrase.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mllm_edge
from mllm_edge.bundle.sources import Pixels
from mllm_edge.scenes import SHORT, Question, Scene, held_out_questions, questions, render, sample_scene, sample_wide

Sampler = Callable[[str, int], Scene]
Asker = Callable[[Scene, np.random.Generator], list[Question]]
SETS: dict[str, tuple[Sampler, str, Asker]] = {
    "test": (sample_scene, "test", questions),
    "held_out": (sample_scene, "held_out", held_out_questions),
    "wide test": (sample_wide, "test", questions),
    "wide held_out": (sample_wide, "held_out", held_out_questions),
}


def cases(sample: Sampler, split: str, ask: Asker, number: int) -> Iterator[tuple[Scene, Question]]:
    """One question per scene, its kind drawn first so that all kinds weigh the same."""
    index = found = 0
    while found < number:
        scene = sample(split, index)
        rng = np.random.default_rng([23, index])
        index += 1
        asked = ask(scene, rng)
        if asked:
            kind = rng.choice(sorted({question.kind for question in asked}))
            of_kind = [question for question in asked if question.kind == kind]
            found += 1
            yield scene, of_kind[int(rng.integers(len(of_kind)))]


def measure(bundle: str, name: str, number: int, console: Console) -> dict[str, float]:
    """Share of exact answers, over all and by kind of question."""
    right: dict[str, list[bool]] = defaultdict(list)
    with mllm_edge.load(bundle) as model:
        size = next(source.size for source in model.manifest.sources if isinstance(source, Pixels))
        asked = track(cases(*SETS[name], number), f"{bundle}: {name}", total=number, console=console)
        for scene, question in asked:
            picture = render(scene, scene.finish.side if scene.finish else size)
            answer = model.generate(question.question + SHORT, image=picture, max_tokens=16)
            exact = answer.text.strip() == question.answer
            right["all"].append(exact)
            right[question.kind].append(exact)
    return {kind: round(100 * float(np.mean(values)), 2) for kind, values in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--json", help="also write the numbers here")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    rows = {
        bundle: {name: measure(bundle, name, arguments.questions, console) for name in SETS}
        for bundle in arguments.bundles
    }
    kinds = ["all", "what", "color", "count", "where", "yesno"]
    table = Table("bundle", "questions", *kinds, title=f"exact answers in % ({arguments.questions} questions a row)")
    for bundle, splits in rows.items():
        for split, shares in splits.items():
            table.add_row(bundle, split, *(f"{shares[kind]:.1f}" if kind in shares else "-" for kind in kinds))
    Console().print(table)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
