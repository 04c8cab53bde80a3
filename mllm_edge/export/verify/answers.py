"""Whole answers against the reference's: the same tokens, and parts that are the same. A check for each kind of answer.

Where rounding may turn a word, parts are compared that both make for the reference's words.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mllm_edge import index
from mllm_edge.bundle.answers import AnswerEntry, RetrievedAnswer
from mllm_edge.bundle.manifest import Manifest, Parity
from mllm_edge.bundle.sources import States
from mllm_edge.export.verify.difference import parity
from mllm_edge.export.verify.language_model import is_exact
from mllm_edge.export.verify.samples import Samples, pictures
from mllm_edge.models.language.reference import Reference
from mllm_edge.models.plan import ExportPlan
from mllm_edge.runtime.answer import Mask, Part, Picture
from mllm_edge.runtime.answers.index import Index
from mllm_edge.runtime.answers.kinds import KINDS
from mllm_edge.runtime.answers.resize import iou
from mllm_edge.runtime.decoding.text_stream import TextStream
from mllm_edge.runtime.decoding.tokenizers import named
from mllm_edge.runtime.embedding import Embedder
from mllm_edge.runtime.engines.interface import Floats
from mllm_edge.runtime.model import Model
from mllm_edge.runtime.turn import Drawing, InputPicture, Turn

ANSWER = 256  # most tokens
INDEXED, SEEN = 32, 100  # scenes that answers may retrieve, other ones than those that stages see
Measured = tuple[dict[str, float], dict[str, float]]  # values, and the tolerance that depends on the kind


def answer_rows(
    model: Model,
    plan: ExportPlan,
    samples: Samples,
    pictures: Sequence[np.ndarray],
    prompts: Sequence[Floats],
    reference: Reference,
    drawing: Drawing,
) -> list[Parity]:
    """A row for each kind of answer beside text; `drawing` is how both make pictures."""
    entries = [entry for entry in plan.answers if entry.kind in CHECKS]
    if not entries:
        return []
    exact, same = is_exact(model.manifest), []
    pairs: dict[str, list[tuple[list[Part], list[Part]]]] = {entry.kind: [] for entry in entries}
    for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        # 1. The reference's answer, and the states that its parts are made of.
        most = min(ANSWER, model.language_model.context - len(prompt))
        tokens = _answer(model, plan, reference, prompt, most)
        states = _states(model, plan, reference, prompt, tokens)
        # 2. The bundle's.
        answer = model.generate(
            plan.question, picture, drawing=drawing, max_tokens=most, temperature=0.0, repeat_penalty=1.0, beams=1
        )
        same.append(answer.tokens.ids == tokens)
        if not exact and states:
            answer = model.generate(plan.question, picture, drawing=drawing, teacher_forced=tokens, max_tokens=1)
        # 3. The same kinds of parts out of PyTorch.
        for entry in entries:
            wanted = _parts(model, plan, samples, number, entry, picture, states, tokens, drawing)
            pairs[entry.kind].append(([part for part in answer.parts if _kind(part) == entry.kind], wanted))
    rows = []
    for entry in entries:
        measured, tolerance = CHECKS[entry.kind](pairs[entry.kind], exact)
        shared = {"same_tokens": float(np.mean(same))}
        rows.append(
            parity(entry.kind, {**shared, **measured}, {**({"same_tokens": 1.0} if exact else {}), **tolerance})
        )
    return rows


@contextlib.contextmanager
def retrievable(folder: Path, manifest: Manifest, target: str | None, drawing: Drawing) -> Iterator[Drawing]:
    """`drawing`; with an index of scenes where the bundle retrieves from its own and none is given."""
    makes = any(isinstance(entry, RetrievedAnswer) and entry.picture for entry in manifest.answers)
    if drawing.index is not None or not makes:
        yield drawing
        return
    with tempfile.TemporaryDirectory() as place:
        scenes = Path(place, "scenes")
        scenes.mkdir()
        for number, pixels in enumerate(pictures(INDEXED, first=SEEN)):
            Image.fromarray(pixels).save(scenes / f"{number}.png")
        with Embedder(folder, target, verify_hash=False) as embedder:
            made = index.build(embedder, [scenes], Path(place, "index"))
        yield dataclasses.replace(drawing, index=Index(made.folder))


def _answer(model: Model, plan: ExportPlan, reference: Reference, prompt: Floats, most: int) -> list[int]:
    """The reference's greedy answer, in which a group's first token is followed by the others."""
    known = named(model.tokenizer)
    forced = {known[first]: [known[one] for one in rest] for first, rest in plan.generation.groups.items()}
    members = {token for rest in forced.values() for token in rest}
    if not forced:
        return reference.generate(prompt, most, model.tokenizer.is_end)
    tokens: list[int] = []
    text = TextStream(plan.prompt.stop, strip=False, late=plan.prompt.late_stop)
    while len(tokens) < most and not text.stopped:
        logits = reference.forced(prompt, tokens)[0][-1]
        logits[list(members)] = -np.inf
        token = int(logits.argmax())
        group = [token, *forced.get(token, [])]
        if len(group) > 1 and len(tokens) + len(group) > most:
            break
        tokens += group
        if model.tokenizer.is_end(token):
            break
        for one in group:
            text.feed(model.tokenizer.piece(one))
    return tokens


def _states(
    model: Model, plan: ExportPlan, reference: Reference, prompt: Floats, tokens: list[int]
) -> dict[str, list[Floats]]:
    _, hidden = reference.forced(prompt, tokens)  # row i after i tokens
    found: dict[str, list[Floats]] = {}
    known = named(model.tokenizer)
    for source in plan.sources:
        if isinstance(source, States):
            ids = [known[token] for token in source.tokens]
            places = [place for place, token in enumerate(tokens) if token in ids]
            if places:
                found[source.name] = [hidden[place + (source.at == "token")] for place in places]
    return found


def _parts(
    model: Model,
    plan: ExportPlan,
    samples: Samples,
    number: int,
    entry: AnswerEntry,
    picture: np.ndarray,
    states: dict[str, list[Floats]],
    tokens: list[int],
    drawing: Drawing,
) -> list[Part]:
    """An answer's parts by the runtime's own function, over PyTorch modules."""
    wanted = getattr(entry, "states", "")
    if wanted and wanted not in states:
        return []
    marks = {source.name: source.tokens for source in plan.sources if isinstance(source, States)}
    ended = tokens[:-1] if model.tokenizer.is_end(tokens[-1]) else tokens
    turn = Turn(
        plan.question,
        InputPicture("", Image.fromarray(picture)),
        model.tokenizer,
        drawing=drawing,
        ids=ended,
        states=states,
        marks=marks,
        inputs={stage.name: stage.inputs for stage in plan.stages},
        values={name: np.stack(each) for name, each in states.items()},
    )
    return list(KINDS[entry.kind](turn, entry, samples.need(number, turn.values)))


def _kind(part: Part) -> str:
    """The kind of answer that a part belongs to."""
    if isinstance(part, Picture):
        return "pictures" if part.origin == "generated" else "retrieved"
    return "masks" if isinstance(part, Mask) else "boxes"


def masks(pairs: Sequence[tuple[list[Part], list[Part]]], exact: bool) -> Measured:
    """The worst IoU of a mask with the reference's."""
    ious = [1.0]
    for found, wanted in pairs:
        if len(found) != len(wanted):
            ious.append(0.0)
        else:
            ious += [
                iou(a.pixels, b.pixels) for a, b in zip(found, wanted) if isinstance(a, Mask) and isinstance(b, Mask)
            ]
    return {"masks": float(len(ious) - 1), "mask_iou": min(ious)}, {"mask_iou": 0.99 if exact else 0.97}


