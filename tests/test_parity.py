"""A LLaVA of transformers, exported by path from two layouts, against transformers itself: logits and 64 tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from checkpoints_to_test import IMAGE, port, write_original
from PIL import Image
from tokenizers_to_test import llama_sentencepiece

import mllm_edge
from mllm_edge.bundle.read import read_manifest
from mllm_edge.bundle.sources import Pixels
from mllm_edge.errors import BadInput
from mllm_edge.export.verify.verify import verify_bundle
from mllm_edge.runtime.preprocess import preprocess

PROMPT = "USER: <image>\nWhat color is the circle? ASSISTANT:"
TOKENS = 64


@pytest.fixture(scope="module")
def model() -> transformers.LlavaForConditionalGeneration:
    return port()


@pytest.fixture(scope="module", params=["transformers", "original"])
def exported(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    model: transformers.LlavaForConditionalGeneration,
) -> Path:
    """The same weights in one of the two layouts, exported by path at fp32 + f32."""
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / "checkpoint"
    if request.param == "transformers":
        model.save_pretrained(source)
        (source / "preprocessor_config.json").write_text(json.dumps({"do_pad": True}))
    else:
        write_original(model, source, "bin")
    llama_sentencepiece(source)
    return mllm_edge.export("llava", str(source), precision="fp32", quant="f32", out=folder / "small.bundle")


def picture() -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_logits_and_64_greedy_tokens(exported: Path, model: transformers.LlavaForConditionalGeneration) -> None:
    manifest = read_manifest(exported)
    assert all(row.passed for row in manifest.parity)
    with mllm_edge.load(exported, kv_type="f32") as ours:
        answer = ours.generate(PROMPT, image=picture(), raw=True, max_tokens=TOKENS, stop=[])
        tokenized = [ours.tokenize(piece) for piece in PROMPT.split("<image>")]
        embeds = ours.prompt_embeds(PROMPT, picture(), raw=True)
        logits = ours.language_model.prefill(embeds).logits
    (pixels_source,) = (source for source in manifest.sources if isinstance(source, Pixels))
    ids = torch.tensor([[1, *tokenized[0], *[IMAGE] * 16, *tokenized[1]]])
    pixels = torch.from_numpy(preprocess(picture(), pixels_source))
    with torch.no_grad():
        theirs = model(input_ids=ids, pixel_values=pixels).logits[0, -1].numpy()
        generated = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            do_sample=False,
            max_new_tokens=TOKENS,
        )
    assert np.abs(theirs).max() > 1
    assert np.abs(logits - theirs).max() < 1e-3
    expected = generated[0, ids.shape[1] :].tolist()
    assert answer.tokens.ids == expected
    assert len(expected) == TOKENS or expected[-1] == 2
    assert len(set(expected)) > 8, "a run of one token would prove little"


def test_the_tokenizer_splits_as_the_reference(exported: Path) -> None:
    """llava/mm_utils.py `tokenizer_image_token`: every chunk a fresh string, so the chunk after the picture opens with
    the SentencePiece space before its newline."""
    import sentencepiece

    model_file = str(exported.parent / "checkpoint" / "tokenizer.model")
    reference = sentencepiece.SentencePieceProcessor(model_file=model_file)
    with mllm_edge.load(exported) as ours:
        for piece in PROMPT.split("<image>"):
            assert ours.tokenize(piece) == reference.encode(piece)


def test_merged_tokens_are_verified_against_the_merged_reference(
    model: transformers.LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "preprocessor_config.json").write_text(json.dumps({"do_pad": True}))
    llama_sentencepiece(tmp_path / "checkpoint")
    options = {"precision": "fp32", "quant": "f32", "merge_tokens": 7}
    folder = mllm_edge.export("llava", str(tmp_path / "checkpoint"), out=tmp_path / "merged.bundle", **options)
    parity = read_manifest(folder).parity
    assert [row.passed for row in parity] == [True] * 4
    assert [row.measured for row in verify_bundle(folder)] == [row.measured for row in parity]
    with mllm_edge.load(folder) as ours:
        answer = ours.generate(PROMPT, image=picture(), raw=True, max_tokens=2)
        (embeds,) = ours.look(picture())
        assert len(embeds) == answer.tokens.image == 7
    with pytest.raises(BadInput, match="without --mmproj or --merge-tokens"):
        mllm_edge.export("llava", str(tmp_path / "checkpoint"), merge_tokens=7, mmproj=True)
