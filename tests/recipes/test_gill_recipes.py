"""The recipes of GILL: its language model, its encoder, what joins them, and its decision."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mllm_edge.checkpoints.tensors import open_folder
from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.unet import UNet
from mllm_edge.models.blocks.vae import VaeDecoder, VaeEncoder
from mllm_edge.models.gill.heads import Heads
from mllm_edge.models.gill.layouts import load as load_gill
from mllm_edge.models.gill.model import CONFIGS, LM, build
from mllm_edge.models.gill.plan import plan
from mllm_edge.models.language.opt import TABLE
from mllm_edge.models.text_to_image import TINY_TEXT, TINY_UNET, TINY_VAE, text_encoder
from mllm_edge.recipes import train
from mllm_edge.recipes.contrast import info_nce, recall
from mllm_edge.recipes.data.caption_tokens import TOKENIZER, train_caption_tokenizer
from mllm_edge.recipes.data.gill_batches import MODES
from mllm_edge.recipes.data.gill_scenes import told
from mllm_edge.recipes.parts import read_part, save_part
from mllm_edge.recipes.recipe import load
from mllm_edge.recipes.slots import SlotHeads
from mllm_edge.recipes.tasks import gill_encoder, gill_language
from mllm_edge.recipes.tasks.gill import GillTask
from mllm_edge.recipes.tasks.gill_decision import DRAW, LOOK, GillDecisionTask, macro_f1
from mllm_edge.recipes.tasks.gill_encoder import GillEncoderTask
from mllm_edge.recipes.tasks.gill_language import GillLanguageTask
from mllm_edge.recipes.tasks.gill_model import at_length, mean_distance
from mllm_edge.recipes.tasks.scene_classifier import SceneClassifier
from mllm_edge.scenes import sample_scene

SMALL = ["log_every=1", "precision=fp32", "warmup=0.0", "workers=0"]


def quiet(step: int, steps: int, metrics: dict[str, float]) -> None:
    pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Random parts of the diffusion model, and a run of each recipe, of a step or two."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    for name in ("vae", "drawn", "judge"):
        (folder / name).mkdir()
    halves = {**VaeEncoder(TINY_VAE).state_dict(), **VaeDecoder(TINY_VAE).state_dict()}
    save_part(folder / "vae", "vae", asdict(TINY_VAE), halves, "", "float16")
    save_part(folder / "drawn", "unet", asdict(TINY_UNET), UNet(TINY_UNET).state_dict(), "", "float16")
    save_part(folder / "drawn", "text_encoder", asdict(TINY_TEXT), text_encoder(TINY_TEXT).state_dict(), "", "float16")
    texts = [told(sample_scene("train", index, 0), index, 0) for index in range(30)]
    train_caption_tokenizer(folder / "drawn" / TOKENIZER, TINY_TEXT.vocabulary, TINY_TEXT.length, texts)
    save_part(folder / "judge", "scene_classifier", {}, SceneClassifier().state_dict(), "", "float16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gill_language, "CORPUS", 300)
        patch.setattr(gill_encoder, "CORPUS", 30)
        small = [*SMALL, "batch=4", "steps=1"]
        train("gill-language", [*small, "evaluate=2", f"out={folder / 'words'}"], False, quiet)
        train("gill-encoder", [*small, "evaluate=4", f"out={folder / 'seen'}"], False, quiet)
        train(
            "gill",
            [*SMALL, *parts(folder), "batch=4", "steps=2", "evaluate=10", f"out={folder / 'gill'}"],
            False,
            quiet,
        )
        decided = ["steps=40", "data.captions=20", "evaluate=10", f"init.gill={folder / 'gill'}"]
        train("gill-decision", [*SMALL, *decided, f"out={folder / 'decided'}"], False, quiet)
        yield folder


def parts(folder: Path) -> list[str]:
    named = {"language": "words", "vision_encoder": "seen", "diffusion": "drawn", "vae": "vae", "judge": "judge"}
    return [f"init.{part}={folder / name}" for part, name in named.items()]


def task_of(runs: Path, *more: str) -> GillTask:
    return GillTask(load("gill", [*parts(runs), "batch=4", *more]))


def falls(task: Any, rate: float, steps: int, many: int) -> tuple[float, float]:
    """The loss of one batch before and after steps on it."""
    optimizer = torch.optim.AdamW(task.parameters(), lr=rate)
    batch = task.collate([task.sample(index) for index in range(many)])
    seen = []
    for _ in range(steps + 1):
        loss = task.model(**batch)["loss"]
        seen.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return seen[0], seen[-1]


def test_contrast_by_hand() -> None:
    texts, images = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    long = math.sqrt(5)
    cosines = [[1.0, 1 / long], [0.0, 2 / long]]  # of texts in rows
    scale = 2.0
    rows = [math.log(sum(math.exp(scale * x) for x in row)) - scale * row[i] for i, row in enumerate(cosines)]
    columns = [[cosines[0][i], cosines[1][i]] for i in range(2)]
    down = [math.log(sum(math.exp(scale * x) for x in row)) - scale * row[i] for i, row in enumerate(columns)]
    assert float(info_nce(texts, images, torch.tensor(2.0).log())) == pytest.approx(sum(rows + down) / 4, abs=1e-6)
    assert recall(texts, images) == {"text_to_image": 1.0, "image_to_text": 1.0}
    assert recall(texts, images.flip(0)) == {"text_to_image": 0.0, "image_to_text": 0.0}


def test_distance_is_a_norm_and_not_its_square() -> None:
    found = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    assert float(mean_distance(found, torch.zeros_like(found))) == pytest.approx((5 + 0) / 2)


def test_rows_get_the_mean_length_of_the_others() -> None:
    found = at_length(torch.tensor([[0.0, 9.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    assert found.tolist() == [[0.0, 2.0], [pytest.approx(1.2), pytest.approx(1.6)]]


def test_slots_without_a_word_are_in_no_loss() -> None:
    heads = SlotHeads(3)
    torch.nn.init.zeros_(heads.weight)
    torch.nn.init.zeros_(heads.bias)
    labels = {name: torch.full((1, 4), -100) for name in ("color", "shape", "size", "place")}
    labels["size"] = torch.tensor([[0, 1, 2, 2]])
    loss, right = heads.losses(torch.ones(1, 3), labels)
    assert loss.item() == pytest.approx(math.log(3)) and float(right["size"]) == 0.25


def test_a_step_moves_the_picture_tokens_and_nothing_frozen(runs: Path) -> None:
    task = task_of(runs, "weight_decay=0.1")
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2, weight_decay=0.1)
    task.model(**task.collate([task.sample(index) for index in range(4)]))["loss"].backward()
    optimizer.step()
    moved = {name.split(".")[0] for name, tensor in task.model.state_dict().items() if not tensor.equal(before[name])}
    assert moved == {"connector", "heads", "logit_scale", "rows"}
    task.model.rescale()
    lengths = task.model.rows.norm(dim=1)
    torch.testing.assert_close(lengths, task.model.others.norm(dim=1).mean().expand(8))


def test_weight_decay_touches_the_picture_tokens_alone_of_the_table(runs: Path) -> None:
    task = task_of(runs)
    decayed = [p for group in task.parameters() if group.get("weight_decay") != 0.0 for p in group["params"]]
    assert any(p is task.model.rows for p in decayed)
    table = task.model.language_model.get_input_embeddings().weight
    assert not table.requires_grad and all(p is not table for p in decayed)
    assert all(p.dtype == torch.float32 for p in decayed)


def test_the_loss_is_the_sum_of_its_parts_and_falls(runs: Path) -> None:
    task = task_of(runs)
    found = task.model(**task.collate([task.sample(index) for index in range(4)]))
    parts_of = [float(found[name]) for name in ("caption", "telling", "contrast", "distance")]
    assert float(found["loss"]) == pytest.approx(sum(parts_of), rel=1e-5)
    first, last = falls(task, 3e-3, 8, 4)
    assert last < 0.9 * first


def test_pairs_have_the_same_groups_in_order(runs: Path) -> None:
    """Behind a first caption the second one's state differs, but it is the second one's."""
    task = task_of(runs)
    samples = [task.sample(index) for index in range(4)]
    single, joined = (task.batches.batch(samples, [kind] * 3) for kind in (False, True))
    model, table = task.model.eval(), task.model.table()
    found = []
    for batch in (single, joined):
        states = model.states(table, batch["retrieval"], table[:0])
        found.append(model.groups(states, batch["retrieval"]))
    assert found[0].shape == found[1].shape == (4, 8, 192)
    torch.testing.assert_close(found[1][::2], found[0][::2], atol=1e-4, rtol=1e-4)
    assert (found[1][1::2] - found[0][1::2]).abs().max() > 1e-3
    assert joined["captioning"].shape[0] == 2 and int((joined["captioning"] == -1).sum()) == 16


def test_each_mode_is_joined_by_its_own_chance(runs: Path) -> None:
    task = task_of(runs)
    seen = set()
    for first in range(12):
        samples = [{**task.sample(0), "index": first}, task.sample(1)]
        batch = task.collate(samples)
        seen.add(tuple(len(batch[mode]) for mode in MODES))
        assert all(batch[m].equal(task.collate(samples)[m]) for m in MODES)
    assert len(seen) > 3


def test_the_checkpoint_is_a_whole_gill(runs: Path) -> None:
    held = load_gill(runs / "gill")
    assert not held.dims.decides and held.config == "gill-tiny"
    assert sum(t.numel() for t in held.tensors.values()) * 2 < 25e6
    table = held.tensors[f"{LM}{TABLE}"].float()
    lengths = table.norm(dim=1)
    torch.testing.assert_close(lengths[-8:], lengths[:-8].mean().expand(8), rtol=2e-3, atol=0)
    words = read_part(str(runs / "words"), "language_model")
    torch.testing.assert_close(table[:-8], words[TABLE][:-8])
    built: Any = build(held)
    assert built.language_model.lm_head.weight.shape == (CONFIGS["tiny"].language.vocabulary, 192)
    lowered = plan(held)
    assert [stage.name for stage in lowered.stages] == ["vision_encoder", "connector", "heads", "unet", "vae_decoder"]
    assert set((runs / "gill").glob("*.json")) >= {runs / "gill" / "tokenizer.json", runs / "gill" / "config.json"}


def test_the_decision_is_added_in_the_published_order(runs: Path) -> None:
    first, held = load_gill(runs / "gill"), load_gill(runs / "decided")
    assert held.dims.decides and set(held.tensors) == {*first.tensors, "heads.decision.weight", "heads.decision.bias"}
    assert all(held.tensors[name].equal(tensor) for name, tensor in first.tensors.items())
    assert (DRAW, LOOK) == (0, 1)  # as the files have it
    heads = Heads(held.dims.mapper, 192, 64, True)
    with torch.no_grad():
        heads.decision.weight.zero_()
        heads.decision.bias.copy_(torch.tensor([1.0, 2.0]))  # draw, look
        assert heads(torch.zeros(1, 8, 192), torch.zeros(1, 8, 192))[2].tolist() == [[2.0, 1.0]]


def test_a_unet_that_went_on_takes_its_place_behind_the_same_text_encoder(runs: Path, tmp_path: Path) -> None:
    for name in ("text_encoder.safetensors", TOKENIZER):
        shutil.copy(runs / "drawn" / name, tmp_path / name)
    unet = UNet(TINY_UNET).state_dict()
    save_part(tmp_path, "unet", asdict(TINY_UNET), unet, "", "float16")
    settings = [f"init.gill={runs / 'gill'}", "data.captions=8"]
    task = GillDecisionTask(load("gill-decision", [*settings, f"init.diffusion={tmp_path}"]))
    task.save(tmp_path / "made", task.model.state_dict())
    tensors, before = (load_gill(folder).tensors for folder in (tmp_path / "made", runs / "gill"))
    for name, tensor in unet.items():
        torch.testing.assert_close(tensors[f"unet.{name}"].float(), tensor, atol=1e-3, rtol=1e-3)
    assert all(tensors[name].equal(before[name]) for name in before if not name.startswith("unet."))
    torch.manual_seed(5)
    save_part(tmp_path, "text_encoder", asdict(TINY_TEXT), text_encoder(TINY_TEXT).state_dict(), "", "float16")
    with pytest.raises(BadInput, match="has another text encoder or size than the GILL; train gill again"):
        GillDecisionTask(load("gill-decision", [*settings, f"init.diffusion={tmp_path}"]))


def test_decisions_are_balanced_and_scored(runs: Path) -> None:
    task = GillDecisionTask(load("gill-decision", [f"init.gill={runs / 'gill'}", "data.captions=8"]))
    assert task.model.labels.tolist() == [DRAW, LOOK] * 4 and task.model.states.shape == (8, 192)
    found, labels = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    assert macro_f1(found, labels) == pytest.approx((2 / 3 + 4 / 5) / 2)
    open_folder(runs / "decided")  # a checkpoint like any other


def test_the_encoder_begins_with_the_shared_one_and_learns(runs: Path) -> None:
    task = GillEncoderTask(load("gill-encoder", [f"out={runs / 'seen'}"]))
    shared, own = read_part("shipped", "vision_encoder"), task.model.vision_encoder.state_dict()
    assert all(own[name].equal(tensor) for name, tensor in shared.items())
    assert {name.split(".")[2] for name in own if name.startswith("encoder.layers.")} == set("012345")
    first, last = falls(task, 2e-3, 8, 4)
    assert last < 0.8 * first


def test_the_language_model_reads_rows_and_learns(runs: Path) -> None:
    task = GillLanguageTask(load("gill-language", [f"out={runs / 'words'}"]))
    (ids, labels), bags, _ = task._read(sample_scene("train", 0, 0), "A")
    assert ids[:5] == [-1, -1, -1, -1, 2] and labels[:5] == [-100] * 4 + [2] and len(bags) == 4
    first, last = falls(task, 3e-3, 8, 8)
    assert last < 0.8 * first


def test_a_summary_is_read_but_never_said(runs: Path) -> None:
    task = GillLanguageTask(load("gill-language", [f"out={runs / 'words'}"]))
    (ids, labels), _, slots = task.summed(sample_scene("train", 0, 0), "A red circle.")
    assert ids[-1] == CONFIGS["tiny"].start - 1 and labels[-1] == -100
    assert np.all(slots["size"] == -100)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("gill", ["batch=3"], "not in pairs"),
        ("gill", ["init.vae="], "names no vae"),
        ("gill", ["config=6.7b"], "unknown config '6.7b'"),
        ("gill", ["init.vision_encoder=shipped"], "init.vision_encoder is of another size"),
        ("gill-decision", ["init.gill="], "names no gill"),
    ],
)
def test_what_cannot_be_trained_is_named(
    runs: Path, tmp_path: Path, recipe: str, overrides: list[str], message: str
) -> None:
    named = [*parts(runs), "batch=4"] if recipe == "gill" else []
    with pytest.raises(BadInput, match=message):
        train(recipe, [*SMALL, *named, *overrides, f"out={tmp_path / 'run'}"], False, quiet)


def test_an_encoder_of_another_size_is_named(tmp_path: Path) -> None:
    save_part(tmp_path, "vision_encoder", {}, {"class_embedding": torch.zeros(3)}, "", "float32")
    with pytest.raises(BadInput, match=r"init\.vision_encoder has another"):
        train("gill-encoder", [*SMALL, f"init.vision_encoder={tmp_path}", f"out={tmp_path / 'run'}"], False, quiet)
