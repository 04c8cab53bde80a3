"""OPT as llama.cpp's gpt2: logits, states and tokens equal to transformers' class of the same weights."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_for_tests import causal, random_opt
from tokenizers_to_test import CORPUS, gpt2_lists

from mllm_edge.bundle.manifest import LanguageModelEntry
from mllm_edge.checkpoints.tokenizer import checkpoint_tokenizer
from mllm_edge.checkpoints.tokenizer_files import extend
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.export.gguf.writer import export_language_model
from mllm_edge.models.language.llama import LlamaReference
from mllm_edge.models.language.opt import OptDims
from mllm_edge.quants import QUANTS
from mllm_edge.runtime.engines.interface import Options
from mllm_edge.runtime.engines.llama.library import library
from mllm_edge.runtime.engines.llama.model import LlamaLanguageModel

MARKS = [f"[M{number}]" for number in range(8)]
DIMS = OptDims(vocabulary=393, width=64, ffn_width=96, layers=3, heads=4, context=128)
WIDE = OptDims(vocabulary=396, width=256, ffn_width=512, layers=3, heads=4, context=128)  # K-quants have blocks of 256
F32 = Options("cpu", True, 1, "f32", 128)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lists, folder = tmp_path_factory.mktemp("lists"), tmp_path_factory.mktemp("tokenizer")
    extend(gpt2_lists(lists), folder, ["<|image|>"], MARKS)
    return folder


def exported(path: Path, dims: OptDims, quant: str, tokenizer: Path) -> LanguageModelEntry:
    return export_language_model(causal(dims, random_opt(dims).state_dict(), tokenizer), path, quant)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> tuple[Path, LanguageModelEntry]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, exported(folder / "model.gguf", DIMS, "f32", tokenizer)


@pytest.fixture
def model(plain: tuple[Path, LanguageModelEntry]) -> Iterator[LlamaLanguageModel]:
    loaded = LlamaLanguageModel(*plain, F32)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def reference() -> LlamaReference:
    return LlamaReference(random_opt(DIMS))


def prompt(dims: OptDims, length: int, seed: int = 0) -> np.ndarray:
    """Rows such as a picture's, which are no token's."""
    return np.random.default_rng(seed).normal(scale=0.3, size=(length, dims.width)).astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each row."""
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_logits_and_states_are_those_of_transformers(model: LlamaLanguageModel, reference: LlamaReference) -> None:
    rows, tokens = prompt(DIMS, 9), [2, 7, 300, 17, 1, 390]
    logits, states = reference.forced(rows, tokens)
    steps = [model.prefill(rows, state=True), *(model.extend([token], 1) for token in tokens)]
    assert np.abs(logits).max() > 2
    np.testing.assert_allclose([step.logits for step in steps], logits, atol=1e-4)
    np.testing.assert_allclose(np.concatenate([step.hidden for step in steps]), states, atol=1e-4)


def test_64_greedy_tokens_are_those_of_transformers(model: LlamaLanguageModel, reference: LlamaReference) -> None:
    rows = prompt(DIMS, 5)
    expected = reference.generate(rows, 64)
    step, tokens = model.prefill(rows), []
    while len(tokens) < 64:
        tokens.append(int(step.logits.argmax()))
        step = model.extend(tokens[-1:])
    assert tokens == expected and len(set(tokens)) > 10


def test_a_group_of_eight_in_one_batch_has_the_states_at_its_own_places(
    model: LlamaLanguageModel, reference: LlamaReference
) -> None:
    rows, group = prompt(DIMS, 9), list(range(385, 393))
    logits, states = reference.forced(rows, group)
    model.prefill(rows)
    step = model.extend(group, states=8)
    np.testing.assert_allclose(step.hidden, states[1:], atol=1e-4)
    np.testing.assert_allclose(step.logits, logits[-1], atol=1e-4)


def test_token_rows_are_the_tables_and_a_prefix_is_kept(model: LlamaLanguageModel, reference: LlamaReference) -> None:
    np.testing.assert_array_equal(model.embed([2, 392]), reference.embed([2, 392]))
    rows = np.concatenate([model.embed([2, 9, 300]), prompt(DIMS, 4)])
    model.prefill(np.concatenate([rows[:5], prompt(DIMS, 6, seed=1)]))
    np.testing.assert_allclose(model.prefill(rows[5:], keep=5).logits, reference.forced(rows, [])[0][0], atol=1e-4)


def test_the_context_ends_with_the_last_position(
    plain: tuple[Path, LanguageModelEntry], model: LlamaLanguageModel, reference: LlamaReference
) -> None:
    rows = prompt(DIMS, 127)
    model.prefill(rows)
    logits, _ = reference.forced(rows, [5])
    np.testing.assert_allclose(model.extend([5]).logits, logits[-1], atol=1e-4)
    with pytest.raises(MllmEdgeError, match="129 positions do not fit"):
        model.extend([5])
    with pytest.raises(BadInput, match="has 128 positions, not 256"):
        LlamaLanguageModel(*plain, dataclasses.replace(F32, context=256))


