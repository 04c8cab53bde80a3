"""Asks a bundle every case of a data set and keeps the answers in a file, from which a run can resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mllm_edge.bundle.read import read_text
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.evaluate.cases import Case, DataSet, Truth
from mllm_edge.evaluate.scores import Prediction, score
from mllm_edge.models.glamm.prompts import TEACHER_FORCED
from mllm_edge.places import writing
from mllm_edge.recipes.data.segmentation import decode_segmentation
from mllm_edge.runtime import Model

MAX_TOKENS = 512


def evaluate(
    model: Model,
    data: DataSet,
    out: Path | None,
    resume: bool,
    teacher_forced: bool,
    report: Callable[[int, int], None],
    partial: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Ask every case and compute the scores.

    Args:
        model: a loaded bundle.
        data: the cases.
        out: JSON lines of the answers, written as they arrive; the first line identifies bundle and data set.
        resume: resume from `out`.
        teacher_forced: for referring expressions the answer's text is given, and only the mask is the bundle's.
        report: called with (cases done, cases in all).
        partial: called with the result of the cases so far where one fails, before its error is raised.

    Returns:
        `dataset`, `kind`, `cases` and `scores` (percent).

    Raises:
        BadInput: `out` exists already, or holds another bundle's or data set's answers; an unusable case.
        MissingPackage: a package for scoring is not installed.
    """
    if teacher_forced and data.kind != "referring":
        raise BadInput("--teacher-forced goes with referring expressions; leave it out")
    if not data.cases:
        raise BadInput(f"{data.name} has no cases; check the file and the split")
    title = {
        "kind": data.kind,
        "digest": data.digest,
        "bundle": model.manifest.language_model.sha256,
        "stages": {stage.name: stage.sha256 for stage in model.manifest.stages},
        "dataset": data.name,
        "cases": len(data.cases),
        "teacher_forced": teacher_forced,
    }
    done = _started(out, title, resume) if out else {}
    report(len(done), len(data.cases))

    def answered(case: Case, number: int) -> tuple[Truth, Prediction]:
        picture = case.open()
        answer = done.get(case.name)
        if answer is None:
            answer = case.ask(model) if case.ask else _ask(model, case, picture, teacher_forced)
            if out:
                with writing(out), out.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"case": case.name, **answer}) + "\n")
            report(number, len(data.cases))
        return case.truth(picture), _prediction(answer)

    judged = 0
    failed: list[BaseException] = []

    def answers() -> Iterator[tuple[Truth, Prediction]]:
        nonlocal judged
        for number, case in enumerate(data.cases, start=1):
            try:
                pair = answered(case, number)
            except (MllmEdgeError, OSError, KeyboardInterrupt) as error:
                failed.append(error)
                if not judged:  # nothing to score
                    raise
                return
            judged = number
            yield pair

    scores = score(data.kind, answers())
    result = {"dataset": data.name, "kind": data.kind, "cases": judged, "scores": scores}
    if failed:
        partial(result)
        raise failed[0]
    return result


def _ask(model: Model, case: Case, picture: Any, teacher_forced: bool) -> dict[str, Any]:
    question = model.question(*case.own) if case.own else case.question
    answer = model.generate(
        question,
        picture,
        case.boxes or None,
        teacher_forced=TEACHER_FORCED if teacher_forced else None,
        max_tokens=min(MAX_TOKENS, model.language_model.context // 2),
        temperature=0.0,
    )
    masks = [{"phrase": mask.phrase, "rle": mask.rle} for mask in answer.masks]
    return {"text": answer.text, "masks": masks, "boxes": [box["box"] for box in answer.boxes]}


def _prediction(entry: dict[str, Any]) -> Prediction:
    if "found" in entry:
        return Prediction("", [], entry["found"], free=entry["free"])
    masks = [decode_segmentation(mask["rle"], *mask["rle"]["size"]) for mask in entry["masks"]]
    return Prediction(entry["text"], masks, [mask["phrase"] for mask in entry["masks"]], entry["boxes"])


def _started(out: Path, title: dict[str, Any], resume: bool) -> dict[str, dict[str, Any]]:
    """The answers in the file; a new file gets its first line."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(title) + "\n", encoding="utf-8")
        return {}
    if not resume:
        raise BadInput(f"{out} is there already; continue it with --resume, or give another --out")
    text = read_text(out, 1 << 30)
    whole = text[: text.rfind("\n") + 1]  # a killed run may leave half a line
    lines = whole.splitlines()
    try:
        if not lines or json.loads(lines[0]) != title:
            raise BadInput(f"{out} holds the answers of another bundle or data set; give another --out")
        entries = [json.loads(line) for line in lines[1:]]
        done = {entry["case"]: _kept(entry, title["kind"]) for entry in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{out} is damaged ({error}); give another --out") from None
    with out.open("r+b") as stream:
        stream.truncate(len(whole.encode()))
    return done


def _kept(entry: dict[str, Any], kind: str) -> dict[str, Any]:
    """What the file has of an answer. Raises KeyError or TypeError where it is something else."""
    if kind == "drawings":
        return {"found": [str(name) for name in entry["found"]], "free": bool(entry["free"])}
    return {key: entry[key] for key in ("text", "masks", "boxes")}
