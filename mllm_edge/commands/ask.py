"""The commands that ask a bundle: run and chat."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mllm_edge.commands.frame import Boxes, BundleFolder, Decoding, Drawing, Loading, Pictures, Tags, TaskName, verb
from mllm_edge.commands.screen import Screen
from mllm_edge.commands.streams import read_all
from mllm_edge.errors import BadInput
from mllm_edge.places import can_be_made

if TYPE_CHECKING:
    import PIL.Image

    from mllm_edge.runtime import Answer, Model

HELP = """/image FILE              show another picture
/describe                the bundle's own question for a description
/segment WHAT            a mask, as in: /segment the red circle
/locate WHAT             a box, as in: /locate the red circle
/region x1,y1,x2,y2      what is in this region, in pixels
/box x1,y1,x2,y2         a region for the placeholder in the next question
/quit, Ctrl-D            end"""


@verb(
    'run my.bundle "What is in the picture?" --image scene.png',
    'run my.bundle "What differs?" --image a.png --image b.png --stream',
    "run my.bundle --describe --image scene.png --out answer",
    'run my.bundle --segment "the red circle" --image scene.png --out answer',
    'run my.bundle --locate "the red circle" --image scene.png --out answer',
    "run my.bundle --region 124,181,247,304 --image scene.png",
    "run my.bundle --prompt-file parts.json --out answer.html",
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
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Instead of PROMPT and --image: a JSON list of texts and pictures in any order, "
            'as ["Is", {"image": "a.png"}, "a cat?"].',
        ),
    ] = None,
    box: Boxes = None,
    describe: Annotated[
        bool, typer.Option("--describe", help="Instead of PROMPT: the bundle's own question for a description.")
    ] = False,
    segment: Annotated[
        str | None, typer.Option(metavar="WHAT", help="Instead of PROMPT: a mask of this, as 'the red circle'.")
    ] = None,
    locate: Annotated[
        str | None, typer.Option(metavar="WHAT", help="Instead of PROMPT: a box of this, as 'the red circle'.")
    ] = None,
    region: Annotated[
        str | None, typer.Option(metavar="x1,y1,x2,y2", help="Instead of PROMPT: what is in this region, in pixels.")
    ] = None,
    task: TaskName = "",
    tags: Tags = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            metavar="DIR|FILE.html",
            help="Where pictures of the answer go; or question and answer as one page.",
        ),
    ] = None,
    teacher_forced: Annotated[
        str | None, typer.Option(metavar="ANSWER", help="Generate nothing; make the masks and pictures of this answer.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it comes.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="PROMPT is the whole text; no template.")] = False,
) -> None:
    """Ask a bundle once. The answer goes to stdout, its times to stderr."""
    from mllm_edge.runtime.answers.page import check_place, is_page, write_page
    from mllm_edge.runtime.interleaved import apart, read_parts

    own = [("describe", "")] * describe
    others = (("segment", segment), ("locate", locate), ("region", region))
    own += [(name, what) for name, what in others if what is not None]
    if len(own) + (prompt is not None) + (prompt_file is not None) > 1:
        raise BadInput(
            "there are several questions; give one of PROMPT, --prompt-file, --describe, --segment, --locate and "
            "--region"
        )
    if region is not None and box:
        raise BadInput("--region asks about its own box; leave out --box")
    if prompt_file and image:
        raise BadInput("the pictures stand in --prompt-file; leave out --image")
    parts = read_parts(prompt_file) if prompt_file else None
    question: str | list[str | PIL.Image.Image] = parts or (prompt if prompt is not None or own else _piped()) or ""
    pictures, boxes = _pictures(image), _boxes([region] if region is not None else box)
    if out:
        (check_place if is_page(out) else can_be_made)(out)
    made = drawing.open(bundle, out)
    with loading.open(bundle) as model, screen.late_steps() as report:
        if out and not model.manifest.answers and not is_page(out):
            raise BadInput(
                f"{bundle} ({', '.join(model.manifest.tasks)}) answers with text alone; leave out --out, or "
                "give a page (answer.html)"
            )
        if loading.memory_budget:
            screen.aside(str(model.memory))
        if own:
            name, what = own[0]
            question = model.question(name, "" if name == "region" else what)
        words = question if isinstance(question, str) else " ".join(part for part in question if isinstance(part, str))
        asked: dict[str, Any] = {"task": _task(screen, model, words, task), "tags": _tags(tags)}
        asked |= {"raw": raw, "teacher_forced": teacher_forced, "drawing": replace(made, report=report)}
        pieces = model.stream(question, pictures, boxes, **asked, **vars(decoding))
        stream = stream and not screen.as_json and teacher_forced is None
        answer = _shown(screen, pieces, stream)
    if not stream:
        screen.result(answer.to_json(), answer.text)
    _say_none(screen, model, answer)
    if out and is_page(out):
        asked_for = apart(question, pictures, model.manifest.prompt) if isinstance(question, str) else question
        screen.aside(f"wrote {write_page(asked_for, answer, out)}")
    else:
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
    tags: Tags = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="Where pictures of the answers go.")
    ] = None,
) -> None:
    """Ask in turns about pictures. They are encoded once; /help lists what else can be typed."""
    if out and out.suffix.lower() == ".html":
        raise BadInput(f"a dialogue is written into a folder, and {out} is named as a page; give a folder as --out")
    screen.kept = "the dialogue is not kept"
    pictures, boxes = _pictures(image), _boxes(None)
    turns: list[dict[str, Any]] = []
    screen.finished = {"turns": turns}
    if out:
        can_be_made(out)
    made = drawing.open(bundle, out)
    with loading.open(bundle) as model:
        if out:
            _forget_turns(out)
        dialogue = model.chat(**vars(decoding))
        size = pictures[-1].size if pictures else None
        while (line := screen.question("> ")) is not None and (text := line.strip()) != "/quit":
            command, _, argument = text.partition(" ")
            with screen.turn():
                if command == "/help":
                    screen.aside(HELP)
                    continue
                if command == "/image":
                    pictures += _pictures([_typed_path(argument)])
                    size = pictures[-1].size
                    continue
                if command == "/box":
                    boxes += _checked(_boxes([argument.strip()]), size)
                    continue
                if command in ("/describe", "/segment", "/locate"):
                    text = model.question(command[1:], argument)
                elif command == "/region":
                    boxes, text = _checked(_boxes([argument.strip()]), size), model.question("region")
                elif command.startswith("/"):
                    raise BadInput(f"there is no {command}; /help lists what there is")
                if text:
                    chosen = _task(screen, model, text, task)
                    place = out and out / f"turn_{len(turns) + 1}"
                    with screen.late_steps() as report:
                        shown = replace(drawing.previewed(made, place), report=report)
                        items = dialogue.stream(text, pictures, boxes, chosen, shown, _tags(tags))
                        answer = _shown(screen, items, not screen.as_json)
                    _say_none(screen, model, answer)
                    turns.append({"prompt": text, **answer.to_json()})
                    pictures, boxes = [], []
                    _write(screen, answer, place)
                    screen.times(answer)
    if screen.as_json:
        screen.result(screen.finished)


def _task(screen: Screen, model: Model, question: str, task: str) -> str:
    """The question's task; one that is guessed is said."""
    chosen = model.task_of(question, task)
    if chosen and not task:
        screen.aside(f"task {chosen}, as the question sounds; --task chooses another")
    return chosen


def _tags(text: str | None) -> list[str] | None:
    """Tags as they are typed."""
    return None if text is None else [tag.strip() for tag in text.split(",")] if text.strip() else []


def _typed_path(text: str) -> Path:
    """A path as people type it: perhaps quoted, perhaps with a ~."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    return Path(text).expanduser()


def _checked(boxes: list[list[float]], size: tuple[int, int] | None) -> list[list[float]]:
    """Boxes of the picture that is talked about. Raises BadInput where they cannot be."""
    from mllm_edge.runtime.boxes import check_boxes

    if size is None:
        raise BadInput("there is no picture yet that a box could be of; show one with /image FILE")
    check_boxes([tuple(box) for box in boxes], size)
    return boxes


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


def _say_none(screen: Screen, model: Model, answer: Answer) -> None:
    """Say that an answer that could have pictures has none."""
    if model.manifest.generation.groups and not answer.images:
        screen.aside("no picture came; --picture-scale above 1 makes them likelier")


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
            screen.end_text()
            return item
        if show:
            screen.text(item)
    raise AssertionError("a stream ends with an Answer")
