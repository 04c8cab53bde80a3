"""Recipe task `gill-language`: pretrains the small OPT and its tokenizer on the language of scenes, without pictures.

GILL's language model stays frozen while four rows of a picture are put before its texts, so a small one must have
learned before to read rows. In most samples a scene is given as such: one row per thing, from left to right, the sum
of its attributes' embeddings. Nor can a frozen one learn to sum a caption up in the state at one token, which is all
that retrieval reads: it learns that at `<|image|>`, which no text has, and whose row the picture tokens begin with.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_edge.errors import look_up
from mllm_edge.models.gill.model import CONFIGS, TOKENS
from mllm_edge.models.gill.prompts import CAPTION
from mllm_edge.models.language.opt import OptDims, opt
from mllm_edge.recipes.data.conversation import IGNORE, labelled
from mllm_edge.recipes.data.gill_scenes import (
    CLASSES,
    SLOTS,
    dialogue,
    fuller_scene,
    named,
    request,
    row_words,
    said_slots,
    told,
)
from mllm_edge.recipes.data.gill_words import BOS, ROW, Labelled, Words, stacked, train_tokenizer
from mllm_edge.recipes.modules import decaying, plain_attention
from mllm_edge.recipes.parts import save_part
from mllm_edge.recipes.recipe import Recipe
from mllm_edge.recipes.slots import SlotHeads
from mllm_edge.scenes import Scene, sample_scene
from mllm_edge.scenes.captions import full_caption

CORPUS = 1500  # scenes that the tokenizer learns from
FORMS = {"caption": 0.35, "dialogue": 0.2, "told": 0.1, "text": 0.1, "summary": 0.25}  # the first two read rows
NOISE = 0.3  # of rows, against their deviation: those of pictures will not be exact
FULLER = 0.3  # share of fuller scenes among those without rows
TURNS = 3

Sample = tuple[Labelled, list[list[int]], dict[str, np.ndarray[Any, Any]]]  # words, bags of rows, what is summed up


def headless(dims: OptDims) -> Any:
    """An OPT without its head, which is its table: tensors that are one would be saved as two."""
    decoder: Any = plain_attention(opt(dims))
    del decoder.lm_head
    return decoder


def at_rows(table: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """Embeddings [B,T,D] of ids int64 [B,T], and rows [n,D] in order where those are ROW."""
    here = ids == ROW
    embeds = functional.embedding(ids.masked_fill(here, 0), table)
    return embeds.masked_scatter(here.unsqueeze(-1), rows.to(embeds.dtype))


def final_states(decoder: Any, embeds: Tensor) -> Tensor:
    """States of transformers' OPT behind its last norm, [B,T,D] -> [B,T,D]; padding stands behind, unseen."""
    seen: Tensor = decoder.model.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return seen


