"""Causal language models on ONNX Runtime: tokens, states and tokenizers are those of llama.cpp and of PyTorch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints_to_test import port, write_original
from tokenizers_to_test import byte_level, llama_fast, llama_sentencepiece
from toys import noise_picture

import mllm_edge
from mllm_edge.bundle.manifest import Tokenizer
from mllm_edge.bundle.read import read_manifest
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.export.export import export
from mllm_edge.export.onnx.language_model import write_tokenizer
from mllm_edge.export.verify.same_tokens import assert_same_tokens
from mllm_edge.models.language.llama import LlamaDims, LlamaReference, llama
from mllm_edge.models.language.llama_parts import DecoderPart
from mllm_edge.models.plan import LanguageModelExport


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint by both engines, and in int4."""
    place = tmp_path_factory.mktemp("engines")
    llama_sentencepiece(write_original(port(), place / "llava", "safetensors"))
    made = {"gguf": ("gguf", "f32"), "onnx": ("onnx", "fp32"), "int4": ("onnx", "int4")}
    return {
        name: export("llava", str(place / "llava"), llm=llm, quant=quant, out=place / f"{name}.bundle")
        for name, (llm, quant) in made.items()
    }


def test_what_export_measured(bundles: dict[str, Path]) -> None:
    for name, precision in (("onnx", "fp32"), ("int4", "int4")):
        manifest = read_manifest(bundles[name])
        lm = manifest.language_model
        assert (lm.kind, lm.engine, lm.precision) == ("causal", "onnx", precision)
        assert [part.name for part in lm.parts] == ["embed", "decoder"] and lm.gguf is None
        assert not list(bundles[name].glob("*.gguf"))
        rows = {row.name: row for row in manifest.parity}
        assert rows["language_model"].passed and rows["end_to_end"].passed
    assert rows["language_model"].measured["cosine"] < 0.99999  # int4 is not fp32
    assert read_manifest(bundles["onnx"]).parity[2].measured["relative_max"] < 1e-5


def test_answers_are_those_of_llama_cpp(bundles: dict[str, Path]) -> None:
    picture = noise_picture(4)
    with (
        mllm_edge.load(bundles["gguf"], threads=1, kv_type="f32") as one,
        mllm_edge.load(bundles["onnx"], threads=1) as other,
    ):
        for text in ("What is it?", "caf\u00e9 <s> \U0001f600"):
            assert one.tokenize(text) == other.tokenize(text)
        np.testing.assert_allclose(other.prompt_embeds("why?", picture), one.prompt_embeds("why?", picture), atol=1e-4)
        answers = [model.generate("What is it?", picture, max_tokens=12) for model in (one, other)]
        assert answers[0].tokens == answers[1].tokens and answers[0].text == answers[1].text
        chats = [model.chat(max_tokens=6) for model in (one, other)]
        for words, image in (("What is it?", picture), ("And now?", None)):
            said = [chat.ask(words, image) for chat in chats]
            assert said[0].tokens == said[1].tokens
        beams = other.generate("What is it?", picture, max_tokens=6, beams=3)  # which llama.cpp's engine has not
        assert beams.tokens.generated <= 6
        again = other.generate("What is it?", picture, max_tokens=12)
        assert again.tokens == answers[1].tokens


def test_a_prompt_in_pieces_and_a_cache_that_grows(bundles: dict[str, Path]) -> None:
    rng = np.random.default_rng(0)
    with mllm_edge.load(bundles["onnx"], threads=1) as model:
        lm = model.language_model
        prompt = rng.standard_normal((200, lm.width)).astype(np.float32)
        whole = lm.prefill(prompt, state=True)
        lm.prefill(prompt[:130])
        parts = lm.prefill(prompt[130:], keep=130, state=True)
        np.testing.assert_allclose(parts.logits, whole.logits, atol=1e-4)
        np.testing.assert_allclose(parts.hidden, whole.hidden, atol=1e-4)
        for _ in range(3):
            lm.extend([7])
        kept = lm.prefill(prompt[150:], keep=150)  # what stood behind the kept positions does not count any more
        np.testing.assert_allclose(kept.logits, whole.logits, atol=1e-4)
        steps = lm.extend([5, 6, 7], states=2)
        lm.prefill(prompt[150:], keep=150)
        singly = [lm.extend([token], states=1) for token in (5, 6, 7)]
        np.testing.assert_allclose(steps.logits, singly[-1].logits, atol=1e-4)
        np.testing.assert_allclose(steps.hidden, np.concatenate([one.hidden for one in singly[1:]]), atol=1e-4)
        for wrong in (prompt[:0], prompt[:, :3], np.zeros((257, lm.width), np.float32)):
            with pytest.raises(MllmEdgeError, match="takes embeddings"):
                lm.prefill(wrong)
        lm.prefill(np.zeros((256, lm.width), np.float32))
        with pytest.raises(MllmEdgeError, match="fill the context of 256"):
            lm.extend([1])
        with pytest.raises(MllmEdgeError, match="token ids must be below"):
            lm.extend([448])
        lm.prefill(prompt[:9])
        both = lm.branch([5, 6], [0, 0])
        swapped = lm.branch([7, 8], [1, 0])
        with pytest.raises(MllmEdgeError, match="several sequences are held"):
            lm.extend([1])
        for tokens, first, then in (([5, 8], both[0], swapped[1]), ([6, 7], both[1], swapped[0])):
            lm.prefill(prompt[:9])
            for token, expected in zip(tokens, (first, then), strict=True):
                np.testing.assert_allclose(lm.extend([token]).logits, expected, atol=1e-4)


