"""The commands that ask a bundle: run and chat."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mllm_edge.commands.frame import Boxes, BundleFolder, Decoding, Drawing, Loading, Pictures, TaskName, verb
from mllm_edge.commands.screen import Screen
from mllm_edge.commands.streams import read_all
from mllm_edge.errors import BadInput
from mllm_edge.places import can_be_made

if TYPE_CHECKING:
    import PIL.Image

    from mllm_edge.runtime import Answer


@verb(
    'run my.bundle "What is in the picture?" --image scene.png',
    'run my.bundle "What differs?" --image a.png --image b.png --stream',
    'run my.bundle "Please segment the red circle in this image." --image scene.png --out answer',
    'run my.bundle "USER: <image> Caption: ASSISTANT:" --image scene.png --raw --json',
)
def run(
    screen: Screen,
    loading: Loading,
    decoding: Decoding,
    drawing: Drawing,
    bundle: BundleFolder,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="By default what stdin says.")] = None,
    image: Pictures = None,
    box: Boxes = None,
    task: TaskName = "",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="Where pictures of the answer go.")
    ] = None,
    teacher_forced: Annotated[
        str | None, typer.Option(metavar="ANSWER", help="Generate nothing; make the masks and pictures of this answer.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it comes.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="PROMPT is the whole text; no template.")] = False,
) -> None:
    """Ask a bundle once. The answer goes to stdout, its times to stderr."""
    question = prompt if prompt is not None else _piped()
    pictures, boxes = _pictures(image), _boxes(box)
    if out:
        can_be_made(out)
    with loading.open(bundle) as model:
        if out and not model.manifest.answers:
            raise BadInput(f"{bundle} ({', '.join(model.manifest.tasks)}) answers with text alone; leave out --out")
        if loading.memory_budget:
            screen.aside(str(model.memory))
        asked: dict[str, Any] = {"task": task, "raw": raw, "teacher_forced": teacher_forced, "drawing": drawing.open()}
        pieces = model.stream(question, pictures, boxes, **asked, **vars(decoding))
        stream = stream and not screen.as_json and teacher_forced is None
        answer = _shown(screen, pieces, stream)
    if not stream:
        screen.result(answer.to_json(), answer.text)
    _write(screen, answer, out)
    screen.times(answer)


@verb("chat my.bundle --image scene.png", "chat my.bundle --image scene.png --temperature 0.7 --seed 1")
def chat(
    screen: Screen,
    loading: Loading,
    decoding: Decoding,
    drawing: Drawing,
    bundle: BundleFolder,
    image: Pictures = None,
    task: TaskName = "",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="Where pictures of the answers go.")
    ] = None,
) -> None:
    """Ask in turns about pictures. They are encoded once; /image FILE shows another, /box x1,y1,x2,y2 gives a region to
    the next question, /quit or Ctrl-D ends."""
    screen.kept = "the dialogue is not kept"
    pictures, boxes = _pictures(image), _boxes(None)
    turns: list[dict[str, Any]] = []
    screen.finished = {"turns": turns}
    if out:
        can_be_made(out)
    with loading.open(bundle) as model:
        if out:
            _forget_turns(out)
        dialogue = model.chat(**vars(decoding))
        while (line := screen.question("> ")) is not None and (text := line.strip()) != "/quit":
            command, _, argument = text.partition(" ")
            with screen.turn():
                if command == "/image":
                    pictures += _pictures([Path(argument.strip())])
                elif command == "/box":
                    boxes += _boxes([argument.strip()])
                elif text:
                    items = dialogue.stream(text, pictures, boxes, task, drawing.open())
                    answer = _shown(screen, items, not screen.as_json)
                    turns.append({"prompt": text, **answer.to_json()})
                    pictures, boxes = [], []
                    _write(screen, answer, out and out / f"turn_{len(turns)}")
                    screen.times(answer)
    if screen.as_json:
        screen.result(screen.finished)


def _boxes(texts: list[str] | None) -> list[list[float]]:
    """Boxes as they are typed."""
    boxes = []
    for text in texts or []:
        try:
            boxes.append([float(value) for value in text.split(",")])
        except ValueError:
            raise BadInput(f"{text!r} is no box; write it as x1,y1,x2,y2 in pixels") from None
    return boxes


def _write(screen: Screen, answer: Answer, out: Path | None) -> None:
    """What the answer holds beside text under `out`; an answer of text alone leaves nothing, and says so."""
    if out:
        from mllm_edge.runtime.answers.write import write

        files = write(answer, out)
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        screen.aside(
            f"wrote {files[0]}{more}" if files else f"the answer is text alone, so nothing is written to {out}"
        )


def _forget_turns(out: Path) -> None:
    """Take away what an earlier dialogue left, so that none of it looks like a part of this one."""
    from mllm_edge.runtime.answers.write import clear

    for folder in out.glob("turn_*"):
        clear(folder)
        with contextlib.suppress(OSError):  # something else is in it
            folder.rmdir()


def _pictures(paths: list[Path] | None) -> list[PIL.Image.Image]:
    """Read pictures before anything large is loaded."""
    from mllm_edge.runtime.images import load_image

    return [load_image(path) for path in paths or []]


def _piped() -> str:
    text = "" if sys.stdin.isatty() else read_all().strip()
    if not text:
        raise BadInput("there is no prompt; write it after the bundle, or pipe it in")
    return text


def _shown(screen: Screen, items: Iterator[str | Answer], show: bool) -> Answer:
    """The answer at the end of a stream, whose pieces are shown as they come."""
    for item in items:
        if not isinstance(item, str):
            if show:
                screen.text("\n")
            return item
        if show:
            screen.text(item)
    raise AssertionError("a stream ends with an Answer")
