"""Dialogues as token ids and labels, with LLaVA's masking: the loss covers only the assistant's words."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mllm_edge.bundle.manifest import Prompt
from mllm_edge.models.llava.model import IMAGE_INDEX

IGNORE = -100


@dataclass(frozen=True)
class Vocabulary:
    """Text to ids: `encode` tokenizes a piece of plain text on its own (no BOS); `specials` maps control strings such
    as `</s>` to ids, `added` further ones that strip adjacent white space (see `Prompt.added`)."""

    encode: Callable[[str], list[int]]
    specials: dict[str, int]
    bos: int | None
    pad: int
    added: dict[str, int] = field(default_factory=dict)

    @property
    def start(self) -> list[int]:
        """Ids at the start of every sequence."""
        return [] if self.bos is None else [self.bos]

    def ids(self, text: str) -> list[int]:
        """Ids of `text`; control strings become their ids."""
        known = {**self.specials, **self.added}
        if not known:
            return self.encode(text)
        if self.added:
            text = re.sub(r"\s*(" + "|".join(map(re.escape, self.added)) + r")\s*", r"\1", text)
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, known)) + ")", text):
            ids += [known[part]] if part in known else self.encode(part) if part else []
        return ids


@dataclass(frozen=True)
class Sample:
    """A training sample: ids with IMAGE_INDEX at a picture's positions, labels with -100 where there is no loss.

    `branches` is empty, or gives each id's branch (1, 2, ...; 0 for the trunk).
    `bags` is empty, or holds for each IMAGE_INDEX a bag of words: the ids whose embeddings are summed there.
    """

    ids: list[int]
    labels: list[int]
    branches: list[int] = field(default_factory=list)
    bags: list[list[int]] = field(default_factory=list)


def encode_dialogue(
    prompt: Prompt, turns: Sequence[tuple[str, str]], vocabulary: Vocabulary, patches: int, limit: int
) -> Sample:
    """Render turns of (user, assistant) with `prompt`, tokenize and mask them (llava/train/train.py `preprocess_v1`).

    The text is split at the image placeholder and each piece tokenized on its own. Within the piece that holds an
    answer the question's ids must be a prefix of the whole piece's ids; if the tokenizer merges across that border, all
    labels of the sample are masked, as the original does.

    Args:
        prompt: the template.
        turns: at least one (user, assistant) pair; the user's text holds the placeholder at a picture's position.
        vocabulary: the tokenizer.
        patches: positions that one picture takes.
        limit: longer samples are truncated.
    """
    ids = vocabulary.start
    labels = [IGNORE] * len(ids)
    for number, (user, assistant) in enumerate(turns):
        form = prompt.first if number == 0 else prompt.next
        opening = form.format(system=prompt.system, text=user)
        *before, last = opening.split(prompt.slots_of("pixels")[0].placeholder)
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


def encode_brief(opening: list[int], start: str, rest: str, vocabulary: Vocabulary) -> Sample:
    """`opening`, then `start` and `rest` as plain words without a template; the loss covers `rest` and the end."""
    known = vocabulary.ids(start)
    whole = vocabulary.ids(f"{start} {rest}" + next(iter(vocabulary.specials)))
    return Sample(opening + whole, [IGNORE] * (len(opening) + len(known)) + whole[len(known) :])


def share_prefix(samples: Sequence[Sample], apart: int | None = None) -> Sample:
    """Pack `samples` into one sequence: their common prefix (the trunk) once, then the rest of each as a branch.

    A picture and its opening are computed once for many questions. Every branch attends to the trunk and itself and its
    positions continue the trunk's, so each loss equals that of the sample alone (as in Hydragen, Juravsky et al. 2024).

    Args:
        samples: at least one, each with a question after the prefix, none with branches.
        apart: an id whose meaning differs between samples, so that it is never shared.
    """
    first = samples[0].ids
    # One token of every question stays in its branch: the first loss is then predicted from within the branch.
    limit = min(next((i for i, label in enumerate(s.labels) if label != IGNORE), len(s.ids)) for s in samples) - 1
    trunk = next((i for i in range(limit) if first[i] == apart or any(s.ids[i] != first[i] for s in samples)), limit)
    ids, labels, branches = first[:trunk], [IGNORE] * trunk, [0] * trunk
    for number, sample in enumerate(samples, start=1):
        ids, labels = ids + sample.ids[trunk:], labels + sample.labels[trunk:]
        branches = branches + [number] * (len(sample.ids) - trunk)
    return Sample(ids, labels, branches, samples[0].bags)


def pad(samples: Sequence[Sample], pad_id: int) -> dict[str, Tensor]:
    """Right-pad to the longest: `ids`, `labels`, `mask`, each int64 [B,T]; with branches also `branches` and
    `positions`; with bags also `bags`, int64 [n,most ids], padded with -1."""
    length = max(len(sample.ids) for sample in samples)

    def stack(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in rows], dtype=torch.int64)

    batch = {
        "ids": stack([sample.ids for sample in samples], pad_id),
        "labels": stack([sample.labels for sample in samples], IGNORE),
        "mask": stack([[1] * len(sample.ids) for sample in samples], 0),
    }
    if any(sample.branches for sample in samples):
        batch["branches"] = stack([sample.branches or [0] * len(sample.ids) for sample in samples], 0)
        batch["positions"] = stack([_positions(sample) for sample in samples], 0)
    bags = [bag for sample in samples for bag in sample.bags]
    if bags:
        most = max(map(len, bags))
        batch["bags"] = torch.tensor([bag + [-1] * (most - len(bag)) for bag in bags])
    return batch


def _positions(sample: Sample) -> list[int]:
    """Positions of the ids as if each branch directly followed the trunk."""
    trunk = sample.branches.count(0)
    seen: dict[int, int] = {}
    positions = []
    for branch in sample.branches or [0] * len(sample.ids):
        seen[branch] = seen.get(branch, trunk if branch else 0) + 1
        positions.append(seen[branch] - 1)
    return positions


def visibility(mask: Tensor, branches: Tensor | None) -> Tensor:
    """The attention mask, in the form that transformers' decoders accept.

    Returns:
        `mask` itself without branches, else float32 [B,1,T,T] to add to the scores: 0 where a token may attend (to
        itself and earlier tokens of the trunk or of its own branch), the lowest float elsewhere.
    """
    if branches is None:
        return mask
    length = mask.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()  # [T,T]
    # [B,T,T]
    related = (branches.unsqueeze(1) == 0) | (branches.unsqueeze(1) == branches.unsqueeze(2))
    seen = earlier & related & mask.bool().unsqueeze(1)  # [B,T,T]
    nothing = torch.finfo(torch.float32).min
    return torch.zeros(seen.shape, device=mask.device).masked_fill(~seen, nothing).unsqueeze(1)


def answer_loss(
    decoder: Any, embeds: Tensor, mask: Tensor, positions: Tensor | None, labels: Tensor
) -> dict[str, Tensor]:
    """Next-token cross-entropy over the labels that are not -100, and the share predicted as most likely token.

    Args:
        decoder: transformers' `LlamaForCausalLM`, or peft's around it.
        embeds: [B,T,D].
        mask: see `visibility`.
        positions: int64 [B,T], or None for 0, 1, 2, ...
        labels: int64 [B,T].

    Returns:
        `loss` and `token_accuracy`, scalars.
    """
    return token_loss(decoder, final_states(decoder, embeds, mask, positions), labels)


def final_states(decoder: Any, embeds: Tensor, mask: Tensor, positions: Tensor | None) -> Tensor:
    """Hidden states after the final norm, [B,T,D]; arguments as in `answer_loss`."""
    states: Tensor = (
        _plain(decoder).model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state
    )
    return states


def token_loss(decoder: Any, states: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """`answer_loss` from the `final_states`. The head is computed only where there are labels, since few tokens have
    one and the vocabulary is wide."""
    places, truths = labelled(states, labels)  # [n,D], [n]
    logits = _plain(decoder).lm_head(places).float()  # [n,V]
    right = (logits.detach().argmax(-1) == truths).float().mean()
    return {"loss": torch.nn.functional.cross_entropy(logits, truths), "token_accuracy": right}


def _plain(decoder: Any) -> Any:
    return decoder.get_base_model() if hasattr(decoder, "get_base_model") else decoder


def labelled(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of values [B,T,X] the n that must predict a labelled token, [n,X], and these tokens, int64 [n].

    The value at position t predicts the token at t+1.
    """
    seen = labels[:, 1:] != IGNORE  # [B,T-1]
    return values[:, :-1][seen], labels[:, 1:][seen]