@pytest.mark.parametrize("quant", list(QUANTS))
def test_every_quantization_is_as_near_as_it_may_be(tmp_path: Path, tokenizer: Path, quant: str) -> None:
    entry = exported(tmp_path / "model.gguf", WIDE, quant, tokenizer)
    assert entry.gguf and entry.gguf.embedding.dtype in ("F32", "F16", "Q8_0")
    model = LlamaLanguageModel(tmp_path, entry, F32)
    rows, tokens = prompt(WIDE, 9), [2, 7, 300, 17, 1, 390]
    try:
        steps = [model.prefill(rows, state=True), *(model.extend([token], 1) for token in tokens)]
    finally:
        model.close()
    logits, states = LlamaReference(random_opt(WIDE)).forced(rows, tokens)
    least = QUANTS[quant].tolerance["cosine"]
    assert cosine(np.stack([step.logits for step in steps]), logits).min() > least
    assert cosine(np.concatenate([step.hidden for step in steps]), states).min() > least
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("quant", [name for name, quant in QUANTS.items() if quant.k])
def test_k_quants_are_those_of_llama_cpps_own_quantizer(tmp_path: Path, tokenizer: Path, quant: str) -> None:
    for name, kind in (("f32", "f32"), ("ours", quant)):
        exported(tmp_path / f"{name}.gguf", WIDE, kind, tokenizer)
    settings = library().llama_model_quantize_default_params()
    settings.ftype = int(gguf.LlamaFileType[QUANTS[quant].file_type])
    settings.token_embedding_type = int(gguf.GGMLQuantizationType.Q8_0)
    source, theirs = (str(tmp_path / name).encode() for name in ("f32.gguf", "theirs.gguf"))
    assert library().llama_model_quantize(source, theirs, settings) == 0
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "theirs.gguf").tensors}
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "ours.gguf").tensors}
    assert {name: t.tensor_type for name, t in found.items()} == {name: t.tensor_type for name, t in expected.items()}
    for name in (name for name in found if ".ffn_" not in name):  # those are scaled for their quantization
        np.testing.assert_array_equal(found[name].data, expected[name].data, err_msg=name)


def test_what_the_file_holds(plain: tuple[Path, LanguageModelEntry]) -> None:
    reader = gguf.GGUFReader(plain[0] / "model.gguf")
    state = random_opt(DIMS).state_dict()
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert reader.get_field("general.architecture").contents() == "gpt2"
    assert reader.get_field("gpt2.context_length").contents() == len(tensors["position_embd.weight"]) == 128
    assert "output.weight" not in tensors  # the head is the table
    here = "model.decoder.layers.1."
    stacked = torch.cat([state[f"{here}self_attn.{name}_proj.weight"] for name in "qkv"])
    np.testing.assert_array_equal(tensors["blk.1.attn_qkv.weight"], stacked)
    np.testing.assert_array_equal(tensors["blk.1.ffn_up.bias"], state[f"{here}fc1.bias"] * 4096)
    np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight"], state[f"{here}fc2.weight"] / 4096)
    np.testing.assert_array_equal(tensors["blk.1.ffn_down.bias"], state[f"{here}fc2.bias"])
    np.testing.assert_array_equal(tensors["position_embd.weight"], state["model.decoder.embed_positions.weight"][2:])
    _, entry = plain
    assert entry.gguf and (entry.context, entry.kv_bytes_per_token) == (128, 2 * 3 * 64 * 2)
    assert entry.bytes_per_token == entry.gguf.bytes - 128 * 64 * 4  # a step reads one row of the positions


def test_wrong_tensors_are_named(tmp_path: Path, tokenizer: Path) -> None:
    state = dict(random_opt(DIMS).state_dict())
    name = "model.decoder.embed_positions.weight"
    for wrong, message in ((state[name][2:], r"shape \(128, 64\), not \(130, 64\)"), (state[name] / 0, "NaN")):
        with pytest.raises(BadInput, match=f"{name} has .*{message}"):
            export_language_model(causal(DIMS, {**state, name: wrong}, tokenizer), tmp_path / "a.gguf", "f32")


def perplexity(model: LlamaLanguageModel, ids: Sequence[int]) -> float:
    step, losses = model.prefill(model.embed(ids[:1])), []
    for token in ids[1:]:
        logits = step.logits.astype(np.float64) - step.logits.max()
        losses.append(np.log(np.exp(logits).sum()) - logits[token])
        step = model.extend([token])
    return float(np.exp(np.mean(losses)))


def test_q8_0_moves_the_perplexity_of_a_learned_text_by_less_than_a_percent(tmp_path: Path, tokenizer: Path) -> None:
    ids = [2, *checkpoint_tokenizer(tokenizer)("\n".join(CORPUS[:5]))][:128]
    module = random_opt(dataclasses.replace(DIMS, ffn_width=128))
    batch, optimizer = torch.tensor([ids]), torch.optim.AdamW(module.parameters(), lr=2e-3)
    for _ in range(20):
        loss = module(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = {}
    for quant in ("f32", "q8_0"):
        lm = causal(dataclasses.replace(DIMS, ffn_width=128), module.state_dict(), tokenizer)
        entry = export_language_model(lm, tmp_path / f"{quant}.gguf", quant)
        model = LlamaLanguageModel(tmp_path, entry, F32)
        found[quant] = perplexity(model, ids)
        model.close()
    with torch.no_grad():
        expected = float(module.eval()(batch, labels=batch).loss.exp())
    assert 1.2 < expected < 50
    assert found["f32"] == pytest.approx(expected, rel=1e-3)
    assert found["q8_0"] == pytest.approx(found["f32"], rel=0.01)
