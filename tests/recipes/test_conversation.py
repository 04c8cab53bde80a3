"""Masking of dialogues, by hand-computed expectations."""

from typing import Any

import pytest
import torch

from mllm_edge.models.language.llama import LlamaDims, llama
from mllm_edge.models.llava.model import CONFIGS, IMAGE_INDEX
from mllm_edge.models.llava.prompts import PROMPTS
from mllm_edge.recipes.data.conversation import (
    IGNORE,
    Sample,
    Vocabulary,
    answer_loss,
    encode_brief,
    encode_dialogue,
    labelled,
    pad,
    share_prefix,
    visibility,
)
from mllm_edge.recipes.modules import add_lora
from mllm_edge.recipes.recipe import LoraSettings
from mllm_edge.recipes.tasks.language import LanguageModel

WORDS: dict[str, int] = {}


def words(text: str) -> list[int]:
    """A toy tokenizer: an id per space-separated word, from 10 on."""
    return [WORDS.setdefault(word, 10 + len(WORDS)) for word in text.split()]


VOCABULARY = Vocabulary(words, {"</s>": 2}, bos=1, pad=0)


def test_only_the_answers_are_learned() -> None:
    prompt = PROMPTS["vicuna_v1_no_system"]
    sample = encode_dialogue(prompt, [("<image>\nWhat color?", "dark red"), ("How many?", "2")], VOCABULARY, 3, 100)
    image = [IMAGE_INDEX] * 3
    first = [*words("What color? ASSISTANT:")]
    second = [*words("USER: How many? ASSISTANT:")]
    assert sample.ids == [1, *words("USER:"), *image, *first, *words("dark red"), 2, *second, *words("2"), 2]
    learned = [token for token in sample.labels if token != IGNORE]
    assert learned == [*words("dark red"), 2, *words("2"), 2]
    assert all(label in (IGNORE, token) for token, label in zip(sample.ids, sample.labels, strict=True))


def test_plain_template_learns_everything_after_the_picture() -> None:
    sample = encode_dialogue(PROMPTS["plain"], [("<image>", "a red circle")], VOCABULARY, 2, 100)
    assert sample.ids == [1, IMAGE_INDEX, IMAGE_INDEX, *words("a red circle")]
    assert sample.labels == [IGNORE] * 3 + words("a red circle")


def test_a_merge_across_the_border_masks_the_whole_sample() -> None:
    glued = Vocabulary(lambda text: [len(text)], {}, bos=None, pad=0)
    sample = encode_dialogue(PROMPTS["vicuna_v1_no_system"], [("Hi", "there")], glued, 1, 100)
    assert set(sample.labels) == {IGNORE}


def test_padding_is_outside_loss_and_mask() -> None:
    batch = pad([Sample([5, 6, 7], [IGNORE, 6, 7]), Sample([8], [8])], pad_id=0)
    assert batch["mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7], [8, IGNORE, IGNORE]]


SINGLES = [
    Sample([1, 5, 6, 7, 8, 9, 2], [IGNORE] * 5 + [9, 2]),
    Sample([1, 5, 6, 10, 11, 12, 13, 2], [IGNORE] * 5 + [12, 13, 2]),
    Sample([1, 5, 6, 7, 20, 2], [IGNORE] * 5 + [2]),
]


def test_a_shared_prefix_stands_once() -> None:
    joined = share_prefix(SINGLES)
    assert joined.ids == [1, 5, 6, 7, 8, 9, 2, 10, 11, 12, 13, 2, 7, 20, 2]
    assert joined.branches == [0] * 3 + [1] * 4 + [2] * 5 + [3] * 3
    batch = pad([joined, SINGLES[0]], pad_id=0)
    assert batch["positions"][0].tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 7, 3, 4, 5]
    assert batch["positions"][1].tolist() == [0, 1, 2, 3, 4, 5, 6] + [0] * 8
    seen = visibility(batch["mask"], batch["branches"])[0, 0] == 0
    assert seen[9].nonzero().flatten().tolist() == [0, 1, 2, 7, 8, 9]  # the trunk, then its own branch so far


