"""The small tokenizer of captions in CLIP's layout: lower case, byte pairs that end words with `</w>`, rows of one
length between a start token and end tokens."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge.errors import BadInput, first_line

TOKENIZER = "tokenizer.json"
START, END, LAST = "<|startoftext|>", "<|endoftext|>", "</w>"
# Words of an instruction that no caption has are spelled.
_LETTERS = string.ascii_lowercase + string.digits + string.punctuation


def train_caption_tokenizer(path: Path, size: int, length: int, texts: Iterable[str]) -> None:
    """Write a `tokenizer.json` of at most `size` tokens learned from texts; it makes rows of `length` ids."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    splitter = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]"), "removed", invert=True)
    words = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    tokens, merges = byte_pairs(words, size)
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=END, end_of_word_suffix=LAST))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.add_special_tokens([START, END])
    ends = [(token, ids[token]) for token in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=ids[END], pad_token=END, length=length)
    tokenizer.save(str(path))


def byte_pairs(words: Mapping[str, int], size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens, at most `size`, and merges, both in order, of words and their counts (Sennrich et al. 2016).

    Of pairs that are as frequent the first in the alphabet is merged: the trainer of `tokenizers` takes one or another
    from run to run, and a run that starts anew must get the same ids.
    """
    letters = sorted({*_LETTERS, *"".join(words)})
    tokens = [START, END, *letters, *(letter + LAST for letter in letters)]
    return learned_pairs(tokens, {word: [*word[:-1], word[-1] + LAST] for word in words}, words, size)


def learned_pairs(
    tokens: list[str], spelled: dict[str, list[str]], counts: Mapping[str, int], size: int
) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens, at most `size`, begun with those given, and merges of words that are `spelled` in pieces."""
    merges: list[tuple[str, str]] = []
    while len(tokens) < size:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in spelled.items():
            for pair in pairwise(pieces):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        tokens += [] if "".join(best) in tokens else ["".join(best)]
        spelled = {word: _merged(pieces, best) for word, pieces in spelled.items()}
    return tokens, merges


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    done: list[str] = []
    for piece in pieces:
        if done and (done[-1], piece) == pair:
            done[-1] += piece
        else:
            done.append(piece)
    return done


def read_caption_tokenizer(path: Path) -> Any:
    """The tokenizer of a file. Raises BadInput where there is none, or it is damaged."""
    from tokenizers import Tokenizer

    if not path.is_file():
        raise BadInput(f"{path} is missing; train diffusion-pretrain first")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise BadInput(f"{path} is damaged ({first_line(error)}); train that part again") from None


def caption_ids(tokenizer: Any, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Ids of texts, as the tokenizer's file says: int64 [n,length]."""
    return np.array([encoding.ids for encoding in tokenizer.encode_batch(list(texts))], np.int64)
