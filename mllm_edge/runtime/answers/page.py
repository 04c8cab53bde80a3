"""A question and its answer as one HTML page: words and pictures in their order, the pictures inside it.

The page asks for nothing from outside and runs nothing: its policy forbids both, and whatever a model or a file says is
text in it.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mllm_edge.errors import BadInput
from mllm_edge.places import file_can_be_made, no_link, writing
from mllm_edge.runtime.answer import Answer, Mask, Picture, TextBox
from mllm_edge.runtime.answers.write import overlay

SUFFIX = ".html"
MARK = "<!doctype html><!-- an answer of mllm-edge -->"  # the first line of a page, which the next one may replace
LARGEST = 2048  # pixels of a picture's longest side; larger ones are made smaller
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1e1e1e; --paper: #ffffff; --soft: #f0f2f4; --faint: #5c6670; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181a; --soft: #24282c; --faint: #9aa4ae; } }
body { margin: 2rem auto; max-width: 46rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
section { margin: 1rem 0; }
.question { padding: 0.25rem 1rem; border-radius: 0.5rem; background: var(--soft); }
h2, figcaption { color: var(--faint); font-size: 0.85rem; font-weight: normal; margin: 0.25rem 0; }
p { margin: 0.5rem 0; white-space: pre-wrap; unicode-bidi: isolate; }
figure { margin: 0.75rem 0; }
img { display: block; max-width: 100%; height: auto; border-radius: 0.25rem; }
"""
# What no page may hold, or what hides and reorders text: control characters but new line and tab, marks of direction,
# halves of characters.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def is_page(out: Path) -> bool:
    """Whether a place to write is a page and not a folder."""
    return out.suffix.lower() == SUFFIX and not out.is_dir()


def check_place(file: Path) -> None:
    """Raise BadInput where a page cannot be written, or would replace a file that is no page of ours."""
    no_link(file)
    with writing(file):
        file_can_be_made(file)
        if not file.is_file():
            return
        with file.open("rb") as stream:
            ours = stream.read(len(MARK)) == MARK.encode()
    if not ours:
        raise BadInput(f"{file} is not from an answer of ours; move it away or give another --out")


def write_page(question: Sequence[str | Image.Image], answer: Answer, file: Path) -> Path:
    """Write a page, which is there as a whole or not at all.

    Args:
        question: its parts, in order.
        answer: the answer.
        file: where.

    Raises:
        BadInput: see `check_place`.
    """
    check_place(file)
    beside = file.with_name(f".{file.name}.partial")
    no_link(beside)
    with writing(file):
        beside.write_text(page(question, answer), encoding="utf-8")
        beside.replace(file)
    return file


def page(question: Sequence[str | Image.Image], answer: Answer) -> str:
    """The page. Masks and boxes are shown over their picture, behind the text."""
    asked = [_words(part) if isinstance(part, str) else _figure(part, "a picture of the question") for part in question]
    said: list[str] = []
    for part in answer.in_order:
        said.append(_words(part) if isinstance(part, str) else _figure(part.image, *_told(part)))
    marks = [part for part in answer.parts if isinstance(part, (Mask, TextBox))]
    if marks and answer.picture is not None:
        said.append(_figure(overlay(answer.picture, marks, answer.text), "the answer over the picture"))
    return "\n".join(
        [
            MARK,
            '<html><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>An answer</title><style>{STYLE}</style></head><body>",
            '<section class="question"><h2>Question</h2>',
            *asked,
            '</section><section class="answer"><h2>Answer</h2>',
            *said,
            "</section></body></html>\n",
        ]
    )


def _told(picture: Picture) -> tuple[str, str]:
    """What a picture of the answer is called, and what is said of it."""
    told = [f"{picture.origin} picture"]
    if picture.file:
        told.append(Path(picture.file).name)
    if picture.score is not None:
        told.append(f"score {picture.score:.4f}")
    told += [f"{choice} {chance:.0%}" for choice, chance in picture.decided.items()]
    return f"a {told[0]}", ", ".join(told)


def _words(text: str) -> str:
    return f'<p dir="auto">{_safe(text.strip())}</p>' if text.strip() else ""


def _figure(image: Image.Image, name: str, caption: str = "") -> str:
    shown = image.convert("RGB")
    shown.thumbnail((LARGEST, LARGEST))
    data = io.BytesIO()
    shown.save(data, "PNG")
    source = base64.b64encode(data.getvalue()).decode("ascii")
    below = f'<figcaption dir="auto">{_safe(caption)}</figcaption>' if caption else ""
    size = f'width="{shown.width}" height="{shown.height}"'
    return f'<figure><img alt="{_safe(name)}" {size} src="data:image/png;base64,{source}">{below}</figure>'


def _safe(text: str) -> str:
    return html.escape(_HIDDEN.sub("\ufffd", text))
