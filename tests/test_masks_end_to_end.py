"""The shipped GLaMM as a bundle: what its command line answers, and when its stages are in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from calls_for_tests import Call
from PIL import Image

import mllm_edge
from mllm_edge.bundle.read import read_manifest
from mllm_edge.errors import BadInput
from mllm_edge.models.glamm.model import ADDED
from mllm_edge.models.glamm.prompts import GROUNDED_QUESTION
from mllm_edge.recipes.data.segmentation import decode_segmentation
from mllm_edge.runtime import Model, loading
from mllm_edge.runtime import memory as budget
from mllm_edge.runtime.answers import rle
from mllm_edge.runtime.answers.resize import iou
from mllm_edge.scenes import boxes, masks, render, sample_scene

# Of the test split, which no recipe trains on: the first with two objects of different colors and shapes.
INDEX = next(
    i for i in range(50)
    if len((scene := sample_scene("test", i)).objects) == 2 and len({o.color for o in scene.objects}) == 2
    and len({o.shape for o in scene.objects}) == 2
)  # fmt: skip
SCENE = sample_scene("test", INDEX)
SIZE = 200
FIRST, SECOND = (f"the {item.color} {item.shape}" for item in SCENE.objects)


@pytest.fixture(scope="module")
def glamm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mllm_edge.export("glamm", precision="fp32", quant="f32", out=tmp_path_factory.mktemp("glamm") / "g.bundle")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenes") / "scene.png"
    Image.fromarray(render(SCENE, SIZE)).save(path)
    return path


@pytest.fixture
def model(glamm: Path) -> Iterator[Model]:
    with mllm_edge.load(glamm, threads=1) as loaded:
        yield loaded


def loaded(model: Model) -> set[str]:
    return {name for name, stage in model.stages.items() if stage.loaded}


def test_parity_down_to_masks(glamm: Path) -> None:
    rows = {row.name: row for row in read_manifest(glamm).parity}
    assert all(row.passed for row in rows.values())
    for stage in ("vision_encoder", "connector", "region_encoder", "mask_encoder", "mask_decoder"):
        assert rows[stage].measured["cosine"] >= 0.9999
    assert rows["masks"].measured["same_tokens"] == 1.0
    assert rows["masks"].measured["mask_iou"] >= 0.99
    assert rows["masks"].measured["masks"] >= 4


def test_q4_k_m_keeps_seg_and_head_fine(tmp_path: Path) -> None:
    folder = mllm_edge.export("glamm", precision="fp32", quant="q4_k_m", out=tmp_path / "q4.bundle")
    rows = {row.name: row for row in read_manifest(folder).parity}
    assert rows["masks"].measured["mask_iou"] >= 0.97
    reader = gguf.GGUFReader(folder / "language_model.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["token_embd.weight"] in ("Q8_0", "F16", "F32")
    assert types["output.weight"] in ("Q6_K", "Q8_0", "F16", "F32")
    assert "Q4_K" in types.values()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    words = reader.fields["tokenizer.ggml.tokens"].contents()
    assert {words[i] for i in range(len(words)) if kinds[i] == gguf.TokenType.CONTROL} >= set(ADDED)


def test_a_phrase_is_tied_to_its_mask(model: Model, scene: Path) -> None:
    answer = model.generate(GROUNDED_QUESTION, scene)
    truth = masks(SCENE, SIZE)
    assert "[SEG]" not in answer.text and "<p>" not in answer.text
    assert len(answer.masks) == 2
    for mask in answer.masks:
        assert answer.text[slice(*mask.span)] == mask.phrase == mask.label
        named = [n for n, item in enumerate(SCENE.objects) if item.color in mask.phrase and item.shape in mask.phrase]
        assert iou(mask.pixels, truth[named[0]]) > 0.7
        assert 0.5 < mask.score <= 1
    assert [entry["phrase"] for entry in answer.boxes] == [mask.phrase for mask in answer.masks]


def test_run_writes_pictures_and_json(glamm: Path, scene: Path, call: Call, tmp_path: Path) -> None:
    question = f"Please segment {FIRST} in this image."
    said = call("run", glamm, question, "--image", scene, "--out", tmp_path / "a", "--json")
    assert said.code == 0, said.err
    (mask,) = said.document["masks"]
    pixels = decode_segmentation(mask["rle"], SIZE, SIZE)
    assert iou(pixels, masks(SCENE, SIZE)[0]) > 0.7
    with Image.open(tmp_path / "a" / "mask_0.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
    assert (tmp_path / "a" / "overlay.png").is_file()
    end = len(said.document["text"].rstrip("."))  # no phrase: the mask stands where its token does
    place = {"phrase": "", "span": [end, end], "label": question}
    assert {name: mask[name] for name in place} == place
    assert said.document["boxes"] == [{**place, "box": mask["box"]}]


def test_chat_writes_a_folder_for_each_answer_with_masks(glamm: Path, scene: Path, call: Call, tmp_path: Path) -> None:
    lines = f"Please segment {FIRST} in this image.\nHow many objects are there?\n"
    said = call("chat", glamm, "--image", scene, "-o", tmp_path / "c", "--json", text=lines)
    assert said.code == 0, said.err
    assert [len(turn["masks"]) for turn in said.document["turns"]] == [1, 0]
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.png")) == [
        "c/turn_1/mask_0.png",
        "c/turn_1/overlay.png",
    ]


def test_teacher_forcing_cuts_out_the_same_mask(model: Model, glamm: Path, scene: Path, call: Call) -> None:
    question = f"Please segment {SECOND} in this image."
    free = model.generate(question, scene)
    said = call("run", glamm, question, "--image", scene, "--teacher-forced", "Sure, it is [SEG].", "--json")
    assert said.document["text"] == free.text == "Sure, it is."
    # Read at once and word by word, the states differ in their last bits, and so may a pixel on the rim.
    form = said.document["masks"][0]["rle"]
    assert iou(decode_segmentation(form, *form["size"]), free.masks[0].pixels) > 0.999
    for answer, reason in (
        ("Here.", "has no [SEG]"),
        ("[SEG] at <bbox>", "has <bbox>, which only a question can have"),
    ):
        refused = call("run", glamm, question, "--image", scene, "--teacher-forced", answer)
        assert refused.code == 2
        assert reason in refused.error
    for token in (-1, model.language_model.vocabulary):
        with pytest.raises(BadInput, match="unknown token id"):
            model.generate(question, scene, teacher_forced=[token])


def test_a_box_is_a_question(glamm: Path, scene: Path, call: Call) -> None:
    for item, box in zip(SCENE.objects, boxes(SCENE, SIZE).tolist(), strict=True):
        said = call("run", glamm, "What is <bbox>?", "--image", scene, "--box", ",".join(map(str, box)), "--quiet")
        assert f"{item.color} {item.shape}" in said.out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["What is <bbox>?"], "1 <bbox> placeholder(s) for 0 box(s)"),
        (["What is this?", "--box", "1,2,30,40"], "0 <bbox> placeholder(s) for 1 box(s)"),
        (["What is <bbox>?", "--box", "1,2,3"], "is not x1,y1,x2,y2"),
        (["What is <bbox>?", "--box", "a,b,c,d"], "is no box"),
        (["What is <bbox>?", "--box", "5,5,5,50"], "has no area"),
        (["What is <bbox>?", "--box", "500,5,600,50"], "lies outside the picture of 200 x 200"),
    ],
)
def test_boxes_that_cannot_be(words: list[str], reason: str, glamm: Path, scene: Path, call: Call) -> None:
    said = call("run", glamm, *words, "--image", scene)
    assert said.code == 2
    assert reason in said.error


def test_a_box_without_a_picture(model: Model) -> None:
    with pytest.raises(BadInput, match="boxes were given but no picture"):
        model.generate("What is <bbox>?", boxes=[(1, 2, 30, 40)])


def test_plain_chat_never_loads_sam_or_regions(model: Model, scene: Path) -> None:
    answer = model.generate("How many objects are there?", scene)
    assert "object" in answer.text
    assert answer.masks == []
    assert loaded(model) == {"vision_encoder", "connector"}
    assert answer.timings["mask_encoder"] == answer.timings["mask_decoder"] == 0


def test_sam_sees_a_picture_once(model: Model, scene: Path) -> None:
    first = model.generate(f"Segment {FIRST}.", scene)
    second = model.generate(f"Segment {SECOND}.", scene)
    assert first.timings["mask_encoder"] > 0
    assert second.timings["mask_encoder"] == 0
    assert first.timings["lazy_load"] > 0
    assert "lazy_load" not in second.timings
    assert second.masks
    assert loaded(model) == {"vision_encoder", "connector", "mask_encoder", "mask_decoder"}


def test_a_dialogue_has_masks_in_every_turn(model: Model, scene: Path) -> None:
    chat = model.chat()
    truth = masks(SCENE, SIZE)
    for number, (words, image) in enumerate(((FIRST, scene), (SECOND, None))):
        answer = chat.ask(f"Please segment {words} in this image.", image)
        assert iou(answer.masks[0].pixels, truth[number]) > 0.5
    box = [tuple(boxes(SCENE, SIZE)[1].tolist())]
    assert SCENE.objects[1].shape in chat.ask("What is <bbox>?", boxes=box).text


def test_masks_without_a_picture_are_announced(model: Model) -> None:
    with pytest.warns(RuntimeWarning, match=r"1 \[SEG\] but there is no picture"):
        assert model.generate("Segment the star.", teacher_forced="It is [SEG].").masks == []


@pytest.mark.parametrize("keep_language_model", [True, False])
def test_unloading_parts_changes_no_answer(
    keep_language_model: bool, glamm: Path, scene: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.generate(GROUNDED_QUESTION, scene)
    plan = budget.MemoryPlan(False, keep_language_model, 0)
    monkeypatch.setattr(loading, "plan_memory", lambda *_: plan)
    with mllm_edge.load(glamm, threads=1, memory_budget=1) as tight:
        for _ in range(2):
            answer = tight.generate(GROUNDED_QUESTION, scene)
            assert answer.text == expected.text
            assert [mask.rle for mask in answer.masks] == [mask.rle for mask in expected.masks]
            assert loaded(tight) == set()
            assert keep_language_model or tight.language_model._engine is None  # type: ignore[attr-defined]


def test_questions_that_need_no_wording(glamm: Path) -> None:
    with mllm_edge.load(glamm, threads=1) as model:
        assert model.question("describe") == GROUNDED_QUESTION
        assert model.question("segment", " the ring ") == "Please segment the ring in this image."
        assert model.question("region").count("<bbox>") == 1
        for name, what, message in [
            ("edit", "", "no question 'edit'; it has describe, segment, region"),
            ("segment", "", "segment needs what it is about"),
            ("describe", "it", "describe does not take"),
        ]:
            with pytest.raises(BadInput, match=message):
                model.question(name, what)


def test_run_asks_in_the_bundles_own_words(glamm: Path, scene: Path, call: Call, tmp_path: Path) -> None:
    shown = ("--image", scene, "--threads", 1, "--json", "--quiet")
    said = call("run", glamm, "--segment", FIRST, *shown)
    (mask,) = said.document["masks"]
    assert mask["label"] == f"Please segment {FIRST} in this image."
    described = call("run", glamm, "--describe", "--out", tmp_path / "answer", *shown)
    assert described.document == call("run", glamm, GROUNDED_QUESTION, *shown).document | {
        name: described.document[name] for name in ("timings_ms", "memory_mb")
    }
    x1, y1, x2, y2 = boxes(SCENE, SIZE)[0]
    region = call("run", glamm, "--region", f"{x1},{y1},{x2},{y2}", *shown)
    assert FIRST.removeprefix("the ") in region.document["text"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["What?", "--describe"], "there are several questions; give one of PROMPT, --prompt-file, --describe,"),
        (["--describe", "--segment", "it"], "there are several questions"),
        (["--segment", " "], "the question segment needs what it is about"),
        (["--region", "1,1,9,9", "--box", "1,1,9,9"], "leave out --box"),
        (["--region", "900,900,950,950"], "lies outside the picture"),
        (["What?", "--box", "1,1,9,9"], "write <bbox> in the question"),
    ],
)
def test_questions_that_cannot_be(words: list[str], message: str, glamm: Path, scene: Path, call: Call) -> None:
    said = call("run", glamm, *words, "--image", scene, "--threads", 1)
    assert (said.code, message in said.error) == (2, True), said.error


def test_chat_asks_in_the_bundles_own_words(glamm: Path, scene: Path, call: Call, tmp_path: Path) -> None:
    lines = ["/help", f'/image "{scene}"', "/describe", f"/segment {FIRST}", "/region 1,1,90,90", "/box 1,1,90,90"]
    text = "\n".join([*lines, "What is <bbox>?", "/quit"])
    said = call("chat", glamm, "--json", "--threads", 1, text=text)
    prompts = [turn["prompt"] for turn in said.document["turns"]]
    assert prompts[:2] == [GROUNDED_QUESTION, f"Please segment {FIRST} in this image."]
    assert len(prompts) == 4 and prompts[3] == "What is <bbox>?"
    assert "/segment WHAT" in said.err
    for line, message in [("/box 1,1,9,9", "no picture yet"), ("/sing", "there is no /sing; /help lists")]:
        assert message in call("chat", glamm, "--threads", 1, text=line).error


def test_a_budget_that_cannot_be_kept_is_refused_at_once(glamm: Path, scene: Path, call: Call) -> None:
    said = call("run", glamm, "What?", "--image", scene, "--memory-budget", "20M")
    assert said.code == 2
    assert "cannot stay under 20M: it takes" in said.error


@pytest.mark.alone
def test_the_peak_stays_under_what_was_expected(glamm: Path, scene: Path) -> None:
    """In a process of its own, because peak memory is a property of a process."""
    script = (
        "import mllm_edge, sys\n"
        "with mllm_edge.load(sys.argv[1], threads=1, memory_budget=1 << 30) as model:\n"
        "    answer = model.generate(sys.argv[3], sys.argv[2])\n"
        "print(len(answer.masks), answer.memory['peak_rss'] * 1e6, model.memory.peak)\n"
    )
    words = [sys.executable, "-c", script, str(glamm), str(scene), GROUNDED_QUESTION]
    number, peak, expected = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    assert number == "2"
    assert float(peak) <= float(expected)


def test_bench_times_what_only_some_answers_need(glamm: Path, call: Call) -> None:
    said = call("bench", glamm, "-r", 1, "--gen-tokens", 2, "--threads", 1, "--json", "--quiet")
    assert said.code == 0, said.err
    (result,) = said.document["results"]
    assert set(result["lazy"]) == {"region_encoder", "mask_encoder", "mask_decoder", "masks"}
    assert all(result["stages_ms"][name]["median"] > 0 for name in result["lazy"])


@pytest.mark.parametrize(
    ("dataset", "least"),
    [("scenes-referring", {"ciou": 70}), ("scenes-grounded", {"miou": 70}), ("scenes-regions", {"exact": 50})],
)
def test_eval_of_scenes(dataset: str, least: dict[str, float], glamm: Path, call: Call, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    said = call("eval", glamm, dataset, "-n", 6, "--out", out, "--json", "--threads", 1)
    assert said.code == 0, said.err
    scores = said.document["scores"]
    assert all(scores[name] >= value for name, value in least.items())
    # Killed in the middle of the fifth answer: resumed, the scores are the same and only the rest is asked.
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:5]) + lines[5][:20])
    again = call("eval", glamm, dataset, "-n", 6, "--out", out, "--json", "--threads", 1, "--resume")
    assert again.document["scores"] == scores
    assert out.read_text() == "".join(lines)
    assert "is there already" in call("eval", glamm, dataset, "-n", 6, "--out", out, "--threads", 1).error
    other = call("eval", glamm, dataset, "-n", 5, "--out", out, "--threads", 1, "--resume")
    assert "another bundle or data set" in other.error


def test_eval_of_files(glamm: Path, call: Call, tmp_path: Path) -> None:
    """A scene in both layouts: what the bundle finds in it is what `run` finds."""
    Image.fromarray(render(SCENE, SIZE)).save(tmp_path / "scene.png")
    forms = [rle.encode(mask) for mask in masks(SCENE, SIZE)]
    names = [f"a {item.color} {item.shape}" for item in SCENE.objects]
    caption = " and ".join(names)
    spans = [[caption.index(name), caption.index(name) + len(name)] for name in names]
    groundings = {n: {"token_positives": s, "rle_masks": [f]} for n, s, f in zip(names, spans, forms, strict=True)}
    grandf = tmp_path / "grandf.json"
    grandf.write_text(json.dumps([{"file_name": "scene.png", "caption": caption, "groundings": groundings}]))
    said = call("eval", glamm, grandf, "--images", tmp_path, "--json", "--threads", 1)
    assert said.document["kind"] == "grounded"
    assert said.document["scores"]["miou"] > 70
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": form}
        for i, (form, (x1, y1, x2, y2)) in enumerate(zip(forms, boxes(SCENE, SIZE).tolist(), strict=True))
    ]
    images = [{"id": 1, "file_name": "scene.png", "width": SIZE, "height": SIZE}]
    coco = {"images": images, "categories": [{"id": 1, "name": "thing"}], "annotations": annotations}
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    refs = [
        {"ref_id": i, "ann_id": i, "image_id": 1, "split": "val", "sentences": [{"sent": words}]}
        for i, words in enumerate((FIRST, SECOND))
    ]
    (tmp_path / "refs.json").write_text(json.dumps(refs))
    where = ["--instances", tmp_path / "instances.json", "--images", tmp_path, "--threads", 1]
    for more in ([], ["--teacher-forced"]):
        said = call("eval", glamm, tmp_path / "refs.json", *where, *more, "--json")
        assert said.document["cases"] == 2
        assert said.document["scores"]["ciou"] > 70
    said = call("eval", glamm, tmp_path / "refs.json", *where, "--regions", "--json")
    assert said.document["kind"] == "regions"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["no-such-file.json"], "is neither a set of ours"),
        (["scenes-regions", "--teacher-forced"], "goes with referring expressions"),
        (["scenes-regions", "--split", "train"], "there is no split 'train'"),
        (["scenes-regions", "--resume"], "--resume goes with --out"),
        (["scenes-regions", "-n", "0"], "has no cases"),
    ],
)
def test_unusable_evaluations(words: list[str], reason: str, glamm: Path, call: Call) -> None:
    said = call("eval", glamm, *words, "--threads", 1)
    assert said.code == 2
    assert reason in said.err