def test_one_sample_alone_keeps_a_question_token_in_its_branch() -> None:
    assert share_prefix(SINGLES[:1]).branches == [0] * 4 + [1] * 3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_shared_prefix_teaches_what_its_samples_teach(attention: str) -> None:
    torch.manual_seed(0)
    decoder: Any = llama(CONFIGS["tiny"].language).eval()
    decoder.set_attn_implementation(attention)

    @torch.no_grad()
    def predicted(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = pad(samples, pad_id=0)
        seen = visibility(batch["mask"], batch.get("branches"))
        output = decoder(input_ids=batch["ids"], attention_mask=seen, position_ids=batch.get("positions"))
        return labelled(output.logits, batch["labels"])

    logits, truths = predicted([share_prefix(SINGLES), SINGLES[1]])
    alone = [predicted([sample]) for sample in [*SINGLES, SINGLES[1]]]
    torch.testing.assert_close(logits, torch.cat([values for values, _ in alone]), atol=1e-5, rtol=0)
    assert truths.tolist() == [9, 2, 12, 13, 2, 2, 12, 13, 2]


def test_brief_samples_learn_the_rest_and_the_end() -> None:
    sample = encode_brief([1, IMAGE_INDEX], "ring", "dark red", VOCABULARY)
    assert sample.ids == [1, IMAGE_INDEX, *words("ring dark red"), 2]
    assert sample.labels == [IGNORE] * 3 + [*words("dark red"), 2]


def test_bags_are_stacked_in_the_order_of_their_places() -> None:
    one = Sample([1, IMAGE_INDEX, IMAGE_INDEX, 5], [IGNORE] * 3 + [5], bags=[[7, 8], []])
    two = Sample([1, IMAGE_INDEX, 6], [IGNORE] * 2 + [6], bags=[[9]])
    assert pad([one, two], 0)["bags"].tolist() == [[7, 8], [-1, -1], [9, -1]]
    assert "bags" not in pad([Sample([1, 5], [IGNORE, 5])], 0)


def test_a_bag_stands_for_the_sum_of_its_words() -> None:
    torch.manual_seed(0)
    model = LanguageModel(llama(CONFIGS["tiny"].language))
    table = model.language_model.get_input_embeddings().weight
    ids = torch.tensor([[1, IMAGE_INDEX, IMAGE_INDEX, 5], [1, IMAGE_INDEX, 6, 0]])
    embeds = model.embed(ids, torch.tensor([[7, 8], [-1, -1], [9, -1]]))
    torch.testing.assert_close(embeds[0, 1], table[7] + table[8])
    torch.testing.assert_close(embeds[0, 2], torch.zeros_like(table[0]))
    torch.testing.assert_close(embeds[1, 1], table[9])
    torch.testing.assert_close(embeds[:, 0], table[[1, 1]])
    torch.testing.assert_close(embeds[0, 3], table[5])


def test_the_loss_is_transformers_own() -> None:
    torch.manual_seed(0)
    decoder: Any = llama(LlamaDims(vocabulary=50, width=32, ffn_width=48, layers=2, heads=4, kv_heads=2, context=64))
    ids = torch.randint(0, 50, (2, 9))
    labels = torch.where(torch.rand(2, 9) < 0.5, ids, IGNORE)
    mask = torch.ones(2, 9, dtype=torch.int64)
    expected = decoder(input_ids=ids, attention_mask=mask, labels=labels)
    found = answer_loss(decoder, decoder.get_input_embeddings()(ids), mask, None, labels)
    torch.testing.assert_close(found["loss"], expected.loss)
    guessed = expected.logits[:, :-1].argmax(-1)
    seen = labels[:, 1:] != IGNORE
    assert found["token_accuracy"] == (guessed == labels[:, 1:])[seen].float().mean()
    adapted = add_lora(decoder, LoraSettings(r=2, alpha=4, dropout=0.0))
    again = answer_loss(adapted, decoder.get_input_embeddings()(ids), mask, None, labels)
    torch.testing.assert_close(again["loss"], expected.loss)  # an adapter begins as nothing
