"""Recipe task `language`: pretrains the small LLaMA and its tokenizer on the language of scenes."""

from __future__ import annotations

import shutil
import string
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mllm_edge.models.language.llama import llama
from mllm_edge.models.llava.model import CONFIGS, IMAGE_INDEX
from mllm_edge.models.llava.prompts import PROMPTS
from mllm_edge.recipes.data.conversation import (
    Sample,
    answer_loss,
    encode_brief,
    encode_dialogue,
    pad,
    share_prefix,
    visibility,
)
from mllm_edge.recipes.data.mixture import wide_share
from mllm_edge.recipes.data.scene_turns import DESCRIBE, DESCRIBED, TELEGRAMS
from mllm_edge.recipes.data.vocabulary import TOKENIZER, sentencepiece_vocabulary, train_tokenizer
from mllm_edge.recipes.modules import plain_attention
from mllm_edge.recipes.parts import save_part
from mllm_edge.recipes.recipe import Recipe
from mllm_edge.scenes import SHORT, ToldScene, pick, scene_text, telegram, terse, told_scene

CORPUS = 2_000  # texts that the tokenizer is trained on
VALIDATION = 10_000_000  # first text index that is never trained on
FORMS = {"telegram": 0.13, "terse": 0.27, "chat": 0.45, "text": 0.15}  # shares of samples after the opening
IN_BAGS = 0.85  # share of the first three forms whose scene is given as bags of words, one per object, instead of text
COPIES = 8  # most positions of a bag, as an object covers several patches of a picture
BLANKS = 24  # most positions with an empty bag, like background patches
COUNTED = "object"  # in one bag per object, so that objects can be counted, as an encoder marks their centers


class LanguageModel(nn.Module):
    """The decoder with its loss."""

    def __init__(self, decoder: Any):
        super().__init__()
        self.language_model = decoder

    def forward(
        self,
        ids: Tensor,
        labels: Tensor,
        mask: Tensor,
        branches: Tensor | None = None,
        positions: Tensor | None = None,
        bags: Tensor | None = None,
    ) -> dict[str, Tensor]:
        return answer_loss(self.language_model, self.embed(ids, bags), visibility(mask, branches), positions, labels)

    def embed(self, ids: Tensor, bags: Tensor | None) -> Tensor:
        """Embeddings [B,T,D] of `ids`; at IMAGE_INDEX the sum of a bag's embeddings (see `conversation.pad`)."""
        table: Any = self.language_model.get_input_embeddings()
        here = ids == IMAGE_INDEX  # [B,T]
        embeds: Tensor = table(ids.masked_fill(here, 0))
        if bags is None:
            return embeds
        sums = (table(bags.clamp(min=0)) * (bags >= 0).unsqueeze(-1)).sum(dim=1)  # [n,D]
        return embeds.masked_scatter(here.unsqueeze(-1), sums.to(embeds.dtype))


