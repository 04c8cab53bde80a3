"""What LION is fed: words as the runtime tokenizes them, batches of one type of task, and what each stage trains."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mllm_edge.bundle import manifest
from mllm_edge.bundle.manifest import Slot
from mllm_edge.bundle.sources import Text
from mllm_edge.errors import BadInput
from mllm_edge.models.lion.layouts import QUESTION, load
from mllm_edge.models.lion.model import CONFIGS
from mllm_edge.models.lion.plan import READER
from mllm_edge.models.lion.prompts import TASKS, prompt
from mllm_edge.models.resolve import shipped
from mllm_edge.recipes import train
from mllm_edge.recipes.data.conversation import IGNORE
from mllm_edge.recipes.data.lion_words import LionTurn, Words, packed, prompted, tags_of, turns
from mllm_edge.recipes.data.place_code import place_codes
from mllm_edge.recipes.data.scene_pixels import squashed_masks
from mllm_edge.recipes.parts import part_folder, read_part
from mllm_edge.recipes.recipe import load as recipe
from mllm_edge.recipes.tasks.encoder import as_eva, dense_labels
from mllm_edge.recipes.tasks.lion import LionTask, spoken_iou
from mllm_edge.recipes.tasks.lion_align import LionAlignTask
from mllm_edge.recipes.tasks.lion_language import LionLanguageTask, answer_sums, mean_losses
from mllm_edge.runtime.boxes import spelled
from mllm_edge.runtime.decoding.tokenizers import JsonTokenizer
from mllm_edge.runtime.prompt import render, tokenized
from mllm_edge.runtime.sources import question_ids
from mllm_edge.scenes import boxes, masks, sample_scene, sample_wide

QUIET = ["batch=2", "steps=1", "evaluate=1", "precision=fp32", "workers=0", "save_every=5"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder: Path = tmp_path_factory.mktemp("parts")
    for name in ("encoder", "language", "tagger"):
        train(f"lion-{name}", [*QUIET, f"out={folder / name}"], False, lambda *_: None)
    begun = [f"init.vision_encoder={folder / 'encoder'}", f"init.t5={folder / 'language'}"]
    train("lion-align", [*QUIET, *begun, f"out={folder / 'align'}"], False, lambda *_: None)
    return [*begun, f"init.tagger={folder / 'tagger'}", f"init.connectors={folder / 'align'}"]


@pytest.fixture(scope="module")
def words(parts: list[str]) -> tuple[Path, Words]:
    folder = Path(parts[1].partition("=")[2])
    return folder, Words(folder)


def test_training_and_runtime_read_the_same_tokens(words: tuple[Path, Words]) -> None:
    folder, known = words
    entry = manifest.Tokenizer("language_model", "json", "tokenizer.json", ends=["</s>"])
    runtime = JsonTokenizer(folder / "tokenizer.json", entry)
    scene = sample_scene("train", 4)
    form = prompt(["rows"], tasks=True, tags=True)
    for task in TASKS:
        for turn in turns(scene, task, np.random.default_rng(0), 3):
            fields = {"tags": ", ".join(tags_of(scene))}
            parts = render(form, turn.question, {"pixels": 1}, fields=fields)
            pieces = tokenized(parts, runtime)
            ids = [one for piece in pieces for one in (["slot"] if isinstance(piece, Slot) else piece)]
            task_slot, picture, *rest = ids
            assert task_slot == picture == "slot"
            expected = known.prompt(prompted(turn.question, tags_of(scene)))
            assert rest == ["slot" if one == known.soft else one for one in expected]
            assert known.text(known.answer(turn.answer)) == turn.answer
            heard = Text("question", QUESTION, 20, cut="left")
            reader = JsonTokenizer(folder / QUESTION / "tokenizer.json", READER)
            assert question_ids(heard, reader, turn.question)[0].tolist() == known.question(turn.question, 20)


def test_boxes_are_written_as_lion_writes_them() -> None:
    assert spelled((44, 3, 65, 18.33), (100, 50)) == "[0.440,0.060,0.650,0.367]"
    scene = next(scene for scene in (sample_wide("train", i) for i in range(50)) if scene.aspect > 1.3)
    wide, high = scene.extent(1000)
    places = boxes(scene, 1000)
    for turn in turns(scene, "rec", np.random.default_rng(1), 8):
        x1, y1, x2, y2 = (float(number) for number in turn.answer.strip("[]").split(","))
        found = np.abs(places / [wide, high, wide, high] - [x1, y1, x2, y2]).max(axis=1)
        assert found.min() < 1e-3
    assert spoken_iou("it is at [0.0,0.0,0.5,0.5]", "[0.25,0.0,0.75,0.5]") == pytest.approx(1 / 3)
    assert (
        spoken_iou("[0.0,0.0,0.5]", "[0.25,0.0,0.75,0.5]") == 0.0 == spoken_iou("[.,0.1,0.2,0.3]", "[0.2,0.0,0.7,0.5]")
    )


def test_a_squashed_scene_has_its_labels_where_its_pixels_are() -> None:
    scene = next(scene for scene in (sample_wide("train", i) for i in range(50)) if scene.aspect > 1.5)
    squashed = squashed_masks(scene, 128)
    assert squashed.shape == (len(scene.objects), 128, 128)
    share = masks(scene, 256).mean(axis=(1, 2))
    np.testing.assert_allclose(squashed.mean(axis=(1, 2)), share, rtol=0.15, atol=1e-3)
    labels = dense_labels(scene, 8, 128, squashed=True)
    for number, item in enumerate(scene.objects):
        if sum(int(item.x * 8) == int(o.x * 8) and int(item.y * 8) == int(o.y * 8) for o in scene.objects) == 1:
            place = int(item.y * 8) * 8 + int(item.x * 8)
            assert labels["center"][place] == 1, number
            lines, columns = np.nonzero(squashed[number])
            seen = [columns.min(), lines.min(), columns.max() + 1, lines.max() + 1]
            np.testing.assert_allclose(labels["box"][place] * 128, seen, atol=2.5)


def test_eva_begins_with_clips_blocks() -> None:
    clip = {"encoder.layers.0.mlp.fc1.weight": torch.ones(2, 2), "embeddings.class_embedding": torch.ones(2)}
    clip |= {"pre_layrnorm.weight": torch.ones(2)}
    fresh = {"layers.0.mlp.fc1.weight": torch.zeros(2, 2), "class_embedding": torch.zeros(2)}
    fresh |= {"patch_embedding.bias": torch.zeros(2)}
    begun = as_eva(clip, fresh)
    assert begun.keys() == fresh.keys()
    assert {name: float(tensor.mean()) for name, tensor in begun.items()} == {
        "layers.0.mlp.fc1.weight": 1.0,
        "class_embedding": 1.0,
        "patch_embedding.bias": 0.0,
    }


def test_digits_of_a_place_are_linear_in_its_code() -> None:
    """The first two, give or take one, by least squares on other places."""
    places = np.random.default_rng(0).uniform(0, 1, (6000, 4))
    codes = np.concatenate([place_codes(places, 160), np.ones((6000, 1))], axis=1)
    known, asked = slice(0, 4000), slice(4000, None)
    for digit in (10, 100):
        wanted = np.eye(10)[(places[:, 2] * digit).astype(int) % 10]
        weights = np.linalg.lstsq(codes[known], wanted[known], rcond=None)[0]
        off = ((codes[asked] @ weights).argmax(axis=1) - wanted[asked].argmax(axis=1) + 5) % 10 - 5
        assert (abs(off) <= 1).mean() > 0.93, digit
    norms = np.linalg.norm(codes[:, :-1], axis=1)
    assert norms.std() < 0.03 * norms.mean()


def test_a_lone_thing_is_asked_for_its_box(parts: list[str]) -> None:
    """Its rows have the words and the place of one object alone, which is the right answer."""
    folder = parts[1].partition("=")[2]
    settings = [f"out={folder}", "data.lone=1", "data.wide=0", "data.packed=0"]
    first = LionLanguageTask(recipe("lion-language", [*settings, "data.opening=1", "batch=12"])).sample(5)
    for one in first:  # a telegram: a thing's first attribute, then its others
        assert any(set(one.prompt[:-1] + one.answer[:-1]) <= set(bag) for bag in one.bags)
    task = LionLanguageTask(recipe("lion-language", [*settings, "data.opening=0"]))
    known, told = Words(Path(folder)), task.sample(3)
    assert told
    mark = known.answer("object")[:-1]
    for one in told:
        places = {tuple(box) for box in one.places if box is not None}
        ends = [bag[-len(mark) :] == mark for bag in one.bags if bag]
        assert sum(ends) == 1 and len(places) == 1  # it counts once
        assert len({tuple(bag[: -len(mark)] if end else bag) for bag, end in zip(filter(None, one.bags), ends)}) == 1
        said = [float(number) for number in known.text(one.answer).strip("[]").split(",")]
        np.testing.assert_allclose(places.pop(), said, atol=0.01)


def test_rows_learn_the_words_of_what_is_in_their_place(parts: list[str]) -> None:
    """The part of a picture that a row stands for is where the object's words go, and a stage begins with the rows."""
    settings = [*parts[:2], "data.wide=0"]
    task = LionAlignTask(recipe("lion-align", settings))
    scene, known = sample_scene("validation", 3), Words(Path(parts[1].partition("=")[2]))
    sample = task.sample(3, "validation", 0.0)
    for item in scene.objects:
        row = sample["patches"][int(item.y * 8) * 8 + int(item.x * 8)]
        said = known.text([one for one in row.tolist() if one >= 0]).split()
        assert {item.color, item.shape, item.size} <= set(said)
    assert (sample["patches"][:, 0] < 0).any()
    marked = [
        row for row in sample["patches"].tolist() if known.text([one for one in row if one >= 0]).endswith("object")
    ]
    assert len(marked) == len({(int(item.x * 8), int(item.y * 8)) for item in scene.objects})
    begun = LionTask(recipe("lion-stage1", parts), 1).model.lion.state_dict()
    aligned = read_part(parts[3].partition("=")[2], "connectors")
    assert {name.split(".")[0] for name in aligned} == {"queries", "aggregator"}
    assert all(torch.equal(begun[name], tensor) for name, tensor in aligned.items())


