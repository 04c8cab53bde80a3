"""GILL's words: a byte-level tokenizer as OPT's, and what each mode of its training reads and predicts."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mllm_edge.checkpoints.tokenizer_files import LISTS, extend
from mllm_edge.errors import BadInput
from mllm_edge.models.gill.model import CLASS_TOKEN, TOKENS
from mllm_edge.models.gill.original import ROLES
from mllm_edge.recipes.data.caption_tokens import learned_pairs
from mllm_edge.recipes.data.conversation import IGNORE

FIRST = ("<s>", "<pad>", "</s>", "<unk>")  # OPT's
PAD, BOS = FIRST.index("<pad>"), FIRST.index("</s>")
ROW = -1  # stands in ids for a row of a picture
ADDED = 1 + len(TOKENS)  # tokens behind those that are learned

Labelled = tuple[list[int], list[int]]  # ids, and what is predicted of them: -100 where nothing is


def train_tokenizer(folder: Path, size: int, texts: Iterable[str]) -> None:
    """Learn OPT's kind of tokenizer, whose last of `size` tokens are `<|image|>` and the picture tokens.

    Raises:
        BadInput: the texts have too few words for so many tokens.
    """
    from tokenizers import pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = Counter(word for text in texts for word, _ in level.pre_tokenize_str(text))
    known = [*FIRST, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens, merges = learned_pairs(known, {word: list(word) for word in words}, words, size - ADDED)
    if len(tokens) != size - ADDED:
        raise BadInput(f"the texts yield {len(tokens)} tokens, not {size - ADDED}; give a smaller vocabulary")
    with tempfile.TemporaryDirectory(prefix="mllm-edge-tokenizer-") as place:
        vocabulary, listed = (Path(place) / name for name in LISTS)
        vocabulary.write_text(json.dumps({token: number for number, token in enumerate(tokens)}), encoding="utf-8")
        listed.write_text("".join(f"{left} {right}\n" for left, right in merges), encoding="utf-8")
        (Path(place) / "tokenizer_config.json").write_text(json.dumps(ROLES), encoding="utf-8")
        extend(Path(place), folder, [CLASS_TOKEN], TOKENS, ROLES)


class Words:
    """Text to ids and back, by the tokenizer of a folder; `start` is the first picture token's id.

    Raises:
        BadInput: there is no such tokenizer.
    """

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        if not file.is_file():
            raise BadInput(f"{file} is missing; train gill-language first")
        self.tokenizer = Tokenizer.from_file(str(file))
        self.start: int = self.tokenizer.token_to_id(TOKENS[0]) or 0
        if not self.start:
            raise BadInput(f"{file} has no token {TOKENS[0]}; give the tokenizer that gill-language trained")

    def ids(self, text: str) -> list[int]:
        """Without BOS."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, ids: Sequence[int]) -> str:
        """Up to the line's end, `</s>` or a picture token, without the space before the first word."""
        kept: list[int] = []
        for number in ids:
            if number == BOS or number >= self.start:
                break
            kept.append(number)
        text: str = self.tokenizer.decode(kept)
        return text.split("\n")[0].strip()


def shortened(caption: Sequence[int], length: int) -> list[int]:
    """A caption's ids, without BOS, that fit with it and the picture tokens in `length`: of a longer sequence the
    original overwrites the end with these."""
    return list(caption[: length - 1 - len(TOKENS)])


def neighbors(captions: Sequence[list[int]], joined: bool) -> list[tuple[list[int], ...]]:
    """Captions by themselves, or 2i and 2i + 1 together. Raises BadInput where one has no neighbor."""
    if joined and len(captions) % 2:
        raise BadInput(
            f"{len(captions)} samples at once are no pairs; give each process and accumulation an even number"
        )
    size = 2 if joined else 1
    return [tuple(captions[first : first + size]) for first in range(0, len(captions), size)]


def captioning(captions: Sequence[list[int]], rows: int) -> Labelled:
    """Pictures and their captions, [rows][BOS c1], of a pair also [rows][c2]: BOS and all captions are predicted.

    In the original the picture tokens and the padding of all stand at the end, which nothing before them sees and
    which have no labels, so they are left out.
    """
    ids: list[int] = []
    for number, caption in enumerate(captions):
        ids += [ROW] * rows + [BOS] * (number == 0) + caption
    return ids, [IGNORE if number == ROW else number for number in ids]


def telling(captions: Sequence[list[int]], start: int) -> Labelled:
    """Captions and the picture tokens from `start` on, [BOS c1 IMG], of a pair also [c2 IMG]: the first caption and
    [IMG0] are predicted, and of a second, as in the original, nothing."""
    group = list(range(start, start + len(TOKENS)))
    ids = [BOS] + [number for caption in captions for number in (*caption, *group)]
    said = 1 + len(captions[0]) + 1
    return ids, ids[:said] + [IGNORE] * (len(ids) - said)


def stacked(samples: Iterable[Labelled]) -> tuple[Tensor, Tensor]:
    """Ids and labels padded behind, which causal attention does not see: int64 [n,longest] each."""
    ids, labels = zip(*samples)
    longest = max(map(len, ids))
    return (
        torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in ids]),
        torch.tensor([[*row, *[IGNORE] * (longest - len(row))] for row in labels]),
    )
