"""Dialogues of several turns have the tokens that the original's whole string has."""

from pathlib import Path
from typing import ClassVar

import pytest
import sentencepiece
from tokenizers_to_test import llama_sentencepiece

from mllm_edge.models.llava.prompts import PROMPTS
from mllm_edge.runtime.prompt import answer_parts, ids_of, render, tokenized


class Vocabulary:
    """LLaMA's slow tokenizer: each string gets a leading space."""

    control_tokens: ClassVar = {"<s>": 1, "</s>": 2}
    user_defined: ClassVar = {}

    def __init__(self, folder: Path):
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))

    def tokenize(self, text: str) -> list[int]:
        return list(self._model.encode(text))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llava_llama_2", ["[INST] <<SYS>>\nS\n<</SYS>>\n\nWhat? [/INST] The fox ", 2, 1, "[INST] Why? [/INST]"]),
        ("llava_v0", ["S###Human: What?###Assistant: The fox###Human: Why?###Assistant:"]),
        ("vicuna_v1", ["S USER: What? ASSISTANT: The fox", 2, "USER: Why? ASSISTANT:"]),
    ],
)
def test_a_second_turn_has_the_originals_tokens(tmp_path: Path, name: str, expected: list[str | int]) -> None:
    vocabulary, prompt = Vocabulary(llama_sentencepiece(tmp_path)), PROMPTS[name]
    before, after = answer_parts(prompt)
    opening = render(prompt, "What?", {}, fields={"system": "S"})
    (first,) = tokenized(opening, vocabulary)
    (following,) = tokenized(render(prompt, "Why?", {}, first=False), vocabulary)
    assert isinstance(first, list)
    assert isinstance(following, list)
    words = vocabulary.tokenize("x" + before + "The fox")[len(vocabulary.tokenize("x")) :]  # as a model writes them
    measured = [*first, *words, *ids_of(after, vocabulary), *following]
    wanted = [token for part in expected for token in ([part] if isinstance(part, int) else vocabulary.tokenize(part))]
    assert measured == wanted