def generated(pairs: Sequence[tuple[list[Part], list[Part]]], exact: bool) -> Measured:
    """The largest mean difference of a generated picture from the reference's, in levels of 0..255."""
    off, count = [0.0], 0
    for found, wanted in pairs:
        count += len(wanted)
        if len(found) != len(wanted):
            off.append(255.0)
            continue
        for a, b in zip(found, wanted):
            if isinstance(a, Picture) and isinstance(b, Picture):
                difference = np.asarray(a.image, np.float32) - np.asarray(b.image, np.float32)
                off.append(float(np.abs(difference).mean()))
    return {"pictures": float(count), "mean_levels": max(off)}, {"mean_levels": 1.0 if exact else 8.0}


def found_again(pairs: Sequence[tuple[list[Part], list[Part]]], exact: bool) -> Measured:
    """The share of retrieved pictures that are the reference's, and how far the scores of the nearest are apart.

    Random weights have pictures of nearly equal scores, whose order quantization may turn: then the scores count, which
    differ by no more than what is looked for does.
    """
    both = [
        (a, b)
        for found, wanted in pairs
        for a, b in zip(found, wanted)
        if isinstance(a, Picture) and isinstance(b, Picture)
    ]
    whole = all(len(found) == len(wanted) for found, wanted in pairs)
    same = [a.file == b.file for a, b in both]
    scores = [(a.score or 0.0, b.score or 0.0) for a, b in both]
    apart = max([0.0 if whole else 1.0, *(abs(a - b) / max(abs(a), abs(b), 1e-6) for a, b in scores)])
    measured = {"pictures": float(len(same)), "same_files": float(np.mean(same or [True])) * whole}
    return {**measured, "score_off": apart}, {"same_files": 1.0} if exact else {"score_off": 0.25}


CHECKS: dict[str, Callable[[Sequence[tuple[list[Part], list[Part]]], bool], Measured]] = {
    "masks": masks,
    "pictures": generated,
    "retrieved": found_again,
}
