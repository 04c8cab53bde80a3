"""Masking of dialogues, by hand-computed expectations."""

import torch

from mllm_edge.models.llava import IMAGE_INDEX, PROMPTS
from mllm_edge.recipes.conversation import IGNORE, Sample, Vocabulary, encode_dialogue, next_token_loss, pad

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


def test_loss_predicts_the_next_token() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = 50.0  # position 0 is sure of token 2, which stands at position 1
    labels = torch.tensor([[IGNORE, 2, IGNORE]])
    assert next_token_loss(logits, labels).item() < 1e-6
    assert next_token_loss(logits, torch.tensor([[IGNORE, 3, IGNORE]])).item() > 40
