"""`make demo`: export the LLaVA that ships with the package, draw a picture and ask about it.

    python examples/demo.py

What it makes lies in build/demo/. The bundle is exported once; delete the folder to begin again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

import mllm_edge
from mllm_edge.cli import main as mllm_edge_command
from mllm_edge.recipes.scenes import SHORT, Question, Scene, questions, render, sample_scene

FOLDER = Path("build/demo")
BUNDLE = FOLDER / "llava.bundle"
PICTURE = FOLDER / "scene.png"
SCENE = sample_scene("test", 9)  # a split that no recipe trains on
KINDS = ("what", "count", "where", "yesno")


def asked(scene: Scene) -> list[Question]:
    """One question of each kind that the scene allows."""
    known = questions(scene, np.random.default_rng(0))
    return [question for kind in KINDS for question in [q for q in known if q.kind == kind][:1]]


def in_characters(picture: Image.Image, columns: int = 48) -> Text:
    """The picture as half-block characters, two pixels each."""
    pixels = np.asarray(picture.resize((columns, columns), Image.Resampling.BOX))
    text = Text()
    for top, bottom in zip(pixels[::2], pixels[1::2]):
        for (r, g, b), (r2, g2, b2) in zip(top.tolist(), bottom.tolist()):
            text.append("▀", style=f"rgb({r},{g},{b}) on rgb({r2},{g2},{b2})")
        text.append("\n")
    return text


def main() -> int:
    console = Console()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not (BUNDLE / "bundle.json").is_file():
        console.print(f"Exporting LLaVA tiny to {BUNDLE}: ONNX and GGUF, checked against PyTorch. A minute, once.")
        if code := mllm_edge_command(["export", "llava", "--target", "cpu", "-o", str(BUNDLE)]):
            return code
    picture = Image.fromarray(render(SCENE, 336))
    picture.save(PICTURE)
    if console.is_terminal:
        console.print(in_characters(picture))
    answers = Table("", "question", "answer", "right answer")
    with mllm_edge.load(BUNDLE) as model:
        stages = ["preprocess", *model.stages, "prefill", "decode", "total"]
        times = Table("ms", *stages)
        for number, question in enumerate(asked(SCENE), start=1):
            answer = model.generate(question.question + SHORT, image=PICTURE, max_tokens=16)
            answers.add_row(str(number), question.question, answer.text, question.answer)
            times.add_row(str(number), *(f"{answer.timings[stage]:.1f}" for stage in stages))
    console.print(answers, times)
    console.print(f"The picture is {PICTURE}. It was encoded for the first question only. Ask another:")
    line = f'.venv/bin/mllm-edge run {BUNDLE} "{asked(SCENE)[0].question}" --image {PICTURE}'
    console.print(line, soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
