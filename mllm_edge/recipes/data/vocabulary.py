"""Tokenizers for training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from mllm_edge.bundle.read import read_text
from mllm_edge.errors import BadInput
from mllm_edge.recipes.data.conversation import Vocabulary

TOKENIZER = "tokenizer.model"


def train_tokenizer(path: Path, size: int, texts: Iterator[str]) -> None:
    """Train a LLaMA-style SentencePiece model (BPE, byte fallback, digits split) of `size` pieces.

    Raises:
        BadInput: the texts do not yield `size` pieces.
    """
    import sentencepiece

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_prefix=str(path.with_suffix("")),
            vocab_size=size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=1.0,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise BadInput(f"cannot train a tokenizer of {size} pieces ({error}); give a smaller vocabulary") from None
    path.with_suffix(".vocab").unlink()


def sentencepiece_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a SentencePiece file. Raises BadInput when it is missing."""
    import sentencepiece

    if not path.is_file():
        raise BadInput(f"{path} is missing; run the recipe that trains the language model first")
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    eos: int = model.eos_id()
    return Vocabulary(model.encode, {model.id_to_piece(eos): eos}, model.bos_id(), pad=0)


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of the tokenizer in a folder, `tokenizer.json` or `tokenizer.model`.

    Raises:
        BadInput: there is none.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return sentencepiece_vocabulary(folder / TOKENIZER)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    config = json.loads(read_text(folder / "tokenizer_config.json"))
    bos = tokenizer.token_to_id(config["bos_token"]) if config.get("add_bos_token") else None
    # This tokenizer matches control strings itself, and padded positions are masked.
    return Vocabulary(lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids), {}, bos, pad=0)
