import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import CONTEXT, HEADS, PIECES, WIDTH, llama_tensors, write_llama

from mllm_edge.bundle.manifest import EmbeddingTable, GgufDetails, LanguageModelEntry
from mllm_edge.bundle.read import file_entry, read_manifest
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.runtime.engines.interface import Options
from mllm_edge.runtime.engines.llama import probe
from mllm_edge.runtime.engines.llama.embedding import EmbeddingRows
from mllm_edge.runtime.engines.llama.model import OUTPUTS, LlamaLanguageModel

CPU = Options("cpu", False, 1, "f32", CONTEXT)
IDS = [1, *range(259, 259 + 30)]


@pytest.fixture(scope="module")
def entry(tiny_bundle: Path) -> LanguageModelEntry:
    return read_manifest(tiny_bundle).language_model


@pytest.fixture
def model(tiny_bundle: Path, entry: LanguageModelEntry) -> Iterator[LlamaLanguageModel]:
    language_model = LlamaLanguageModel(tiny_bundle, entry, CPU)
    yield language_model
    language_model.close()


def reference_logits(ids: list[int]) -> np.ndarray:
    """A LLaMA in numpy, float64: logits [T,V]. GGUF's rotary embedding turns neighbouring channels."""
    weights = {name: tensor.astype(np.float64) for name, tensor in llama_tensors().items()}
    heads, x = HEADS, weights["token_embd.weight"][ids]
    size = WIDTH // heads
    angles = np.arange(len(ids))[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)

    def norm(v: np.ndarray) -> np.ndarray:
        return v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-5)

    def rotate(v: np.ndarray) -> np.ndarray:
        pairs = v.reshape(len(ids), heads, size // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, None]
        return np.stack([turned.real, turned.imag], -1).reshape(len(ids), heads, size)

    for n in range(2):
        part = {
            name: weights[f"blk.{n}.{name}.weight"].T
            for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        }
        h = norm(x)
        q, k = rotate(h @ part["attn_q"]), rotate(h @ part["attn_k"])
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size)
        scores[:, ~np.tri(len(ids), dtype=bool)] = -np.inf
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", attention, (h @ part["attn_v"]).reshape(len(ids), heads, size))
        x = x + mixed.reshape(len(ids), WIDTH) @ part["attn_output"]
        h = norm(x)
        gate = h @ part["ffn_gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ part["ffn_up"])) @ part["ffn_down"]
    return norm(x) @ weights["output.weight"].T


def test_embeddings_in_equal_tokens_in_and_the_reference(model: LlamaLanguageModel) -> None:
    by_embeddings = model.prefill(model.embed(IDS)).logits
    model.prefill(model.embed(IDS[:1]))
    for token in IDS[1:]:
        by_tokens = model.extend([token]).logits
    np.testing.assert_allclose(by_embeddings, by_tokens, atol=1e-4)
    np.testing.assert_allclose(by_embeddings, reference_logits(IDS)[-1], atol=1e-4)


def test_hidden_state_times_head_gives_the_logits(model: LlamaLanguageModel) -> None:
    head = llama_tensors()["output.weight"]
    plain = model.prefill(model.embed(IDS))
    assert plain.hidden.shape == model.extend([270]).hidden.shape == (0, WIDTH)
    whole, first = (model.prefill(model.embed(ids), state=True) for ids in (IDS, IDS[:1]))
    for step in (whole, first, model.extend([270], states=1)):
        assert step.hidden.shape == (1, WIDTH)
        np.testing.assert_allclose(head @ step.hidden[0], step.logits, atol=1e-4)
    np.testing.assert_allclose(model.prefill(model.embed(IDS)).logits, plain.logits, atol=1e-4)


def test_a_group_in_one_batch_gives_what_its_tokens_give_one_by_one(model: LlamaLanguageModel) -> None:
    group = [261, 300, 7, 280, 260, 280, 301, 9]
    model.prefill(model.embed(IDS))
    single = [model.extend([token], states=1) for token in group]
    model.prefill(model.embed(IDS))
    together = model.extend(group, states=8)
    assert together.hidden.shape == (8, WIDTH)
    np.testing.assert_allclose(together.hidden, np.concatenate([step.hidden for step in single]), atol=1e-4)
    np.testing.assert_allclose(together.logits, single[-1].logits, atol=1e-4)
    model.prefill(model.embed(IDS))
    last = model.extend(group, states=3)
    np.testing.assert_allclose(last.hidden, together.hidden[-3:], atol=1e-4)


@pytest.mark.parametrize("states", [0, 2, 10, OUTPUTS + 6])
def test_more_tokens_than_a_batch_gives_outputs_for(model: LlamaLanguageModel, states: int) -> None:
    ids = [259 + 7 * number % 30 for number in range(OUTPUTS + 6)]
    model.prefill(model.embed(IDS))
    single = [model.extend([token], states=1) for token in ids]
    model.prefill(model.embed(IDS))
    together = model.extend(ids, states=states)
    wanted = np.concatenate([step.hidden for step in single])[len(ids) - states :]
    assert together.hidden.shape == (states, WIDTH)
    np.testing.assert_allclose(together.hidden, wanted, atol=1e-4)
    np.testing.assert_allclose(together.logits, single[-1].logits, atol=1e-4)


def test_rewinding_keeps_a_prefix(model: LlamaLanguageModel) -> None:
    expected = reference_logits([*IDS[:10], 300, 301])[-1]
    model.prefill(model.embed(IDS))
    np.testing.assert_allclose(model.prefill(model.embed([300, 301]), keep=10).logits, expected, atol=1e-3)
    np.testing.assert_allclose(model.prefill(model.embed([301]), keep=11).logits, expected, atol=1e-3)
    np.testing.assert_allclose(model.prefill(model.embed([302]), keep=0).logits, reference_logits([302])[-1], atol=1e-3)


@pytest.mark.alone
def test_ctrl_c_stops_a_prefill(model: LlamaLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_cpp.llama_cpp as llama

    decode, statuses = llama.llama_decode, []

    def pressed(context: int, batch: llama.llama_batch) -> int:
        signal.raise_signal(signal.SIGINT)
        statuses.append(decode(context, batch))
        return statuses[-1]

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores the signal
    try:
        with monkeypatch.context() as patch:
            patch.setattr(llama, "llama_decode", pressed)
            with pytest.raises(KeyboardInterrupt):
                model.prefill(model.embed(IDS))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert statuses == [2]  # aborted, not finished
    np.testing.assert_allclose(model.prefill(model.embed(IDS)).logits, reference_logits(IDS)[-1], atol=1e-4)


def test_another_thread_can_prefill(model: LlamaLanguageModel) -> None:
    with ThreadPoolExecutor(1) as pool:
        logits = pool.submit(model.prefill, model.embed(IDS)).result().logits
    np.testing.assert_allclose(logits, reference_logits(IDS)[-1], atol=1e-4)


def test_steps_are_copies(model: LlamaLanguageModel) -> None:
    first = model.prefill(model.embed(IDS)).logits
    kept = first.copy()
    model.extend([280])
    np.testing.assert_array_equal(first, kept)


def test_limits_are_errors_not_crashes(model: LlamaLanguageModel) -> None:
    rows = model.embed([5] * (CONTEXT + 1))
    with pytest.raises(MllmEdgeError, match=f"{CONTEXT + 1} positions do not fit"):
        model.prefill(rows)
    with pytest.raises(MllmEdgeError, match="cannot keep 3"):
        model.prefill(rows[:1], keep=3)
    for wrong in (rows[:0], rows[:2, :8], rows[0]):
        with pytest.raises(MllmEdgeError, match="embeddings"):
            model.prefill(wrong)
    model.prefill(rows[:CONTEXT])
    with pytest.raises(MllmEdgeError, match="do not fit"):
        model.extend([5])
    for token in (-1, len(PIECES)):
        with pytest.raises(MllmEdgeError, match="token ids"):
            model.extend([token])
        with pytest.raises(MllmEdgeError, match="token ids"):
            model.embed([token])


@pytest.mark.parametrize(("kv_type", "tolerance"), [("f32", 1e-4), ("f16", 0.05), ("q8_0", 0.5)])
def test_kv_cache_types(tiny_bundle: Path, entry: LanguageModelEntry, kv_type: str, tolerance: float) -> None:
    model = LlamaLanguageModel(tiny_bundle, entry, replace(CPU, kv_type=kv_type))
    model.prefill(model.embed(IDS[:-1]))
    np.testing.assert_allclose(model.extend([IDS[-1]]).logits, reference_logits(IDS)[-1], atol=tolerance)
    model.close()


def test_unknown_kv_type(tiny_bundle: Path, entry: LanguageModelEntry) -> None:
    with pytest.raises(BadInput, match="q8_0"):
        LlamaLanguageModel(tiny_bundle, entry, replace(CPU, kv_type="q4_0"))


@pytest.mark.parametrize("dtype", ["F32", "F16", "Q8_0"])
def test_single_embedding_rows(tmp_path: Path, dtype: str) -> None:
    table = write_llama(tmp_path / "m.gguf", dtype)
    kind = gguf.GGMLQuantizationType[dtype]
    whole = gguf.quants.dequantize(gguf.quants.quantize(llama_tensors()["token_embd.weight"], kind), kind)
    rows = EmbeddingRows(tmp_path / "m.gguf", table)
    picked = rows[[3, 0, len(PIECES) - 1, 3]]
    assert picked.dtype == np.float32
    np.testing.assert_array_equal(picked, whole[[3, 0, len(PIECES) - 1, 3]])
    assert rows[[]].shape == (0, WIDTH)


def test_a_table_that_cannot_be_there(tmp_path: Path) -> None:
    table = write_llama(tmp_path / "m.gguf")
    for wrong in (replace(table, dtype="Q4_K"), replace(table, offset=10**9), replace(table, offset=-4)):
        with pytest.raises(BadInput, match=r"m\.gguf"):
            EmbeddingRows(tmp_path / "m.gguf", wrong)


def test_a_closed_model_says_so(model: LlamaLanguageModel) -> None:
    model.close()
    model.close()
    for call in (lambda: model.extend([1]), lambda: model.prefill(np.zeros((1, WIDTH)))):
        with pytest.raises(MllmEdgeError, match="closed"):
            call()


def test_a_file_that_is_no_model(tmp_path: Path, entry: LanguageModelEntry) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(1 << 20))
    table = EmbeddingTable("F32", 0, [len(PIECES), WIDTH])
    bad = GgufDetails(**vars(file_entry(tmp_path, "bad.gguf")), layers=1, kv_width=WIDTH, embedding=table)
    with pytest.raises(BadInput, match=r"bad\.gguf"):
        LlamaLanguageModel(tmp_path, replace(entry, gguf=bad), CPU)


def test_a_model_that_is_not_the_manifests(tiny_bundle: Path, entry: LanguageModelEntry) -> None:
    assert entry.gguf is not None
    details = replace(entry.gguf, embedding=replace(entry.gguf.embedding, shape=[100, WIDTH]))
    with pytest.raises(BadInput, match="manifest says 100"):
        LlamaLanguageModel(tiny_bundle, replace(entry, vocabulary=100, gguf=details), CPU)


def test_gpu_is_announced_or_refused(
    tiny_bundle: Path, entry: LanguageModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_cpp.llama_cpp.llama_supports_gpu_offload", lambda: False)
    with pytest.warns(RuntimeWarning, match="GGML_CUDA"):
        LlamaLanguageModel(tiny_bundle, entry, replace(CPU, target="cuda")).close()
    with pytest.raises(MllmEdgeError, match="GGML_CUDA"):
        LlamaLanguageModel(tiny_bundle, entry, replace(CPU, target="cuda", strict=True))


def test_after_an_amx_crash_weights_are_not_repacked(
    tiny_bundle: Path, entry: LanguageModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llama_cpp.llama_cpp as llama

    asked, seen, load = [], [], llama.llama_model_load_from_file
    monkeypatch.setattr(probe, "use_extra_buffers", lambda path, precision: asked.append(precision) or False)

    def spy(path: bytes, settings: llama.llama_model_params) -> object:
        seen.append(settings.use_extra_bufts)
        return load(path, settings)

    monkeypatch.setattr(llama, "llama_model_load_from_file", spy)
    LlamaLanguageModel(tiny_bundle, replace(entry, precision="q8_0"), CPU).close()
    assert (asked, seen) == (["q8_0"], [False])


def test_threads_are_passed_on(tiny_bundle: Path, entry: LanguageModelEntry) -> None:
    import llama_cpp.llama_cpp as llama

    model = LlamaLanguageModel(tiny_bundle, entry, replace(CPU, threads=3))
    assert (llama.llama_n_threads(model._context), llama.llama_n_threads_batch(model._context)) == (3, 3)
    model.close()


CHILD = """
import os, sys
import mllm_edge
model = mllm_edge.load(sys.argv[1], threads=1)
model.generate("the red", max_tokens=2)
print(os.environ["OMP_WAIT_POLICY"])
"""


@pytest.mark.parametrize("policy", [None, "active"])
def test_a_process_ends_quietly_without_close(tiny_bundle: Path, policy: str | None) -> None:
    import os

    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": policy} if policy else {}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tiny_bundle)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == (policy or "passive")