class LanguageTask:
    """Next-token training on the language of scenes.

    A decoder must learn look-ups, which the loss on plain texts hardly rewards, since most of their words are
    unpredictable. So most samples ask about a scene: in telegrams, in terse questions and in the chat template of the
    later stages; and most of these scenes are given not as text but as bags of words, one token per object, like a
    connector's output for a picture. The first `data.opening` steps have telegrams only.
    """

    def __init__(self, recipe: Recipe):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.dims = CONFIGS[recipe.config]
        self.length = int(recipe.data.get("length", 256))
        self.questions = int(recipe.data.get("questions", 8))
        self.opening = int(recipe.data.get("opening", 0)) * recipe.batch
        self.wide = wide_share(recipe.data)
        self.prompt = PROMPTS[self.dims.template]
        self.tokenizer = Path(recipe.out) / TOKENIZER
        if not self.tokenizer.is_file():
            self.tokenizer.parent.mkdir(parents=True, exist_ok=True)
            train_tokenizer(self.tokenizer, self.dims.language.vocabulary, self._corpus())
        self.vocabulary = sentencepiece_vocabulary(self.tokenizer)
        self.model = LanguageModel(plain_attention(llama(self.dims.language)))

    def _corpus(self) -> Iterator[str]:
        """Scene texts mixed with the words of the chat template. Newlines are left out: as in LLaMA's vocabulary they
        are byte tokens."""
        template = self.prompt.first.format(system=self.prompt.system, text=SHORT.strip())
        for index in range(CORPUS):
            yield scene_text(index, self.recipe.seed, self.wide)
            if index % 2 == 0:
                yield told_scene(index, self.recipe.seed, other_names=True, wide=self.wide).text
            if index % 20 == 0:
                yield template
        yield string.ascii_letters + string.digits + string.punctuation

    def parameters(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters())}]

    def sample(self, index: int) -> Sample:
        rng = np.random.default_rng([self.recipe.seed, 15, index])
        first = index < self.opening
        form = "telegram" if first else str(rng.choice(list(FORMS), p=list(FORMS.values())))
        if form == "text":
            return self._text(index)
        told = told_scene(index, self.recipe.seed, other_names=True, wide=self.wide)
        bags = self._bags(told, rng, alone=first) if first or rng.random() < IN_BAGS else []
        if form == "chat":
            samples = self._dialogues(told, bags, rng)
        else:
            places = [IMAGE_INDEX] * len(bags) if bags else self.vocabulary.ids(told.text)
            opening = [*self.vocabulary.start, *places]
            pairs = dict.fromkeys(
                [telegram(told.things, rng) for _ in range(TELEGRAMS)]
                if form == "telegram"
                else [terse(question) for question in told.questions[:TELEGRAMS]]
            )
            samples = [encode_brief(opening, *pair, self.vocabulary) for pair in pairs]
        return replace(share_prefix(samples), bags=bags)

    def _bags(self, told: ToldScene, rng: np.random.Generator, alone: bool) -> list[list[int]]:
        """A bag of word ids for each object; unless `alone`, with copies and empty bags between."""
        bags = []
        for thing in told.things:
            words = " ".join(thing)
            copies = 0 if alone else int(rng.integers(COPIES))
            bags += [self.vocabulary.ids(f"{words} {COUNTED}")] + [self.vocabulary.ids(words)] * copies
        bags += [[]] * (0 if alone else int(rng.integers(BLANKS + 1)))
        return [bags[i] for i in rng.permutation(len(bags))]

    def _dialogues(self, told: ToldScene, bags: list[list[int]], rng: np.random.Generator) -> list[Sample]:
        turns = [question.asked(short=rng.random() < 0.75) for question in told.questions[: self.questions]]
        if rng.random() < DESCRIBED:
            turns[-1] = pick(rng, DESCRIBE), told.text
        return [
            self._turn(self.prompt.slots[0].placeholder if bags else told.text, *turn, places=len(bags))
            for turn in turns
        ]

    def _turn(self, text: str, question: str, answer: str, places: int = 0) -> Sample:
        turns = [(f"{text}\n{question}", answer)]
        return encode_dialogue(self.prompt, turns, self.vocabulary, places, self.dims.language.context)

    def _text(self, index: int) -> Sample:
        ids: list[int] = []
        number = index * 8  # a sample needs at most 8 texts, so samples share none
        while len(ids) < self.length:
            ids += [1, *self.vocabulary.ids(scene_text(number, self.recipe.seed, self.wide)), 2]
            number += 1
        ids = ids[: self.length]
        return Sample(ids, ids)

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        return pad(samples, self.vocabulary.pad)

    @torch.no_grad()
    def evaluate(self, samples: int) -> dict[str, float]:
        """Loss per token on validation texts, and the share of exact short answers about them (teacher-forced: every
        token of the answer is the most likely)."""
        device = next(self.model.parameters()).device
        loss: list[float] = []
        exact: list[float] = []
        for index in range(VALIDATION // 8, VALIDATION // 8 + samples):
            told = told_scene(index, self.recipe.seed)
            asked = self._turn(told.text, *told.questions[0].asked(short=True))
            for sample, values, name in ((self._text(index), loss, "loss"), (asked, exact, "token_accuracy")):
                batch = {key: value.to(device) for key, value in self.collate([sample]).items()}
                values.append(float(self.model(**batch)[name]))
        return {
            "validation_loss": round(sum(loss) / samples, 4),
            "validation_exact": round(sum(value == 1 for value in exact) / samples, 4),
        }

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        save_part(folder, "language_model", asdict(self.dims.language), state, "language_model.", self.recipe.dtype)
        if folder != self.tokenizer.parent:
            shutil.copy(self.tokenizer, folder / TOKENIZER)
