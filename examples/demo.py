"""`make demo`: export the shipped LLaVA and GLaMM, draw a picture and ask about it.

    python examples/demo.py

Output goes to build/demo/. The bundles are exported once; delete the folder to start over.
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
from mllm_edge.models.glamm.prompts import GROUNDED_QUESTION
from mllm_edge.runtime.answers.write import COLORS, write
from mllm_edge.scenes import SHORT, Question, Scene, questions, render, sample_scene

FOLDER = Path("build/demo")
BUNDLE, GLAMM = FOLDER / "llava.bundle", FOLDER / "glamm.bundle"
ANSWER = FOLDER / "answer"
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
    for system, bundle in (("llava", BUNDLE), ("glamm", GLAMM)):
        if not (bundle / "bundle.json").is_file():
            console.print(
                f"Exporting {system} tiny to {bundle}: ONNX and GGUF, checked against PyTorch. A minute, once."
            )
            if code := mllm_edge_command(["export", system, "--target", "cpu", "-o", str(bundle)]):
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
    show_masks(console, picture)
    return 0


def show_masks(console: Console, picture: Image.Image) -> None:
    """GLaMM's answer: its phrases in the colors of their masks, and the picture under them."""
    with mllm_edge.load(GLAMM) as model:
        answer = model.generate(GROUNDED_QUESTION, image=picture)
    overlay, *_ = write(answer, ANSWER)
    text = Text(answer.text)
    for number, mask in enumerate(answer.masks):
        red, green, blue = COLORS[number % len(COLORS)]
        text.stylize(f"bold rgb({red},{green},{blue})", *mask.span)
    console.print(f"\nGLaMM, asked for a description with masks ({len(answer.masks)} of them):")
    console.print(text)
    if console.is_terminal:
        with Image.open(overlay) as drawn:
            console.print(in_characters(drawn.crop((0, 0, drawn.width, drawn.width))))
    console.print(f"The picture with its masks is {overlay}. Ask for one thing:")
    item = SCENE.objects[0]
    question = f"Please segment the {item.color} {item.shape} in this image."
    line = f'.venv/bin/mllm-edge run {GLAMM} "{question}" --image {PICTURE} --out {FOLDER / "mask"}'
    console.print(line, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
