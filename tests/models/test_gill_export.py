"""A small random GILL through export and the runtime, against PyTorch and diffusers put together by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
import toy_gill
from calls_for_tests import Call
from PIL import Image
from toy_gill import MICRO, START, ByHand, psnr
from toy_retrieval import photographs
from toys import noise_picture

import mllm_edge
from mllm_edge import index as indexing
from mllm_edge.bundle.read import read_manifest
from mllm_edge.checkpoints.tokenizer import checkpoint_tokenizer
from mllm_edge.export.export import export
from mllm_edge.runtime.answer import Answer
from mllm_edge.runtime.answers.index import Index
from mllm_edge.runtime.embedding import Embedder
from mllm_edge.runtime.turn import Drawing

pytest.importorskip("llama_cpp")
QUESTION = "draw a dog"
MOST = 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_gill.checkpoint(tmp_path_factory.mktemp("gill") / "checkpoint", MICRO)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "gill.bundle"
    return export("gill", str(checkpoint), quant="f32", out=out, drawing=Drawing(steps=2))


@pytest.fixture(scope="module")
def hand() -> ByHand:
    return ByHand(toy_gill.state(MICRO), MICRO)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("places") / "photos", 40)


@pytest.fixture(scope="module")
def index(bundle: Path, photos: Path) -> Path:
    with Embedder(bundle, threads=1) as embedder:
        assert embedder.batch > 1
        return indexing.build(embedder, [photos], photos.with_name("photos.index"), force=True).folder


def words(checkpoint: Path, text: str) -> list[int]:
    return checkpoint_tokenizer(checkpoint)(text)


def expected(hand: ByHand, checkpoint: Path, seed: int, most: int = MOST) -> tuple[list[int], torch.Tensor]:
    """Of a picture and then words: BOS stands behind the picture's rows."""
    rows, _ = hand.seen(Image.fromarray(noise_picture(seed)))
    line = words(checkpoint, "\n")
    return hand.answer([rows, hand.embeds([2, *words(checkpoint, QUESTION)])], most, line)


def ask(bundle: Path, seed: int, **options: object) -> Answer:
    with mllm_edge.load(bundle, threads=1, kv_type="f32") as model:
        return model.generate(QUESTION, noise_picture(seed), max_tokens=MOST, **options)  # type: ignore[arg-type]