GROUPED = {"vocabulary": 60, "width": 32, "ffn_width": 48, "layers": 2, "heads": 4, "kv_heads": 2, "context": 64}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"kv_heads": 4, "attention_bias": True, "mlp_bias": True},
        {"head_width": 24, "tied": True},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ],
    ids=["grouped", "biases", "tied", "linear", "llama3"],
)
def test_every_form_of_llama(more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    dims = LlamaDims(**{**GROUPED, **more})
    model = llama(dims).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    prompt, tokens = np.random.default_rng(0).standard_normal((20, 32)).astype(np.float32), [3, 4]
    logits, states = LlamaReference(model).forced(prompt, tokens)
    part, embeds = DecoderPart(model, dims), np.concatenate([prompt, LlamaReference(model).embed(tokens)])
    past = [torch.full((1, dims.kv_heads, 32, dims.head_dim), 9.0) for _ in range(2 * dims.layers)]
    with torch.no_grad():
        for first, last in ((0, 13), (13, 20), (20, 21), (21, 22)):
            found = part(torch.from_numpy(embeds[None, first:last]), torch.tensor([first]), *past)
            for cache, new in zip(past, found[2:], strict=True):
                cache[:, :, first:last] = new
            if last >= 20:
                np.testing.assert_allclose(found[0][0], logits[last - 20], rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(found[1][0, -1], states[last - 20], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [llama_sentencepiece, lambda folder: llama_fast(folder, True), "gpt-2", "llama-bpe"])
def test_tokenizers_are_the_checkpoints(make: object, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    folder = byte_level(folder, make) if isinstance(make, str) else make(folder)  # type: ignore[operator]
    dims = LlamaDims(4096, 32, 32, 1, 2, 2, 64)
    lm = LanguageModelExport(dims, folder, lambda: None)  # type: ignore[arg-type,return-value]
    entry = write_tokenizer(
        lm, tmp_path / "tokenizer.json", Tokenizer("language_model", "gguf", "x.gguf", added=["<a>"])
    )
    assert (entry.kind, entry.file, entry.added) == ("json", "tokenizer.json", ["<a>"])
    assert_same_tokens(tmp_path / "tokenizer.json", folder)


def test_options_that_do_not_go_together(bundles: dict[str, Path], tmp_path: Path) -> None:
    for options, part in (
        ({"llm": "onnx", "quant": "q4_k_m"}, "q4_k_m is for --llm gguf; for onnx there are fp32, fp16, int8, int4"),
        ({"quant": "int4"}, "int4 is for --llm onnx"),
        ({"llm": "vllm"}, "vllm"),
    ):
        with pytest.raises(BadInput, match=part):
            export("llava", out=tmp_path / "x.bundle", **options)
    for loading, part in (({"kv_type": "q8_0"}, "leave out --kv-type"), ({"gpu_layers": 3}, "leave out --gpu-layers")):
        with pytest.raises(BadInput, match=part):
            mllm_edge.load(bundles["onnx"], **loading)
    document = json.loads((bundles["onnx"] / "bundle.json").read_text())
    document["language_model"]["parts"][1]["inputs"][1]["name"] = "size"
    (bundles["onnx"] / "bundle.json").write_text(json.dumps(document))
    with pytest.raises(BadInput, match="lacks length"):
        mllm_edge.load(bundles["onnx"], verify_hash=False)
