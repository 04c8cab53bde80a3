"""What GLaMM is fed: tags, masks and boxes in the order of their tokens, from scenes and from files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mllm_edge.errors import BadInput
from mllm_edge.models.glamm.layouts import read_sam
from mllm_edge.models.glamm.model import CONFIGS
from mllm_edge.models.glamm.prompts import BOX, CAPTION_QUESTIONS, SEG
from mllm_edge.models.resolve import resolve
from mllm_edge.recipes import train
from mllm_edge.recipes.data.conversation import IGNORE
from mllm_edge.recipes.data.grounded import tagged
from mllm_edge.recipes.data.grounded_files import in_frame
from mllm_edge.recipes.losses import bce_loss, dice_loss, mean_iou
from mllm_edge.recipes.parts import read_part
from mllm_edge.recipes.recipe import Recipe, load
from mllm_edge.recipes.tasks.glamm import GlammTask
from mllm_edge.runtime.preprocess import longest_side
from mllm_edge.scenes import boxes, sample_wide

QUIET = ["batch=2", "steps=2", "evaluate=2", "precision=fp32", "log_every=1", "workers=0"]


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "sam"
    report = train("sam-pretrain", [*QUIET, f"out={out}"], False, lambda *_: None)
    assert 0 <= report["metrics"]["validation_box_iou"] <= 1
    return out


def recipe(sam: Path, *more: str) -> Recipe:
    return load("glamm-finetune", [*QUIET, f"init.sam={sam}", *more])


@pytest.fixture(scope="module")
def task(sam: Path) -> GlammTask:
    return GlammTask(recipe(sam))


def test_tags() -> None:
    text = "A red ring and a blue star."
    assert tagged(text, [(0, 10, 1), (15, 26, 0)]) == "<p> A red ring </p> [SEG] and <p> a blue star </p> [SEG]."
    assert tagged(text, []) == text


def test_bce_and_dice_by_hand() -> None:
    logits = torch.zeros(1, 2, 2)
    truth = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    assert float(bce_loss(logits, truth)) == pytest.approx(np.log(2), rel=1e-5)
    # Chances are 1/2: 2 * 0.5 / (2 + 1), sums over 1000 and smoothed by 1e-6.
    expected = 1 - (2 * 0.5 / 1000 + 1e-6) / (2 / 1000 + 1 / 1000 + 1e-6)
    assert float(dice_loss(logits, truth)) == pytest.approx(expected, rel=1e-5)
    none = torch.zeros(0, 2, 2)
    assert float(bce_loss(none, none)) == float(dice_loss(none, none)) == 0
    assert float(mean_iou(torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]]), truth)) == 0.5


def test_one_kind_of_question_per_step(task: GlammTask) -> None:
    kinds = [task.kind(index) for index in range(400)]
    assert all(kinds[step] == kinds[step + 1] for step in range(0, 400, 2))  # batch 2
    assert set(kinds) == {"chat", "region", "segment"}


@pytest.mark.parametrize("kind", ["chat", "region", "segment"])
def test_masks_and_boxes_go_with_their_tokens(task: GlammTask, kind: str) -> None:
    seg, box = task.vocabulary.added[SEG], task.vocabulary.added[BOX]
    for index in [i for i in range(300) if task.kind(i) == kind][:12]:
        one = task.sample(index)
        assert one.sample.labels.count(seg) == len(one.masks)
        assert one.sample.ids.count(box) == len(one.boxes)
        assert bool(one.masks) == (kind == "segment")
        assert bool(one.boxes) == (kind == "region")
        assert all(mask.shape == (128, 128) and mask.any() for mask in one.masks)
        learned = [token for token in one.sample.labels if token != IGNORE]
        assert box not in learned


@pytest.mark.parametrize("kind", ["segment", "region", "caption", "chat"])
def test_wide_pictures_of_any_shape(task: GlammTask, kind: str) -> None:
    size = task.dims.mask_encoder.image_size
    for index in range(12):
        scene = sample_wide("validation", index)
        picture, turns = task.scene_turns("validation", index, kind, np.random.default_rng(index), wide=1.0)
        assert picture.size == scene.extent(scene.finish.side if scene.finish else 0)
        width, height = longest_side(*picture.size, size)
        for mask in (mask for turn in turns for mask in turn.masks):
            assert mask.shape == (size, size) and mask.any()
            assert abs(width - size) <= 1 or not mask[:, width + 1 :].any()
            assert abs(height - size) <= 1 or not mask[height + 1 :].any()
        for turn, truth in zip(turns, boxes(scene, 512) / np.tile(scene.extent(512), 2)):
            for box in turn.boxes:
                assert np.abs(np.array(box) - truth).max() < 0.15
        task.collate([task.encode(picture, turns, dialogue=False)])


def test_captions_alone_have_no_masks(task: GlammTask) -> None:
    picture, turns = task.scene_turns("train", 3, "caption", np.random.default_rng(0))
    assert [turn.question for turn in turns] == [CAPTION_QUESTIONS[-1], *[turn.question for turn in turns[1:]]]
    assert len({turn.question for turn in turns}) == len(turns) == task.turns[1]
    sample = task.encode(picture, turns, dialogue=False)
    assert sample.sample.labels.count(task.vocabulary.added["[SEG]"]) > 0
    assert sample.masks == []
    assert "masks" not in task.collate([sample])


def test_a_region_is_never_shared_by_two_questions(task: GlammTask) -> None:
    """Branches share their beginning; questions of one wording would share their <bbox>, too."""
    rng = np.random.default_rng(0)
    picture, turns = next(
        found
        for found in (task.scene_turns("train", index, "region", rng) for index in range(50))
        if len(found[1]) == 3
    )
    same = [type(turn)(turns[0].question, turn.answer, turn.masks, turn.boxes) for turn in turns]
    sample = task.encode(picture, same, dialogue=False).sample
    places = [at for at, token in enumerate(sample.ids) if token == task.vocabulary.added[BOX]]
    assert [sample.branches[at] for at in places] == [1, 2, 3]


def test_added_tokens_swallow_white_space_and_begin_afresh(task: GlammTask) -> None:
    vocabulary = task.vocabulary
    ids = vocabulary.ids("It is <p> a ring </p> [SEG]. Yes")
    added = vocabulary.added
    assert ids == [
        *vocabulary.encode("It is"), added["<p>"], *vocabulary.encode("a ring"), added["</p>"], added[SEG],
        *vocabulary.encode(". Yes"),
    ]  # fmt: skip


def test_the_state_that_foretells_seg_makes_the_mask(task: GlammTask) -> None:
    """Moving the state of the token before [SEG] moves the mask; the state at [SEG] itself does not count."""
    index = next(i for i in range(100) if task.kind(i) == "segment")
    batch = task.collate([task.sample(index)])
    seen: list[torch.Tensor] = []
    model = task.model.eval()
    handle = model.glamm.mask_head.projection.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(**batch)
        handle.remove()
        embeds = model.glamm.splice(batch["ids"], model.glamm.encode(batch["pixel_values"]))
        from mllm_edge.recipes.data.conversation import final_states, visibility

        mask = visibility(batch["mask"], batch.get("branches"))
        states = final_states(model.glamm.language_model, embeds, mask, batch.get("positions"))
    places = (batch["ids"][0] == model.seg).nonzero().flatten()
    torch.testing.assert_close(seen[0], states[0, places - 1], atol=1e-4, rtol=1e-4)


def test_two_steps_and_what_they_leave(sam: Path, tmp_path: Path) -> None:
    report = train("glamm-finetune", [*QUIET, f"init.sam={sam}", f"out={tmp_path}"], False, lambda *_: None)
    assert {"validation_region_exact", "validation_mask_iou"} == set(report["metrics"])

    checkpoint = resolve("glamm", str(tmp_path / "checkpoint"), None)
    assert checkpoint.dims == CONFIGS["tiny"]
    assert not [name for name in checkpoint.tensors if "lora" in name]


def test_a_run_may_begin_at_a_whole_glamm_with_other_parts(tmp_path: Path) -> None:
    before = resolve("glamm", "tiny").tensors
    train("sam-wide", [*QUIET, "init.sam=", "init.glamm=tiny", f"out={tmp_path / 'sam'}"], False, lambda *_: None)
    parts = read_sam(tmp_path / "sam")
    assert parts.keys() == {name for name in before if name.startswith("mask_") and ".projection." not in name}
    assert max(float((tensor - before[name].float()).abs().max()) for name, tensor in parts.items()) < 0.01  # two steps
    parts_of = ["init.glamm=tiny", "init.vision_encoder=shipped", f"init.sam={tmp_path / 'sam'}", "init.connector="]
    task = GlammTask(load("glamm-wide", [*QUIET, *parts_of]))
    held, encoder = task.model.glamm.state_dict(), read_part("shipped", "vision_encoder")
    for name, tensor in parts.items():
        assert torch.equal(held[name], tensor), name
    for name, tensor in encoder.items():
        assert torch.equal(held[f"vision_encoder.{name}"], tensor), name
    head = "language_model.lm_head.weight"
    assert torch.equal(held[head], before[head].float())
    rates = {id(p): group.get("lr") for group in task.parameters() for p in group["params"]}
    assert {rates[id(p)] for p in task.model.glamm.connector.parameters()} == {2e-4}
    assert rates[id(task.model.glamm.language_model.lm_head.weight)] is None  # the recipe's
    assert not [p for p in task.model.glamm.vision_encoder.parameters() if id(p) in rates]


def test_what_is_trained_and_what_is_frozen(task: GlammTask) -> None:
    trained = {name.removeprefix("glamm.") for name, p in task.model.named_parameters() if p.requires_grad}
    parts = {name.partition(".")[0] if not name.startswith("language") else name.rpartition(".")[0] for name in trained}
    assert {"region_encoder", "mask_head"} <= parts
    assert not {"vision_encoder", "connector", "mask_encoder"} & parts
    assert not [name for name in trained if name.startswith("mask_head.prompt_encoder")]
    decoder = {name for name in trained if name.startswith("language_model")}
    assert all("lora_" in name or "embed_tokens" in name or "lm_head" in name for name in decoder)
    assert all(".q_proj." in name or ".v_proj." in name for name in decoder if "lora_" in name)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 60, 3), np.uint8)).save(tmp_path / "nine.png")
    box = {"size": [30, 60], "counts": [0, 300, 1500]}  # the left 10 columns
    grandf = [
        {
            "file_name": "nine.png",
            "caption": "A dog beside a ball.",
            "groundings": {
                "a ball": {"token_positives": [13, 19], "rle_masks": [box]},
                "A dog": {"token_positives": [0, 5], "rle_masks": [box, {"size": [30, 60], "counts": [1500, 300]}]},
            },
        }
    ]
    (tmp_path / "grandf.json").write_text(json.dumps(grandf))
    instances = {
        "images": [{"id": 9, "file_name": "nine.png", "width": 60, "height": 30}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 9,
                "category_id": 1,
                "bbox": [0, 0, 30, 30],
                "segmentation": [[0, 0, 30, 0, 30, 30, 0, 30]],
            }
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    refs = [{"ref_id": 1, "ann_id": 1, "image_id": 9, "split": "train", "sentences": [{"sent": "the dog"}]}]
    (tmp_path / "refs.json").write_text(json.dumps(refs))
    return tmp_path


def test_grandf_and_refcoco_files(sam: Path, files: Path) -> None:
    data = [f"data.{key}={files / name}" for key, name in (("images", "."), ("grandf", "grandf.json"))]
    task = GlammTask(recipe(sam, *data))
    assert {task.kind(i) for i in range(60)} == {"segment"}
    one = task.sample(0)
    assert [int(mask.sum()) for mask in one.masks] == [(128 // 3) * 64, round(128 / 6) * 64]  # the dog is both sides
    data += [f"data.{key}={files / f'{key}.json'}" for key in ("refs", "instances")]
    both = GlammTask(recipe(sam, *data))
    assert {both.kind(i) for i in range(100)} == {"region", "segment"}
    region = both.sample(next(i for i in range(100) if both.kind(i) == "region"))
    assert region.boxes == [(0.0, 0.0, 0.5, 1.0)]


def test_a_masks_place_in_the_encoders_frame() -> None:
    mask = np.zeros((30, 60), np.bool_)
    mask[:, 30:] = True
    frame = in_frame(mask, 128)
    assert frame[:64, 64:].all()
    assert not frame[:, :64].any()
    assert not frame[64:].any()


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("data.shares={walk: 1}", "data.shares has walk"),
        ("data.refs=refs.json", "goes with data.instances"),
        ("init.sam=nowhere", "run the recipe sam-pretrain first"),
    ],
)
def test_unusable_settings(sam: Path, setting: str, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        GlammTask(recipe(sam, setting))
