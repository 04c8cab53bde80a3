"""Scores of masks and grounded texts, as GLaMM's paper counts them (groundingLMM eval/), and the paper's numbers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mllm_edge.errors import MissingPackage
from mllm_edge.evaluate.cases import Truth
from mllm_edge.evaluate.texts import cider, exact, meteor, words
from mllm_edge.runtime import rle
from mllm_edge.runtime.masks import box_of, iou

Mask = NDArray[np.bool_]
LEAST_IOU, LEAST_WORDS = 0.5, 0.5  # of a pair that counts as found
# GLaMM-7B, fine-tuned (images/tables of groundingLMM); in percent, CIDEr too.
PAPER: dict[str, tuple[str, dict[str, float]]] = {
    "grounded": ("GLaMM-GCG 7B, GranD-f val", {"meteor": 16.2, "cider": 47.2, "ap50": 30.8, "miou": 66.3}),
    "referring": ("GLaMM-RefSeg 7B, RefCOCO val", {"ciou": 79.5}),
    "regions": ("GLaMM-RegCap 7B, RefCOCOg", {"meteor": 16.2, "cider": 106.0}),
}


@dataclass(frozen=True)
class Prediction:
    """What a bundle answered: the text, and masks with their phrases."""

    text: str
    masks: list[Mask]
    phrases: list[str]


def score(kind: str, answers: Sequence[tuple[Truth, Prediction]]) -> dict[str, float]:
    """All scores of a kind of data set, in percent."""
    shares = {"referring": _referring, "grounded": _grounded, "regions": _regions}[kind](answers)
    return {name: round(100 * value, 2) for name, value in shares.items()}


def _referring(answers: Sequence[tuple[Truth, Prediction]]) -> dict[str, float]:
    """cIoU (all intersections over all unions), gIoU (mean IoU, 1 where both are empty), and answers that have a mask.
    The first mask of an answer counts."""
    shared = united = 0
    each = []
    for truth, prediction in answers:
        wanted = truth.masks[0]
        found = prediction.masks[0] if prediction.masks else np.zeros_like(wanted)
        shared += np.count_nonzero(found & wanted)
        united += np.count_nonzero(found | wanted)
        each.append(iou(found, wanted))
    answered = [bool(prediction.masks) for _, prediction in answers]
    return {"ciou": shared / max(united, 1), "giou": float(np.mean(each)), "answered": float(np.mean(answered))}


def _grounded(answers: Sequence[tuple[Truth, Prediction]]) -> dict[str, float]:
    mious = [miou(prediction.masks, truth.masks) for truth, prediction in answers]
    found = sum(matches(truth, prediction) for truth, prediction in answers)
    wanted = sum(len(truth.masks) for truth, _ in answers)
    named = [_named(truth, prediction) for truth, prediction in answers]
    return {
        "miou": float(np.mean(mious)),
        "recall": found / max(wanted, 1),
        "ap50": ap50(answers),
        "named": sum(named) / max(wanted, 1),
        "all_named": float(np.mean([n == len(truth.phrases) for n, (truth, _) in zip(named, answers, strict=True)])),
        **_texts(answers),
    }


def _regions(answers: Sequence[tuple[Truth, Prediction]]) -> dict[str, float]:
    right = [exact(prediction.text, truth.texts) for truth, prediction in answers]
    return {"exact": float(np.mean(right)), **_texts(answers)}


def _texts(answers: Sequence[tuple[Truth, Prediction]]) -> dict[str, float]:
    found, wanted = [prediction.text for _, prediction in answers], [truth.texts for truth, _ in answers]
    return {
        "meteor": float(np.mean([meteor(text, texts) for text, texts in zip(found, wanted, strict=True)])),
        "cider": cider(found, wanted),
    }


def miou(found: Sequence[Mask], wanted: Sequence[Mask]) -> float:
    """Mean IoU of the pairs that are made one by one, the best first, while masks overlap; 0 where none do."""
    table = np.array([[iou(a, b) for b in wanted] for a in found]).reshape(len(found), len(wanted))
    pairs = []
    while table.size and table.max() > 0:
        row, column = np.unravel_index(int(table.argmax()), table.shape)
        pairs.append(float(table[row, column]))
        table = np.delete(np.delete(table, row, axis=0), column, axis=1)
    return float(np.mean(pairs)) if pairs else 0.0


def matches(truth: Truth, prediction: Prediction) -> int:
    """How many masks are found with their words, the best pairs first; the count ends at the first best pair that
    fails, as the original's does. Words must share half of theirs (the original asks BERT)."""
    table = np.array([[iou(a, b) for b in prediction.masks] for a in truth.masks])
    table = table.reshape(len(truth.masks), len(prediction.masks))
    number = 0
    while table.size and table.max() >= LEAST_IOU:
        row, column = np.unravel_index(int(table.argmax()), table.shape)
        if word_overlap(truth.phrases[row], prediction.phrases[column]) < LEAST_WORDS:
            break
        number += 1
        table[row, :] = table[:, column] = 0
    return number


def word_overlap(a: str, b: str) -> float:
    """F1 of the words of two phrases, articles left out."""
    one, other = (set(words(text)) - {"a", "an", "the", "another"} for text in (a, b))
    shared = len(one & other)
    return 2 * shared / (len(one) + len(other)) if shared else 0.0


def _named(truth: Truth, prediction: Prediction) -> int:
    """How many objects the answer names: all words of the object's phrase are in a phrase of the answer of its own."""
    left = [set(words(phrase)) for phrase in prediction.phrases]
    number = 0
    for phrase in sorted(truth.phrases, key=lambda text: -len(words(text))):
        owner = next((names for names in left if set(words(phrase)) <= names), None)
        if owner is not None:
            number += 1
            left.remove(owner)
    return number


def ap50(answers: Sequence[tuple[Truth, Prediction]]) -> float:
    """COCO's AP at IoU 0.5, all masks of one class with score 1, by pycocotools.

    Raises:
        MissingPackage: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO  # type: ignore[import-untyped]
        from pycocotools.cocoeval import COCOeval  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise MissingPackage("pycocotools", "eval") from None
    truths = [_coco(mask, number) for number, (truth, _) in enumerate(answers) for mask in truth.masks]
    found = [{**_coco(mask, number), "score": 1.0} for number, (_, p) in enumerate(answers) for mask in p.masks]
    if not truths or not found:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        gold = COCO()
        gold.dataset = {
            "info": {},
            "images": [_size(number, *answer) for number, answer in enumerate(answers)],
            "categories": [{"id": 1}],
            "annotations": [{**entry, "id": number} for number, entry in enumerate(truths, start=1)],
        }
        gold.createIndex()
        judge = COCOeval(gold, gold.loadRes(found), "segm")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return max(0.0, float(judge.stats[1]))


def _size(number: int, truth: Truth, prediction: Prediction) -> dict[str, int]:
    height, width = next((mask.shape for mask in [*truth.masks, *prediction.masks]), (1, 1))
    return {"id": number, "height": height, "width": width}


def _coco(mask: Mask, image: int) -> dict[str, Any]:
    x1, y1, x2, y2 = box_of(mask) or [0, 0, 0, 0]
    return {
        "image_id": image,
        "category_id": 1,
        "iscrowd": 0,
        "segmentation": rle.encode(mask),
        "area": int(np.count_nonzero(mask)),
        "bbox": [x1, y1, x2 - x1, y2 - y1],
    }
