"""Scores of masks and grounded texts as in GLaMM's paper (groundingLMM eval/), and the paper's numbers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mllm_edge.errors import MissingPackage
from mllm_edge.evaluate.cases import Truth
from mllm_edge.evaluate.texts import cider, exact, meteor, vqa, words
from mllm_edge.runtime.answers import rle
from mllm_edge.runtime.answers.resize import box_of, iou
from mllm_edge.runtime.boxes import box_iou

Mask = NDArray[np.bool_]
LEAST_IOU, LEAST_WORDS = 0.5, 0.5  # thresholds for a pair to count as found
# GLaMM-7B, fine-tuned (images/tables of groundingLMM); in percent, CIDEr too.
PAPER: dict[str, tuple[str, dict[str, float]]] = {
    "grounded": ("GLaMM-GCG 7B, GranD-f val", {"meteor": 16.2, "cider": 47.2, "ap50": 30.8, "miou": 66.3}),
    "referring": ("GLaMM-RefSeg 7B, RefCOCO val", {"ciou": 79.5}),
    "regions": ("GLaMM-RegCap 7B, RefCOCOg", {"meteor": 16.2, "cider": 106.0}),
    # LION-12B (tables of its repository); a file of another data set is compared with these all the same.
    "boxes": ("LION-12B fine-tuned, RefCOCO val", {"box50": 89.8}),
    "captions": ("LION-12B, COCO", {"cider": 139.25}),
}


@dataclass(frozen=True)
class Prediction:
    """A bundle's answer: the text, masks with their phrases, and boxes in pixels; of a drawing, the phrases that the
    judge finds, and whether it came freely."""

    text: str
    masks: list[Mask]
    phrases: list[str]
    boxes: Sequence[Sequence[float]] = ()
    free: bool = True


def score(kind: str, answers: Iterable[tuple[Truth, Prediction]]) -> dict[str, float]:
    """All scores of a kind of data set, in percent. `answers` is consumed once, in order."""
    shares = _KINDS[kind](answers)
    return {name: round(100 * value, 2) for name, value in shares.items()}


def _referring(answers: Iterable[tuple[Truth, Prediction]]) -> dict[str, float]:
    """cIoU (all intersections over all unions), gIoU (mean IoU, 1 where both are empty), and the share of answers with
    a mask. Only the first mask of an answer counts."""
    shared = united = 0
    each, answered = [], []
    for truth, prediction in answers:
        wanted = truth.masks[0]
        found = prediction.masks[0] if prediction.masks else np.zeros_like(wanted)
        shared += np.count_nonzero(found & wanted)
        united += np.count_nonzero(found | wanted)
        each.append(iou(found, wanted))
        answered.append(bool(prediction.masks))
    return {"ciou": shared / max(united, 1), "giou": float(np.mean(each)), "answered": float(np.mean(answered))}


def _grounded(answers: Iterable[tuple[Truth, Prediction]]) -> dict[str, float]:
    mious, all_named = [], []
    found = named = wanted = 0
    judge, texts = Ap50(), _Texts()
    for truth, prediction in answers:
        mious.append(miou(prediction.masks, truth.masks))
        found += matches(truth, prediction)
        wanted += len(truth.masks)
        named += (number := _named(truth, prediction))
        all_named.append(number == len(truth.phrases))
        judge.add(truth, prediction)
        texts.add(truth, prediction)
    return {
        "miou": float(np.mean(mious)),
        "recall": found / max(wanted, 1),
        "ap50": judge.value(),
        "named": named / max(wanted, 1),
        "all_named": float(np.mean(all_named)),
        **texts.scores(),
    }


def _regions(answers: Iterable[tuple[Truth, Prediction]]) -> dict[str, float]:
    right, texts = [], _Texts()
    for truth, prediction in answers:
        right.append(exact(prediction.text, truth.texts))
        texts.add(truth, prediction)
    return {"exact": float(np.mean(right)), **texts.scores()}


def _questions(answers: Iterable[tuple[Truth, Prediction]]) -> dict[str, float]:
    """Share of answers that equal the expected word or phrase."""
    return {"exact": float(np.mean([prediction.text.strip() == truth.texts[0] for truth, prediction in answers]))}


def _boxes(answers: Iterable[tuple[Truth, Prediction]]) -> dict[str, float]:
    """Shares of first boxes with an IoU of at least 0.5 (REC's accuracy) and 0.75, and of answers with a box."""
    ious, answered = [], []
    for truth, prediction in answers:
        ious.append(box_iou(prediction.boxes[0], truth.boxes[0]) if prediction.boxes else 0.0)
        answered.append(bool(prediction.boxes))
    shares = {f"box{round(100 * least)}": float(np.mean([iou >= least for iou in ious])) for least in (0.5, 0.75)}
    return {**shares, "box_iou": float(np.mean(ious)), "box_answered": float(np.mean(answered))}


def _captions(answers: Iterable[tuple[Truth, Prediction]]) -> dict[str, float]:
    """How many objects are named, where the truth has phrases, and how near the text is to the references."""
    named, wanted, whole, texts = 0, 0, [], _Texts()
    for truth, prediction in answers:
        spoken = f" {' '.join(words(prediction.text))} "
        number = sum(min(spoken.count(f" {phrase} "), truth.phrases.count(phrase)) for phrase in {*truth.phrases})
        named, wanted = named + number, wanted + len(truth.phrases)
        whole.append(number == len(truth.phrases))
        texts.add(truth, prediction)
    phrases = {"named": named / wanted, "all_named": float(np.mean(whole))} if wanted else {}
    return {**phrases, **texts.scores()}


def _vqa(answers: Iterable[tuple[Truth, Prediction]]) -> dict[str, float]:
    return {"vqa": float(np.mean([vqa(prediction.text, truth.texts) for truth, prediction in answers]))}


def _drawings(answers: Iterable[tuple[Truth, Prediction]]) -> dict[str, float]:
    """What the judge finds in the drawn pictures, and in the scenes' own, which says how far it can be believed."""
    from mllm_edge.recipes.tasks.scene_classifier import judged

    pairs = list(answers)
    scenes = [truth.scene for truth, _ in pairs if truth.scene]
    drawn = [{_pair(name) for name in prediction.phrases} for _, prediction in pairs]
    own = [{_pair(name) for name in truth.seen} for truth, _ in pairs]
    free = {"drawn_freely": float(np.mean([prediction.free for _, prediction in pairs]))}
    return {**judged(drawn, scenes, "drawn"), **free, **judged(own, scenes, "judge")}


def _pair(name: str) -> tuple[str, str]:
    color, _, shape = name.partition(" ")
    return color, shape


_KINDS = {
    "questions": _questions,
    "referring": _referring,
    "grounded": _grounded,
    "regions": _regions,
    "boxes": _boxes,
    "captions": _captions,
    "vqa": _vqa,
    "drawings": _drawings,
}


class _Texts:
    """Texts with their accepted references."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.wanted: list[list[str]] = []

    def add(self, truth: Truth, prediction: Prediction) -> None:
        self.found.append(prediction.text)
        self.wanted.append(truth.texts)

    def scores(self) -> dict[str, float]:
        pairs = zip(self.found, self.wanted, strict=True)
        return {"meteor": float(np.mean([meteor(*pair) for pair in pairs])), "cider": cider(self.found, self.wanted)}


def miou(found: Sequence[Mask], wanted: Sequence[Mask]) -> float:
    """Mean IoU of greedily matched pairs (highest IoU first, overlapping masks only); 0 if no masks overlap."""
    table = np.array([[iou(a, b) for b in wanted] for a in found]).reshape(len(found), len(wanted))
    pairs = []
    while table.size and table.max() > 0:
        row, column = np.unravel_index(int(table.argmax()), table.shape)
        pairs.append(float(table[row, column]))
        table = np.delete(np.delete(table, row, axis=0), column, axis=1)
    return float(np.mean(pairs)) if pairs else 0.0


def matches(truth: Truth, prediction: Prediction) -> int:
    """How many masks are found with their words, best pairs first; stops at the first best pair that fails, as the
    original does. Phrases must share half of their words (the original compares BERT embeddings)."""
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
    """F1 of the words of two phrases, without articles."""
    one, other = (set(words(text)) - {"a", "an", "the", "another"} for text in (a, b))
    shared = len(one & other)
    return 2 * shared / (len(one) + len(other)) if shared else 0.0


def _named(truth: Truth, prediction: Prediction) -> int:
    """How many objects the answer names: all words of the object's phrase occur in a separate phrase of the answer."""
    left = [set(words(phrase)) for phrase in prediction.phrases]
    number = 0
    for phrase in sorted(truth.phrases, key=lambda text: -len(words(text))):
        owner = next((names for names in left if set(words(phrase)) <= names), None)
        if owner is not None:
            number += 1
            left.remove(owner)
    return number


class Ap50:
    """COCO's AP at IoU 0.5 by pycocotools, all masks in one class with score 1. Masks are kept as run lengths."""

    def __init__(self) -> None:
        self._sizes: list[dict[str, int]] = []
        self._truths: list[dict[str, Any]] = []
        self._found: list[dict[str, Any]] = []

    def add(self, truth: Truth, prediction: Prediction) -> None:
        """Add the masks of one picture."""
        number = len(self._sizes)
        height, width = next((mask.shape for mask in [*truth.masks, *prediction.masks]), (1, 1))
        self._sizes.append({"id": number, "height": height, "width": width})
        self._truths += [_coco(mask, number) for mask in truth.masks]
        self._found += [{**_coco(mask, number), "score": 1.0} for mask in prediction.masks]

    def value(self) -> float:
        """The score, 0..1. Raises MissingPackage when pycocotools is not installed."""
        try:
            from pycocotools.coco import COCO  # type: ignore[import-untyped]
            from pycocotools.cocoeval import COCOeval  # type: ignore[import-untyped]
        except ModuleNotFoundError:
            raise MissingPackage("pycocotools", "eval") from None
        if not self._truths or not self._found:
            return 0.0
        with contextlib.redirect_stdout(io.StringIO()):
            gold = COCO()
            gold.dataset = {
                "info": {},
                "images": self._sizes,
                "categories": [{"id": 1}],
                "annotations": [{**entry, "id": number} for number, entry in enumerate(self._truths, start=1)],
            }
            gold.createIndex()
            judge = COCOeval(gold, gold.loadRes(self._found), "segm")
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
        return max(0.0, float(judge.stats[1]))


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