def test_each_stage_has_its_tasks_and_trains_its_parts(parts: list[str], tmp_path: Path) -> None:
    one = LionTask(recipe("lion-stage1", [*parts, "batch=3", "data.base=false"]), 1)
    assert {one.task(index) for index in range(60)} == {"caption", "vqa"}
    train("lion-stage1", [*QUIET, *parts, f"out={tmp_path / '1'}"], False, lambda *_: None)
    settings = [f"init.lion={tmp_path / '1' / 'checkpoint'}", "batch=3", "data.base=false"]
    two, three = (LionTask(recipe(f"lion-stage{stage}", settings), stage) for stage in (2, 3))
    assert {two.task(index) for index in range(60)} == {"rec", "reg"}
    types = [{TASKS[three.task(index)] for index in range(start, start + 3)} for start in range(0, 90, 3)]
    assert all(len(of_batch) == 1 for of_batch in types) and set.union(*types) == {0, 1}
    trained = [
        {name for name, parameter in task.model.lion.named_parameters() if parameter.requires_grad}
        for task in (one, two, three)
    ]
    assert all("adapters.1" in name or name.startswith("queries.") for name in trained[0])
    assert all("adapters.0" in name or name.startswith("aggregator.") for name in trained[1])
    assert trained[0] | trained[1] < trained[2]
    assert trained[2] - trained[0] - trained[1] == {"soft_prompt"} | {
        name for name, _ in three.model.lion.named_parameters() if "router_ratio" in name
    }
    thawed = LionTask(recipe("lion-stage1", [*parts, "data.base=true"]), 1).model.lion
    assert thawed.language_model.shared.weight.requires_grad
    assert not thawed.vision_encoder.patch_embedding.weight.requires_grad


