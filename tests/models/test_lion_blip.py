"""InstructBLIP and BLIP-2 as transformers saves them, against transformers' own answers."""

from pathlib import Path

import pytest
import torch
import transformers
from toys import letters, noise_picture

import mllm_edge
from mllm_edge.errors import BadInput
from mllm_edge.export.export import export
from mllm_edge.models.lion.layouts import load
from mllm_edge.models.lion.model import build

WORDS = {"[CLS]": 33, "[SEP]": 34}
IMAGE = 35  # the id that stands for a picture's rows in transformers
VISION = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
READS = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
READS |= {"encoder_hidden_size": 32, "vocab_size": 36, "max_position_embeddings": 64}
TEXT = {"vocab_size": 36, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2, "model_type": "t5"}
TEXT |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
CLASSES = {
    "instructblip": (transformers.InstructBlipConfig, transformers.InstructBlipForConditionalGeneration),
    "blip-2": (transformers.Blip2Config, transformers.Blip2ForConditionalGeneration),
}


def saved(kind: str, folder: Path) -> torch.nn.Module:
    configuration, model = CLASSES[kind]
    torch.manual_seed(1)
    config = configuration(
        vision_config=VISION, qformer_config=READS, text_config=TEXT, num_query_tokens=4, image_token_index=IMAGE
    )
    theirs = model(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            norm = "norm" in name.lower() and name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.2)
    theirs.save_pretrained(folder)
    letters(folder, WORDS)
    if kind == "instructblip":
        letters(folder / "qformer_tokenizer", WORDS)
    return theirs


@pytest.mark.parametrize("kind", list(CLASSES))
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs = saved(kind, tmp_path)
    held = load(tmp_path)
    ours = build(held)
    pixels, ids, heard = torch.randn(1, 3, 28, 28), torch.tensor([[5, 9, 7, 1]]), torch.tensor([[33, 8, 9, 34]])
    answer = torch.tensor([[0, 4, 11]])
    words = {"qformer_input_ids": heard, "qformer_attention_mask": torch.ones(1, 4)} if kind == "instructblip" else {}
    with torch.no_grad():
        prompt = torch.cat([torch.full((1, 4), IMAGE), ids], dim=1)
        mask = torch.ones_like(prompt)
        expected = theirs(
            pixel_values=pixels, input_ids=prompt, attention_mask=mask, decoder_input_ids=answer, **words
        ).logits
        visual = ours.look(pixels, *([heard] if words else []))
        text = ours.language_model.shared(ids)
        logits = ours(visual, text, torch.ones(1, 4), answer, torch.zeros(2))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_blip2_answers_as_in_transformers(tmp_path: Path) -> None:
    theirs = saved("blip-2", tmp_path / "checkpoint")
    bundle = export("lion", str(tmp_path / "checkpoint"), quant="fp32", out=tmp_path / "blip.bundle")
    question = "what is it?"
    with mllm_edge.load(bundle, threads=1) as model:
        answer = model.generate(question, noise_picture(0), beams=1, repeat_penalty=1.0, max_tokens=6)
        (rows,) = model.look(noise_picture(0))
    ids = torch.tensor([[2 + " abcdefghijklmnopqrstuvwxyz.,:?".index(letter) for letter in question] + [1]])
    with torch.no_grad():
        embeds = torch.cat([torch.from_numpy(rows)[None], theirs.get_input_embeddings()(ids)], dim=1)
        expected = theirs.language_model.generate(inputs_embeds=embeds, max_new_tokens=6, num_beams=1, do_sample=False)
    wanted = expected[0, 1:].tolist()
    assert answer.tokens.ids == wanted[: len(answer.tokens.ids)] and len(answer.tokens.ids) >= min(6, len(wanted))


def test_another_language_model_is_named(tmp_path: Path) -> None:
    saved("blip-2", tmp_path)
    text = (tmp_path / "config.json").read_text().replace('"model_type": "t5"', '"model_type": "opt"')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadInput, match="the language model is 'opt'; a blip-2 on Flan-T5 can be loaded"):
        load(tmp_path)