def said_loss(states: Tensor, labels: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the labelled tokens, and the share that is the likeliest; the head is the table."""
    places, truths = labelled(states, labels)  # [n,D], [n]
    logits = functional.linear(places, table).float()  # [n,V]
    return functional.cross_entropy(logits, truths), (logits.detach().argmax(-1) == truths).float().mean()


class ToldModel(nn.Module):
    """The OPT with its loss."""

    def __init__(self, dims: OptDims):
        super().__init__()
        self.language_model: Any = headless(dims)
        self.slots = SlotHeads(dims.width)
        self.summary = dims.vocabulary - len(TOKENS) - 1  # the id of `<|image|>`

    def forward(self, ids: Tensor, labels: Tensor, bags: Tensor, **summed: Tensor) -> dict[str, Tensor]:
        """`ids` and `labels` int64 [B,T]; `bags` the words of each row, int64 [n,W] padded with -1; `summed` the slots'
        classes of each summary, int64 [m,4]."""
        table = self.language_model.get_input_embeddings().weight
        rows = (functional.embedding(bags.clamp(min=0), table) * (bags >= 0).unsqueeze(-1)).sum(1)  # [n,D]
        if self.training:
            rows = rows + NOISE * rows.detach().std(dim=-1, keepdim=True) * torch.randn_like(rows)
        states = final_states(self.language_model, at_rows(table, ids, rows))
        loss, accuracy = said_loss(states, labels, table)
        told_of, right = self.slots.losses(states[ids == self.summary], summed)
        summary = torch.stack(list(right.values())).mean()
        return {"loss": loss + told_of, "words": loss, "token_accuracy": accuracy, "summary": summary}


class GillLanguageTask:
    """Captions and dialogues about scenes in words."""

    def __init__(self, recipe: Recipe):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.dims = look_up("config", recipe.config, {"tiny": CONFIGS["tiny"]})
        self.folder = Path(recipe.out)
        if not (self.folder / "tokenizer.json").is_file():
            train_tokenizer(self.folder, self.dims.language.vocabulary, self._corpus())
        self.words = Words(self.folder)
        self.model = ToldModel(self.dims.language)

    def _corpus(self) -> Iterator[str]:
        for index in range(CORPUS):
            rng = np.random.default_rng([self.recipe.seed, 84, index])
            scene = sample_scene("train", index, self.recipe.seed)
            text = told(scene, index, self.recipe.seed)
            yield f"{text}\n{request(text)}\n{dialogue(scene, rng, TURNS)}{row_words(scene)[0]}"

    def parameters(self) -> list[dict[str, Any]]:
        return decaying(self.model.parameters())

    def sample(self, index: int) -> Sample:
        rng = np.random.default_rng([self.recipe.seed, 85, index])
        form = str(rng.choice(list(FORMS), p=list(FORMS.values())))
        many = form in ("told", "text") and rng.random() < FULLER
        scene = (fuller_scene if many else sample_scene)("train", index, self.recipe.seed)
        text = told(scene, index, self.recipe.seed)
        if form == "caption":
            return self._read(scene, f"{text}\n")
        if form == "dialogue":
            return self._read(scene, dialogue(scene, rng, TURNS))
        if form == "summary":
            return self.summed(scene, full_caption(scene, rng) if rng.random() < 0.5 else text)
        if form == "told":
            return self._unread(f"{full_caption(scene, rng)}\n{dialogue(scene, rng, TURNS)}")
        return self._unread(f"{request(text) if rng.random() < 0.5 else text}\n")

    def _read(self, scene: Scene, text: str) -> Sample:
        """Rows and a text; rows without a thing are empty."""
        bags = [self.words.ids(words) for words in row_words(scene)]
        bags += [[]] * (self.dims.rows - len(bags))
        said = [BOS, *self.words.ids(text)]
        return ([ROW] * len(bags) + said, [IGNORE] * len(bags) + said), bags, {}

    def _unread(self, text: str) -> Sample:
        ids = [BOS, *self.words.ids(text)][: self.dims.language.context]
        return (ids, ids), [], {}

    def summed(self, scene: Scene, text: str) -> Sample:
        """A caption, and what its words say of each thing."""
        ids = [BOS, *self.words.ids(text)]
        return ([*ids, self.model.summary], [*ids, IGNORE]), [], said_slots(scene, text)

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        ids, labels = stacked(said for said, _, _ in samples)
        bags = [bag for _, rows, _ in samples for bag in rows]
        width = max([1, *map(len, bags)])
        padded = torch.tensor([[*bag, *[-1] * (width - len(bag))] for bag in bags], dtype=torch.int64)
        summed = [slots for _, _, slots in samples if slots]
        classes = {name: np.array([slots[name] for slots in summed]).reshape(-1, SLOTS) for name in CLASSES}
        told_of = {name: torch.from_numpy(values.astype(np.int64)) for name, values in classes.items()}
        return {"ids": ids, "labels": labels, "bags": padded.reshape(-1, width), **told_of}

    @torch.no_grad()
    def evaluate(self, samples: int) -> dict[str, float]:
        """On scenes of the validation split: loss per token of captions read from rows; the share whose likeliest
        caption names exactly the things that are there; the share of answers about rows whose every token is the
        likeliest; the share that summaries tell of captions."""
        device = next(self.model.parameters()).device
        table = self.model.language_model.get_input_embeddings().weight
        losses, exact, right, summaries = [], [], [], []
        for index in range(samples):
            scene = sample_scene("validation", index, self.recipe.seed)
            losses.append(self._scored(self._read(scene, told(scene, index, self.recipe.seed)), "words"))
            everything = full_caption(scene, np.random.default_rng([self.recipe.seed, 83, index]))
            summaries.append(self._scored(self.summed(scene, everything), "summary"))
            (ids, _), bags, _ = self._read(scene, CAPTION)
            rows = torch.stack([table[bag].sum(0) for bag in bags])
            embeds = at_rows(table, torch.tensor([ids], device=device), rows)
            text = self.words.text(continued(self.model.language_model, embeds, self.words.start)[0])
            exact.append(sorted(named(text)) == sorted(thing.pair for thing in scene.objects))
            right.append(self._answered(scene, index))
        return {
            "caption_loss": round(float(np.mean(losses)), 4),
            "exact_names": round(float(np.mean(exact)), 4),
            "exact_answers": round(float(np.mean(right)), 4),
            "summary": round(float(np.mean(summaries)), 4),
        }

    def _scored(self, sample: Sample, name: str) -> float:
        device = next(self.model.parameters()).device
        return float(self.model(**{key: value.to(device) for key, value in self.collate([sample]).items()})[name])

    def _answered(self, scene: Scene, index: int) -> bool:
        lines = dialogue(scene, np.random.default_rng([self.recipe.seed, 86, index]), 1)
        question, _, _ = lines.partition("A:")
        (ids, _), bags, _ = self._read(scene, lines)
        first = len(bags) + 1 + len(self.words.ids(question + "A:"))
        return self._scored(((ids, [IGNORE] * first + ids[first:]), bags, {}), "token_accuracy") == 1.0

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """The OPT as transformers names it, and the tokenizer."""
        save_part(folder, "language_model", asdict(self.dims.language), state, "language_model.", self.recipe.dtype)
        if folder != self.folder:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(self.folder / name, folder / name)


@torch.no_grad()
def continued(decoder: Any, embeds: Tensor, words: int, most: int = 64) -> list[list[int]]:
    """The likeliest tokens, of the first `words` alone, behind embeddings [B,T,D]: `most` for each."""
    table = decoder.get_input_embeddings().weight
    found: list[Tensor] = []
    for _ in range(most):
        state = final_states(decoder, embeds)[:, -1]
        best = functional.linear(state, table[:words]).argmax(-1)  # [B]
        found.append(best)
        embeds = torch.cat([embeds, table[best].unsqueeze(1)], dim=1)
    return torch.stack(found, dim=1).tolist()