def test_queries_of_the_t5_learn_slower_by_the_root_of_a_heads_width(parts: list[str]) -> None:
    task = LionTask(recipe("lion-stage3", [*parts, "init.lion=", "lr=0.002"]), 3)
    groups = task.parameters()
    rate = {id(p): group.get("lr", 0.002) for group in groups for p in group["params"]}
    trained = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
    assert len(rate) == len(trained)
    for name, p in trained.items():
        slow = ".language_model." in name and name.endswith(".q.weight")
        assert rate[id(p)] == pytest.approx(0.002 * (40**-0.5 if slow else 1)), name


def test_the_opening_repeats_before_it_asks(parts: list[str], tmp_path: Path) -> None:
    task = LionLanguageTask(recipe("lion-language", [*parts[1:2], "batch=2", "data.opening=3", f"out={tmp_path}"]))
    assert all(told.prompt == told.answer and not told.bags for told in task.sample(1))
    assert all(told.prompt != told.answer and told.bags for told in task.sample(2))


def test_an_answer_counts_as_much_as_it_says(parts: list[str]) -> None:
    """Of a box two decimals of each side count, and the rest hardly; each batch's loss is the mean by these weights."""
    known = Words(Path(parts[1].partition("=")[2]))
    ids = known.answer("[0.123,0.456,0.789,0.012]")
    weights = known.weights(ids, 3)
    assert sum(weights) == pytest.approx(3)
    most = max(weights)
    counted = [known.text([one]) for one, weight in zip(ids, weights) if weight == most]
    assert [one for one in counted if one.isdigit()] == ["1", "2", "4", "5", "7", "8", "0", "1"]
    assert {round(weight / most, 6) for weight in weights} == {0.1, 1.0}
    assert known.weights(known.answer("0.5 red"), 1)[0] == pytest.approx(1 / len(known.answer("0.5 red")))
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]]))
    sums = answer_sums(logits, torch.tensor([[0, IGNORE]]), torch.tensor([[2.0, 0.0]]))
    more = answer_sums(logits, torch.tensor([[1, 1]]), torch.tensor([[1.0, 1.0]]))
    means = mean_losses([sums, more])
    assert float(means["loss"]) == pytest.approx((2 * math.log(2) + 2 * math.log(4)) / 4)
    assert float(means["token_accuracy"]) == pytest.approx(1 / 3)


