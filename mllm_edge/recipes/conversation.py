"""Dialogues as token ids and labels, with LLaVA's masking: the loss sees the assistant's words and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mllm_edge.bundle import Prompt
from mllm_edge.models.llava import IMAGE_INDEX

IGNORE = -100


@dataclass(frozen=True)
class Vocabulary:
    """How text becomes ids: `encode` takes a piece of plain text as a fresh string (no BOS); `specials` maps control
    strings such as `</s>` to ids."""

    encode: Callable[[str], list[int]]
    specials: dict[str, int]
    bos: int | None
    pad: int

    def ids(self, text: str) -> list[int]:
        """Ids of `text`, in which control strings stand for their ids."""
        if not self.specials:
            return self.encode(text)
        parts = re.split("(" + "|".join(map(re.escape, self.specials)) + ")", text)
        ids: list[int] = []
        for part in parts:
            ids += [self.specials[part]] if part in self.specials else self.encode(part) if part else []
        return ids


@dataclass(frozen=True)
class Sample:
    """A training sample: ids with IMAGE_INDEX at a picture's places, labels with -100 where there is no loss."""

    ids: list[int]
    labels: list[int]


def encode_dialogue(
    prompt: Prompt, turns: Sequence[tuple[str, str]], vocabulary: Vocabulary, patches: int, limit: int
) -> Sample:
    """Render turns of (user, assistant) with `prompt`, tokenize and mask them (llava/train/train.py `preprocess_v1`).

    The text is split at the image placeholder and each piece tokenized afresh. Within the piece that holds an answer
    the question's ids must be a prefix of the whole piece's ids; where a tokenizer merges across that border the
    sample's labels are all masked, as the original does.

    Args:
        prompt: the template.
        turns: at least one (user, assistant) pair; the user's text holds the placeholder where a picture stands.
        vocabulary: the tokenizer.
        patches: places that one picture takes.
        limit: longer samples are cut.
    """
    ids = [] if vocabulary.bos is None else [vocabulary.bos]
    labels = [IGNORE] * len(ids)
    for number, (user, assistant) in enumerate(turns):
        form = prompt.first if number == 0 else prompt.next
        opening = form.format(system=prompt.system, text=user)
        *before, last = opening.split(prompt.image)
        for piece in before:
            known = vocabulary.ids(piece) + [IMAGE_INDEX] * patches
            ids, labels = ids + known, labels + [IGNORE] * len(known)
        asked = vocabulary.ids(last)
        whole = vocabulary.ids(last + prompt.answer.format(text=assistant))
        if whole[: len(asked)] != asked:
            return Sample((ids + whole)[:limit], [IGNORE] * min(limit, len(ids) + len(whole)))
        ids = ids + whole
        labels = labels + [IGNORE] * len(asked) + whole[len(asked) :]
    return Sample(ids[:limit], labels[:limit])


def pad(samples: Sequence[Sample], pad_id: int) -> dict[str, Tensor]:
    """Right-pad to the longest: `ids`, `labels`, `mask`, each int64 [B,T]."""
    length = max(len(sample.ids) for sample in samples)

    def stack(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in rows], dtype=torch.int64)

    return {
        "ids": stack([sample.ids for sample in samples], pad_id),
        "labels": stack([sample.labels for sample in samples], IGNORE),
        "mask": stack([[1] * len(sample.ids) for sample in samples], 0),
    }


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of predicting token t+1 from position t over labels that are not -100.

    Args:
        logits: [B,T,V].
        labels: int64 [B,T].
    """
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE
    )
