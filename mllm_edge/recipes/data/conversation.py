"""Dialogues as token ids and labels, with LLaVA's masking: the loss sees the assistant's words and nothing else."""

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
    """How text becomes ids: `encode` takes a piece of plain text as a fresh string (no BOS); `specials` maps control
    strings such as `</s>` to ids, `added` further ones that swallow white space beside them (see `Prompt.added`)."""

    encode: Callable[[str], list[int]]
    specials: dict[str, int]
    bos: int | None
    pad: int
    added: dict[str, int] = field(default_factory=dict)

    @property
    def start(self) -> list[int]:
        """What every sequence begins with."""
        return [] if self.bos is None else [self.bos]

    def ids(self, text: str) -> list[int]:
        """Ids of `text`, in which control strings stand for their ids."""
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
    """A training sample: ids with IMAGE_INDEX at a picture's places, labels with -100 where there is no loss.

    `branches` is empty, or says of each id whether it belongs to the trunk (0) or to which branch (1, 2, ...).
    `bags` is empty, or holds for each IMAGE_INDEX the ids whose embeddings' sum stands there (a bag of words).
    """

    ids: list[int]
    labels: list[int]
    branches: list[int] = field(default_factory=list)
    bags: list[list[int]] = field(default_factory=list)


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
    ids = vocabulary.start
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


def encode_brief(opening: list[int], start: str, rest: str, vocabulary: Vocabulary) -> Sample:
    """`opening`, then `start` and `rest` as plain words without a template; the loss sees `rest` and the end."""
    known = vocabulary.ids(start)
    whole = vocabulary.ids(f"{start} {rest}" + next(iter(vocabulary.specials)))
    return Sample(opening + whole, [IGNORE] * (len(opening) + len(known)) + whole[len(known) :])


def share_prefix(samples: Sequence[Sample], apart: int | None = None) -> Sample:
    """One sequence that teaches what all of `samples` teach: their common prefix once, then the rest of each.

    A picture and its opening are computed once for many questions. Every branch sees the trunk and itself and starts at
    the position behind the trunk, so each loss is the one of its sample alone (as in Hydragen, Juravsky et al. 2024).

    Args:
        samples: at least one, each with a question after the prefix, none with branches.
        apart: an id that stands for something else in each sample, so that it is never shared.
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
    `positions`; with bags also `bags`, int64 [n,most ids], -1 where a bag has no more."""
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
    """Places of the ids as if each branch stood alone behind the trunk."""
    trunk = sample.branches.count(0)
    seen: dict[int, int] = {}
    positions = []
    for branch in sample.branches or [0] * len(sample.ids):
        seen[branch] = seen.get(branch, trunk if branch else 0) + 1
        positions.append(seen[branch] - 1)
    return positions


def visibility(mask: Tensor, branches: Tensor | None) -> Tensor:
    """What each token sees, in the form that transformers' decoders take.

    Returns:
        `mask` itself where there are no branches, else float32 [B,1,T,T] to add to the scores: 0 where a token may look
        (itself and earlier ones of the trunk or of its own branch), the lowest float elsewhere.
    """
    if branches is None:
        return mask
    length = mask.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    related = (branches.unsqueeze(1) == 0) | (branches.unsqueeze(1) == branches.unsqueeze(2))
    seen = earlier & related & mask.bool().unsqueeze(1)
    nothing = torch.finfo(torch.float32).min
    return torch.zeros(seen.shape, device=mask.device).masked_fill(~seen, nothing).unsqueeze(1)


def answer_loss(
    decoder: Any, embeds: Tensor, mask: Tensor, positions: Tensor | None, labels: Tensor
) -> dict[str, Tensor]:
    """Next-token cross-entropy over the labels that are not -100, and how many of them are the most likely token.

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
    """States behind the final norm, [B,T,D]; the arguments are those of `answer_loss`."""
    states: Tensor = (
        _plain(decoder).model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state
    )
    return states


def token_loss(decoder: Any, states: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """`answer_loss` behind `final_states`. The head is computed at the labels' places alone: few tokens have a label,
    and a vocabulary is wide."""
    places, truths = labelled(states, labels)
    logits = _plain(decoder).lm_head(places).float()
    right = (logits.detach().argmax(-1) == truths).float().mean()
    return {"loss": torch.nn.functional.cross_entropy(logits, truths), "token_accuracy": right}


def _plain(decoder: Any) -> Any:
    return decoder.get_base_model() if hasattr(decoder, "get_base_model") else decoder


def labelled(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of values [B,T,X] the n that must foretell a labelled token, [n,X], and these tokens, int64 [n].

    The value at place t is for the token at t+1.
    """
    seen = labels[:, 1:] != IGNORE
    return values[:, :-1][seen], labels[:, 1:][seen]