def test_every_row_of_parity_passes(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    rows = {row.name: row for row in manifest.parity}
    stages = {"vision_encoder", "connector", "heads", "unet", "vae_decoder"}
    assert {*stages, "language_model", "end_to_end", "pictures", "retrieved"} == set(rows)
    assert all(row.passed for row in rows.values())
    assert rows["pictures"].measured["pictures"] + rows["retrieved"].measured["pictures"] > 0


@pytest.mark.parametrize(("seed", "steps"), [(0, 10), (1, None)])
def test_tokens_and_drawn_pictures_are_those_of_pytorch(
    bundle: Path, checkpoint: Path, hand: ByHand, seed: int, steps: int | None
) -> None:
    tokens, states = expected(hand, checkpoint, seed)
    assert len(states) >= 8, "the toy must draw here"
    answer = ask(bundle, seed, drawing=Drawing(seed=seed, steps=steps))
    assert answer.tokens.ids == tokens
    assert answer.tokens.prompt == MICRO.rows + 1 + len(words(checkpoint, QUESTION))
    random = np.random.default_rng(seed)
    assert len(answer.images) == len(states) // 8
    for part, group in zip(answer.images, states.split(8), strict=True):
        text, _, (retrieve, generate) = hand.heads(group)
        assert psnr(np.asarray(part.image), hand.drawn(text, random, steps or 50)) >= 40
        assert part.origin == "generated" and part.image.size == (8, 8)  # without an index, whatever is decided
        assert part.decided == pytest.approx({"retrieve": retrieve, "generate": generate}, abs=1e-3)
        assert part.to_json()["decided"].keys() == {"retrieve", "generate"}


@pytest.mark.parametrize("seed", [0, 1])
def test_an_index_is_searched_where_the_decision_says_so(
    bundle: Path, checkpoint: Path, hand: ByHand, index: Path, photos: Path, seed: int
) -> None:
    files = sorted(photos.rglob("*.png"))
    known = torch.cat([hand.seen(Image.open(file))[1] for file in files])  # [N,d]
    _, states = expected(hand, checkpoint, seed)
    answer = ask(bundle, seed, drawing=Drawing(seed=seed, steps=2, index=Index(index)))
    random = np.random.default_rng(seed)
    for part, group in zip(answer.images, states.split(8), strict=True):
        text, query, (retrieve, generate) = hand.heads(group)
        if retrieve >= generate:
            scores = known @ query
            assert part.origin == "retrieved" and Path(part.file).name == files[int(scores.argmax())].name
            assert part.score == pytest.approx(hand.scale * float(scores.max()), abs=1e-2)
        else:
            assert part.origin == "generated"
            assert psnr(np.asarray(part.image), hand.drawn(text, random, steps=2)) >= 40


def test_the_same_tokens_decide_otherwise_with_another_head(
    hand: ByHand, checkpoint: Path, index: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decision is a tensor like others: here it is given."""
    from mllm_edge.runtime.tensors import Tensors

    real, seen = Tensors.need, []

    def need(self: Tensors, turn: object, name: str) -> object:
        return np.array([logits], np.float32) if name == "decision" else real(self, turn, name)  # type: ignore[arg-type]

    monkeypatch.setattr(Tensors, "need", need)
    for logits in ([2.0, 1.0], [1.0, 2.0]):
        answer = ask(bundle, 0, drawing=Drawing(steps=2, index=Index(index)))
        seen.append({part.origin for part in answer.images})
        assert all(
            part.decided["retrieve"] == pytest.approx(1 / (1 + np.exp(logits[1] - logits[0]))) for part in answer.images
        )
    assert seen == [{"retrieved"}, {"generated"}]


def test_words_first_have_bos_in_front_and_later_turns_have_none(bundle: Path, checkpoint: Path, hand: ByHand) -> None:
    rows, _ = hand.seen(Image.fromarray(noise_picture(3)))
    line = words(checkpoint, "\n")
    before, after = words(checkpoint, "see "), words(checkpoint, " there")
    tokens, _ = hand.answer([hand.embeds([2, *before]), rows, hand.embeds(after)], 12, line)
    with mllm_edge.load(bundle, threads=1, kv_type="f32") as model:
        assert (
            model.generate("see <image> there", noise_picture(3), max_tokens=12, drawing=Drawing(steps=2)).tokens.ids
            == tokens
        )
        (empty, _, bos) = model.prompt_parts("", noise_picture(3))
        assert (empty, bos) == ([], [2])
        chat = model.chat(max_tokens=12)
        first = chat.ask("a dog", drawing=Drawing(steps=2)).tokens
        second = chat.ask("a cat", drawing=Drawing(steps=2)).tokens
    read = [2, *words(checkpoint, "a dog")]
    said = hand.answer([hand.embeds(read)], 12, line)[0]
    assert first.ids == said
    kept = said[:-1] if said[-1] in (2, *line) else said
    read += [*kept, *line, *words(checkpoint, "a cat")]
    assert second.ids == hand.answer([hand.embeds(read)], 12, line)[0]


def test_a_scale_brings_a_picture_at_once(bundle: Path) -> None:
    answer = ask(bundle, 0, drawing=Drawing(steps=2), group_scale=1e5)
    assert answer.tokens.ids == list(range(START, START + 8)) * (MOST // 8)
    assert answer.text == "".join(f"[IMG{number}]" for number in range(8)) * (MOST // 8)
    assert len(answer.images) == MOST // 8


def test_run_writes_text_and_pictures(bundle: Path, index: Path, tmp_path: Path, call: Call) -> None:
    Image.fromarray(noise_picture(0)).save(tmp_path / "noise.png")
    asked = ["run", bundle, QUESTION, "--image", tmp_path / "noise.png", "--json", "--steps", 2, "--max-tokens", MOST]
    for more in ([], ["--index", index]):
        said = call(*asked, *more, "-o", tmp_path / "out")
        assert said.code == 0, said.err
        images = said.document["images"]
        assert images and all(image["origin"] in ("generated", "retrieved") for image in images)
        assert (tmp_path / "out" / "image_0.png").is_file()
