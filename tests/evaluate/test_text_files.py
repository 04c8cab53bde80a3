"""Captions, boxes and answers to questions, on files as others have them."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mllm_edge.errors import BadInput
from mllm_edge.evaluate.cases import Truth, files, scenes
from mllm_edge.evaluate.scores import Prediction, score
from mllm_edge.evaluate.texts import vqa
from mllm_edge.runtime.boxes import box_iou


def put(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "val"
    folder.mkdir()
    for name in ("COCO_val2014_000000000007.jpg", "000000000008.jpg"):
        Image.new("RGB", (20, 10), (200, 0, 0)).save(folder / name)
    return folder


def test_vqa_accuracy_by_hand() -> None:
    assert vqa("A cat.", ["cat"] * 10) == 1.0
    assert vqa("two", ["2"] * 3 + ["3"] * 7) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)  # leaving each person out
    assert vqa("dog", ["cat"] * 10) == 0.0 and vqa("dog", ["the dog"]) == 1.0


def test_questions_of_vqa(tmp_path: Path, images: Path) -> None:
    asked = ((70, 7, "What?"), (80, 8, "Who?"))
    entries = [{"question_id": name, "image_id": image, "question": text} for name, image, text in asked]
    questions = put(tmp_path / "q.json", {"questions": entries})
    answers = {"annotations": [{"question_id": n, "answers": [{"answer": "yes"}] * 10} for n in (70, 80)]}
    data = files(questions, images, put(tmp_path / "a.json", answers), "val")
    assert data.kind == "vqa" and [case.question for case in data.cases] == ["What?", "Who?"]
    assert [case.open().size for case in data.cases] == [(20, 10)] * 2
    pairs = [(case.truth(case.open()), Prediction(text, [], [])) for case, text in zip(data.cases, ("yes", "no"))]
    assert score("vqa", pairs) == {"vqa": 50.0}
    with pytest.raises(BadInput, match="add --instances"):
        files(questions, images, None, "val")
    answers["annotations"].pop()
    with pytest.raises(BadInput, match=r"question 80 of .* has no answers"):
        files(questions, images, put(tmp_path / "a.json", answers), "val")
    with pytest.raises(BadInput, match='there is no "answers"'):
        files(questions, images, put(tmp_path / "a.json", {"annotations": [{"question_id": 70}]}), "val")
    put(questions, {"questions": [{"question_id": 1, "image_id": 9, "question": "?"}]})
    put(tmp_path / "a.json", {"annotations": [{"question_id": 1, "answers": []}]})
    (case,) = files(questions, images, tmp_path / "a.json", "val").cases
    with pytest.raises(BadInput, match=r"has no picture 000000000009\.jpg"):
        case.open()


def test_captions_of_coco(tmp_path: Path, images: Path) -> None:
    texts = ("A red page.", "All red.")
    captions = {
        "images": [{"id": 8, "file_name": "000000000008.jpg", "width": 20, "height": 10}],
        "annotations": [{"id": n, "image_id": 8, "caption": text} for n, text in enumerate(texts)],
    }
    data = files(put(tmp_path / "captions.json", captions), images, None, "val")
    (case,) = data.cases
    assert data.kind == "captions" and case.own == ("describe", "")
    assert case.truth(case.open()).texts == ["A red page.", "All red."]


def test_scores_of_boxes_and_captions() -> None:
    assert box_iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3) and box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    truth = Truth(boxes=[(0.0, 0.0, 10.0, 10.0)])
    found = [[(0.0, 0.0, 10.0, 8.0)], [(0.0, 0.0, 10.0, 6.0)], [], [(50.0, 50.0, 60.0, 60.0)]]
    made = score("boxes", [(truth, Prediction("", [], [], boxes)) for boxes in found])
    assert made == {"box50": 50.0, "box75": 25.0, "box_iou": 35.0, "box_answered": 75.0}
    truth = Truth(["A red ring and another red ring."], phrases=["red ring", "red ring", "blue star"])
    said = Prediction("A large red ring, a Blue Star.", [], [])
    pytest.importorskip("nltk")
    made = score("captions", [(truth, said), (truth, Prediction("A red ring, a red ring, a blue star", [], []))])
    assert made["named"] == pytest.approx(83.33) and made["all_named"] == 50.0


def test_scenes_ask_the_bundles_own_questions() -> None:
    for name, own in (("scenes-boxes", "locate"), ("scenes-captions", "describe"), ("wide-regions", "region")):
        data = scenes(name, 3, "test")
        assert {case.own[0] for case in data.cases if case.own} == {own} and not data.cases[0].question
