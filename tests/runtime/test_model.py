import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CONTEXT, PATCHES, PIECES, PROMPT, SIZE, WIDTH

import mllm_edge
from mllm_edge.bundle.read import read_manifest
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.runtime import Answer, Model
from mllm_edge.runtime.engines.interface import LanguageModel, Step

RNG = np.random.default_rng(11)
PICTURES = [RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8) for _ in range(3)]
Pass = list[tuple[str, int, int]]


@pytest.fixture
def model(tiny_bundle: Path) -> Iterator[Model]:
    with mllm_edge.load(tiny_bundle, threads=1, kv_type="f32") as loaded:
        yield loaded


@pytest.fixture
def calls(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What ran: names of stages, and (kept, new) of every prefill."""
    log: list[Any] = []
    for name, stage in list(model.stages.items()):
        model.stages[name] = Spy(stage, name, log)  # type: ignore[assignment]
    prefill = model.language_model.prefill

    def spy(embeds: np.ndarray, keep: int = 0, state: bool = False) -> Step:
        log.append((keep, len(embeds)))
        return prefill(embeds, keep, state)

    monkeypatch.setattr(model.language_model, "prefill", spy)
    return log


class Spy:
    def __init__(self, stage: Any, name: str, log: list[Any]):
        self.stage, self.name, self.log, self.spec = stage, name, log, stage.spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stage, name)

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        self.log.append(self.name)
        out: dict[str, np.ndarray] = self.stage(**arrays)
        return out


def greedy(model: Model, embeds: np.ndarray, count: int) -> list[int]:
    """Decoding as plainly as it can be written, from nothing kept."""
    step = model.language_model.prefill(embeds)
    ids = [int(step.logits.argmax())]
    while len(ids) < count and ids[-1] != 2:
        ids.append(int(model.language_model.extend([ids[-1]]).logits.argmax()))
    return ids


def scripted(model: Model, monkeypatch: pytest.MonkeyPatch, *tokens: int) -> None:
    """Make the language model want these tokens one after another, whatever it reads."""
    wanted = iter(tokens)

    def logits() -> Step:
        row = np.zeros(len(PIECES), np.float32)
        row[next(wanted, 2)] = 9
        return Step(row, np.zeros((0, WIDTH), np.float32))

    language_model: LanguageModel = model.language_model
    prefill, extend = language_model.prefill, language_model.extend
    monkeypatch.setattr(language_model, "prefill", lambda *a: (prefill(*a), logits())[1])
    monkeypatch.setattr(language_model, "extend", lambda *a: (extend(*a), logits())[1])


def ids_of(*pieces: str) -> list[int]:
    return [PIECES.index(piece) for piece in pieces]


def test_answers_are_those_of_plain_greedy_decoding(tiny_bundle: Path, model: Model) -> None:
    with mllm_edge.load(tiny_bundle, threads=1, kv_type="f32") as other:
        answers = []
        for picture in [*PICTURES, PICTURES[0]]:
            answer = model.generate("what", picture, max_tokens=8)
            assert answer.tokens.ids == greedy(other, other.prompt_embeds("what", picture), 8)
            answers.append(answer.tokens.ids)
    assert answers[0] == answers[3] and len({tuple(ids) for ids in answers}) == 3


def test_a_known_picture_is_not_encoded_again(model: Model, calls: list[Any]) -> None:
    for picture in [*PICTURES, PICTURES[0]]:
        answer = model.generate("what", picture)
    assert calls.count("vision_encoder") == calls.count("connector") == 3
    assert answer.timings["vision_encoder"] == answer.timings["connector"] == 0
    model.generate("the", PICTURES[1].copy())
    assert calls.count("vision_encoder") == 3


def test_the_cache_forgets_the_oldest_picture(model: Model, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm_edge.runtime.tensors.CACHE_BYTES", 2 * PATCHES * WIDTH * 4)
    for index in (0, 1, 0, 2, 0, 1):  # 2 drives 1 out, not 0, which was used later
        model.look(PICTURES[index])
    assert calls.count("vision_encoder") == 4


def test_a_second_question_reads_only_what_is_new(model: Model, calls: list[Any]) -> None:
    first = model.generate("what is this", PICTURES[0])
    second = model.generate("what is red", PICTURES[0])
    (kept, new) = calls[-1]
    assert kept + new == second.tokens.prompt and kept > first.tokens.image and new < kept
    assert calls.count("vision_encoder") == 1
    model.generate("what is red", PICTURES[0])
    assert calls[-1] == (second.tokens.prompt - 1, 1)
    model.generate("what is red", PICTURES[1])  # same text, other picture: kept up to the picture
    assert calls[-1][0] == 1 + len(model.tokenize("the USER: "))


def test_rows_of_the_prompt(model: Model) -> None:
    embeds = model.prompt_embeds("a<image>b<image>", [PICTURES[0], PICTURES[1]])
    lm = model.language_model
    parts = [
        lm.embed([1, *model.tokenize("the USER: a")]),
        *model.look(PICTURES[0]),
        lm.embed(model.tokenize("b")),
        *model.look(PICTURES[1]),
        lm.embed(model.tokenize(" ASSISTANT:")),
    ]
    np.testing.assert_array_equal(embeds, np.concatenate(parts))


def test_image_embeddings_equal_the_stages_by_hand(model: Model) -> None:
    white = np.full((SIZE, SIZE, 3), 255, np.uint8)
    features = model.stages["vision_encoder"](pixel_values=np.full((1, 3, SIZE, SIZE), 2, np.float32))
    expected = model.stages["connector"](**features)["image_embeds"][0]  # (1 - 0.5) / 0.25 = 2
    (embeds,) = model.look(white)
    np.testing.assert_allclose(embeds, expected, atol=1e-5)


def test_raw_prompts_are_taken_as_they_are(model: Model) -> None:
    lm = model.language_model
    raw = model.prompt_embeds("<s>the</s><image>red", PICTURES[0], raw=True)
    parts = [lm.embed([1, *model.tokenize("the"), 2]), *model.look(PICTURES[0]), lm.embed(model.tokenize("red"))]
    np.testing.assert_array_equal(raw, np.concatenate(parts))
    assert model.generate("the red", raw=True).tokens.prompt == 1 + len(model.tokenize("the red"))


def test_stream_gives_the_same_answer_in_pieces(model: Model) -> None:
    whole = model.generate("what", PICTURES[0], max_tokens=12)
    *pieces, answer = model.stream("what", PICTURES[0], max_tokens=12)
    assert isinstance(answer, Answer) and all(isinstance(piece, str) and piece for piece in pieces)
    assert "".join(pieces) == answer.text == whole.text
    assert answer.tokens == whole.tokens


def test_characters_are_never_split(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    smile = [3 + byte for byte in "🙂".encode()]
    scripted(model, monkeypatch, *ids_of("▁the"), *smile, *ids_of("é"), 2)
    *pieces, answer = model.stream("what")
    assert pieces == ["the", "🙂", "é"]
    assert answer.tokens.ids[-1] == 2 and answer.tokens.generated == 7


def test_stop_strings_across_tokens(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(model, monkeypatch, *ids_of("▁red", "#", "##", "a"))
    *pieces, answer = model.stream("what", stop=["###"])
    assert pieces == ["red"] and answer.text == "red" and answer.tokens.generated == 3


def test_without_a_stop_string_the_end_token_ends(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(model, monkeypatch, *ids_of("▁red", "#", "#"), 2)
    answer = model.generate("what", stop=["###"])
    assert answer.text == "red##" and answer.tokens.ids[-1] == 2


def test_a_seed_reproduces(model: Model) -> None:
    def ids(seed: int) -> list[int]:
        return model.generate("what", PICTURES[0], temperature=1.5, seed=seed, max_tokens=12).tokens.ids

    assert ids(1) == ids(1) != ids(2)


def test_chat_reads_every_turn_once(tiny_bundle: Path, model: Model, calls: list[Any]) -> None:
    chat = model.chat(max_tokens=4)
    first = chat.ask("what", PICTURES[0])
    second = chat.ask("the red")
    assert calls.count("vision_encoder") == 1
    kept, new = calls[-1]
    assert kept >= first.tokens.prompt + first.tokens.generated - 1
    assert new <= len(model.tokenize("USER: the red ASSISTANT:")) + 2
    lm = model.language_model
    history = [
        model.prompt_embeds("what", PICTURES[0]),
        lm.embed([token for token in first.tokens.ids if token != 2] + [2]),
        lm.embed(model.tokenize("USER: the red ASSISTANT:")),
    ]
    with mllm_edge.load(tiny_bundle, threads=1, kv_type="f32") as other:
        assert second.tokens.ids == greedy(other, np.concatenate(history), 4)
    assert second.tokens.prompt == sum(map(len, history)) and second.tokens.image == PATCHES


def test_chat_takes_a_picture_in_a_later_turn(model: Model, calls: list[Any]) -> None:
    chat = model.chat(max_tokens=2)
    chat.ask("what")
    assert chat.ask("the", PICTURES[0]).tokens.image == PATCHES
    assert chat.ask("red", [PICTURES[0], PICTURES[1]]).tokens.image == 3 * PATCHES
    assert calls.count("vision_encoder") == 2


@pytest.mark.parametrize(
    ("wanted", "text", "closed"),
    [
        (["▁red", "##", "#"], "red", ["▁red", "##", "#"]),  # closed by the model, token by token
        (["▁red"], "red", ["▁red", "##", "#"]),  # ended otherwise: closed by the template, without a space
    ],
)
def test_how_a_stopped_turn_is_remembered(
    edit_bundle: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    wanted: list[str],
    text: str,
    closed: list[str],
) -> None:
    folder = edit_bundle(prompt=replace(PROMPT, stop=["###"], answer=" {text}###"))
    with mllm_edge.load(folder, threads=1) as model:
        scripted(model, monkeypatch, *ids_of(*wanted), 2)
        chat = model.chat()
        assert chat.ask("what").text == text
        remembered = chat._dialogue.script[-1]
    assert remembered == ids_of(*closed)


def test_an_abandoned_turn_leaves_the_chat_as_it_was(model: Model) -> None:
    chat, other = model.chat(max_tokens=6), model.chat(max_tokens=6)
    expected = other.ask("the red").tokens
    stream = chat.stream("what is this")
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert chat.ask("the red").tokens == expected


def test_an_interrupted_answer_is_an_error_not_nonsense(model: Model) -> None:
    stream = model.stream("what", max_tokens=8)
    next(stream)
    model.generate("the red")
    with pytest.raises(MllmEdgeError, match="interrupted by a newer one"):
        list(stream)


def test_after_ctrl_c_the_next_answer_is_right(
    model: Model, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extend = model.language_model.extend

    def interrupt(ids: list[int], states: int = 0) -> Step:
        extend(ids, states)  # the signal is seen when llama.cpp returns
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.language_model, "extend", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.generate("what is this")
    with mllm_edge.load(tiny_bundle, threads=1, kv_type="f32") as other:
        assert model.generate("what is red").tokens == other.generate("what is red").tokens


def test_a_prompt_longer_than_the_context_is_refused_before_anything_runs(model: Model, calls: list[Any]) -> None:
    with pytest.raises(BadInput, match=rf"positions \({PATCHES} of them for pictures\).*{CONTEXT}.*shorten"):
        model.generate("red " * CONTEXT, PICTURES[0])
    assert calls == []


def test_max_tokens_are_cut_with_a_warning(model: Model) -> None:
    room = CONTEXT - model.generate("what").tokens.prompt
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate("what", max_tokens=room)
    with pytest.warns(RuntimeWarning, match=f"at most {room} tokens"):
        answer = model.generate("what", max_tokens=room + 1)
    assert answer.tokens.generated <= room


def test_a_smaller_context_can_be_asked_for(tiny_bundle: Path) -> None:
    with mllm_edge.load(tiny_bundle, threads=1, context=24) as model, pytest.raises(BadInput, match=f"up to {CONTEXT}"):
        model.generate("what is this")


def test_json_is_the_documented_one(model: Model) -> None:
    document = model.generate("what", PICTURES[0]).to_json()
    assert list(document) == ["text", "tokens", "masks", "boxes", "images", "timings_ms", "memory_mb"]
    assert list(document["tokens"]) == ["prompt", "image", "generated", "ids"]
    stages = ["load", "preprocess", "vision_encoder", "connector", "prefill", "decode", "total"]
    assert list(document["timings_ms"]) == stages and all(document["timings_ms"].values())
    assert document["memory_mb"]["peak_rss"] > 10 and document["memory_mb"]["peak_device"] is None


@pytest.mark.parametrize(
    "options",
    [{"target": "tpu"}, {"threads": 0}, {"context": 0}, {"context": CONTEXT + 1}, {"kv_type": "q4"}],
)
def test_unusable_options(tiny_bundle: Path, options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(options)).split("_")[0] + r"|KV"):
        mllm_edge.load(tiny_bundle, **options)


def test_targets_that_cannot_run_here(tiny_bundle: Path, edit_bundle: Callable[..., Path]) -> None:
    with pytest.raises(MllmEdgeError, match="made for cpu"):
        mllm_edge.load(tiny_bundle, target="trt")
    stages = [replace(stage, engine="tensorrt") for stage in read_manifest(tiny_bundle).stages]
    with pytest.raises(MllmEdgeError, match=r"no NVIDIA GPU|cuda-bindings|cannot run here"):  # never on the CPU instead
        mllm_edge.load(edit_bundle(target="trt", stages=stages))


def test_a_cuda_bundle_falls_back_with_a_warning_only_if_not_asked_for(edit_bundle: Callable[..., Path]) -> None:
    folder = edit_bundle(target="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mllm_edge.load(folder, target="cpu").close()


def test_a_flipped_bit_is_found_unless_hashes_are_off(edit_bundle: Callable[..., Path]) -> None:
    folder = edit_bundle()
    data = bytearray((folder / "language_model.gguf").read_bytes())
    data[-5] ^= 1
    (folder / "language_model.gguf").write_bytes(data)
    with pytest.raises(BadInput, match="SHA-256"):
        mllm_edge.load(folder)
    mllm_edge.load(folder, verify_hash=False, threads=1).close()


def test_a_bundle_without_pictures_says_so(edit_bundle: Callable[..., Path]) -> None:
    with mllm_edge.load(edit_bundle(stages=[], sources=[], prompt=replace(PROMPT, slots=[])), threads=1) as model:
        assert model.generate("what").tokens.image == 0
        with pytest.raises(BadInput, match="takes no pictures"):
            model.generate("what", PICTURES[0])


def test_unknown_options_are_type_errors(model: Model) -> None:
    with pytest.raises(TypeError):
        model.generate("what", temprature=1.0)  # type: ignore[call-arg]


def test_a_closed_model_says_so(tiny_bundle: Path) -> None:
    model = mllm_edge.load(tiny_bundle, threads=1)
    model.close()
    model.close()
    with pytest.raises(MllmEdgeError, match="closed"):
        model.generate("what")
