"""What a bundle looks for when it is given captions of scenes, and whether it would rather look or draw.

Nothing is generated: pictures and words become vectors, and two logits. So a run takes a minute, and keeps no answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mllm_edge.bundle.manifest import Manifest
from mllm_edge.errors import BadInput
from mllm_edge.evaluate.cases import SIZE, check_split
from mllm_edge.recipes.data.gill_scenes import few_things, fuller_scene, told, told_apart
from mllm_edge.runtime import Model
from mllm_edge.runtime.answers.decision import GENERATE, RETRIEVE, is_retrieved
from mllm_edge.runtime.answers.index import retrieving
from mllm_edge.runtime.embedding import Embedder
from mllm_edge.runtime.engines.interface import Floats
from mllm_edge.scenes import render

MOST = 500  # pictures among which one is looked for
RANKS = (1, 5, 10)
KINDS = {"scenes-retrieval": "retrieval", "scenes-decisions": "decisions"}
SEED = 0  # of the scenes: that of the recipes, whose test split no recipe trains on

Report = Callable[[int, int], None]  # (done, in all)


def check_looks(manifest: Manifest, kind: str) -> None:
    """Raise BadInput where a bundle cannot be measured so: "retrieval" needs vectors of pictures, "decisions" a choice
    between looking and drawing."""
    entry = retrieving(manifest)
    if kind == "retrieval" and not entry.picture:
        raise BadInput("this bundle makes no vectors of pictures; export it again with an mllm-edge that does")
    if kind == "decisions" and not entry.decision:
        raise BadInput(f"this bundle ({', '.join(manifest.tasks)}) does not decide whether to look or to draw")


def retrieval(
    opened: Callable[[], Embedder], loaded: Callable[[], Model], number: int, split: str, report: Report
) -> dict[str, Any]:
    """R@1, R@5 and R@10 of both directions, in percent, among scenes whose captions say everything and differ.

    Args:
        opened: opens what makes vectors of pictures, which is closed before the rest is loaded.
        loaded: loads the bundle.
        number: scenes, 1 to 500.
        split: of the scenes.
        report: called with (vectors made, in all).

    Raises:
        BadInput: no such split, or not so many scenes.
    """
    check_split(split)
    if not 1 <= number <= MOST:
        raise BadInput(f"a picture cannot be looked for among {number}; give 1 to {MOST} scenes (-n)")
    pairs = told_apart(split, number, SEED)
    with opened() as embedder:
        images = list[Floats]()
        for first in range(0, number, embedder.batch):
            shown = [Image.fromarray(render(scene, SIZE)) for scene, _ in pairs[first : first + embedder.batch]]
            images.append(embedder.vectors([embedder.prepare(picture) for picture in shown]))
            report(min(first + embedder.batch, number), 2 * number)
    texts = list[Floats]()
    with loaded() as model:
        for _, text in pairs:
            texts.append(model.query(text))
            report(number + len(texts), 2 * number)
    scores = recalls(np.stack(texts), np.concatenate(images))
    return _result(f"scenes-retrieval ({split})", "retrieval", number, scores)


def recalls(texts: Floats, images: Floats) -> dict[str, float]:
    """How often the own one is among the nearest 1, 5 and 10, of pairs [n,d]: shares by direction. Of equals, and of
    vectors without a direction, the own one comes last."""
    with np.errstate(invalid="ignore", divide="ignore"):
        texts, images = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (texts, images))
        cosines = np.nan_to_num(texts.astype(np.float64) @ images.T.astype(np.float64), nan=-1.0)
    own = cosines.diagonal()
    places = {
        "text_to_image": (cosines >= own[:, None]).sum(1),  # [n], 1 is the nearest
        "image_to_text": (cosines >= own[None]).sum(0),
    }
    return {f"{name}_{most}": float((found <= most).mean()) for name, found in places.items() for most in RANKS}


def decisions(model: Model, number: int, split: str, report: Report) -> dict[str, Any]:
    """Accuracy and macro F1, in percent, of whether to draw (captions of one to three things) or to look (of four to
    six, which the small diffusion model has never drawn), by turns, as recipe `gill-decision` teaches it.

    Raises:
        BadInput: no such split, fewer than two captions, or a bundle that does not decide.
    """
    check_split(split)
    if number < 2:
        raise BadInput(f"{number} captions are not of both kinds; give 2 or more (-n)")
    wanted, found = [], []
    for index in range(number):
        few = index % 2 == 0
        caption = told((few_things if few else fuller_scene)(split, index, SEED), index, SEED)
        wanted.append(GENERATE if few else RETRIEVE)
        found.append(RETRIEVE if is_retrieved(model.decided(caption)) else GENERATE)
        report(index + 1, number)
    return _result(f"scenes-decisions ({split})", "decisions", number, agreement(found, wanted))


def agreement(found: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """The share of right decisions, and the mean F1 of both, 0 where one is neither found nor wanted."""
    names, truths = np.array(found), np.array(wanted)
    each = [_f1(names, truths, kind) for kind in (RETRIEVE, GENERATE)]
    return {"decided": float((names == truths).mean()), "decided_f1": sum(each) / len(each)}


def _f1(found: NDArray[np.str_], wanted: NDArray[np.str_], kind: str) -> float:
    named = int((found == kind).sum() + (wanted == kind).sum())
    return 2 * int(((found == kind) & (wanted == kind)).sum()) / named if named else 0.0


def _result(name: str, kind: str, cases: int, shares: dict[str, float]) -> dict[str, Any]:
    scores = {key: round(100 * value, 2) for key, value in shares.items()}
    return {"dataset": name, "kind": kind, "cases": cases, "scores": scores}