def test_questions_about_a_picture_stand_in_one_prompt(parts: list[str]) -> None:
    """Most of them, in training alone."""
    turn = packed([LionTurn("vqa", "What color is it?", "red"), LionTurn("vqa", "Is it a ring?", "yes", 2)])
    assert turn.count == 3
    assert (turn.task, turn.question) == ("vqa", "A: What color is it? B: Is it a ring?")
    assert turn.answer == "A: red B: yes"
    all_packed = LionTask(recipe("lion-stage3", [*parts, "init.lion=", "data.packed=1"]), 3)
    samples = [all_packed.sample(index, task="vqa") for index in range(5)]
    answers = [all_packed.words.text(sample.answers[0]) for sample in samples]
    assert all(len(sample.prompts) == len(sample.heard) == len(sample.answers) == 1 for sample in samples)
    assert all(answer.startswith("A: ") and " F: " in answer for answer in answers)
    assert "A:" not in all_packed.words.text(all_packed.sample(0, "validation", "vqa").answers[0])
    told = LionLanguageTask(
        recipe("lion-language", [*parts[1:2], "data.opening=0", "data.places=0", "data.packed=1", "data.lone=0"])
    )
    assert all(len(told.sample(index)) == 1 for index in range(8))
    alone = LionTask(recipe("lion-stage3", [*parts, "init.lion=", "data.packed=0"]), 3)
    assert "A:" not in alone.words.text(alone.sample(0, task="rec").answers[0])


def test_what_a_stage_leaves_loads_and_ablations_have_fewer_parts(parts: list[str], tmp_path: Path) -> None:
    train("lion-stage1", [*QUIET, *parts, f"out={tmp_path / 'run'}"], False, lambda *_: None)
    held = load(tmp_path / "run" / "checkpoint")
    assert held.dims == CONFIGS["tiny"]
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").stat().st_size <= 12_000_000
    less = ["data.levels=[query]", "data.router=false", "data.tags=false"]
    task = LionTask(recipe("lion-stage3", [*parts, "init.lion=", *less]), 3)
    names = {name for name, _ in task.model.lion.named_parameters()}
    assert not [name for name in names if name.startswith("aggregator.") or "router" in name or "adapters.1" in name]
    assert task.words.soft not in task.sample(0, task="vqa").prompts[0]


def test_a_stage_goes_on_from_what_ships() -> None:
    held = load(shipped("lion") / "tiny")
    begun = LionTask(recipe("lion-stage3", ["init.lion=tiny"]), 3)
    state = begun.model.lion.state_dict()
    assert all(torch.equal(held.tensors[name].float(), tensor) for name, tensor in state.items())
    assert set(begun.tagger) == {name for name in held.tensors if name.startswith("tagger.")}


@pytest.mark.parametrize("name", ["shipped/nothing", "shipped/../lion", "shipped/lion/parts"])
def test_parts_that_do_not_ship_are_named(name: str) -> None:
    with pytest.raises(BadInput, match="come with the package; give a run's folder"):
        part_folder(name)
