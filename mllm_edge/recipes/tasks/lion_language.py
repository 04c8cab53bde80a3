"""Recipe task `lion-language`: pretrains the small T5 and both of LION's tokenizers on the language of scenes.

As in `language`, a scene is mostly given as bags of words, one row per object, as a picture's rows will be; the T5
learns to repeat what it reads, and to look things up in single rows, before it sees any picture: first in telegrams,
then in terse questions (`scenes/brief.py`), without which it guesses among the things that are there for a thousand
steps and more. In most scenes after these a row also says where its object is, as a code that the T5 learns to read and
write as a box (`place_code.py`): first of single things, `data.places` steps long, because that takes ten thousand
boxes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_edge.models.language.t5 import T5
from mllm_edge.models.lion.layouts import QUESTION
from mllm_edge.models.lion.model import CONFIGS, LionDims
from mllm_edge.models.lion.prompts import TASKS
from mllm_edge.recipes.data.conversation import IGNORE
from mllm_edge.recipes.data.lion_words import (
    PACKED,
    QUESTIONS,
    TOKENIZER,
    LionTurn,
    Words,
    corpus,
    located,
    one_of,
    prompted,
    tags_of,
    together,
    train_tokenizers,
    turns,
)
from mllm_edge.recipes.data.mixture import wide_share
from mllm_edge.recipes.data.place_code import place_codes
from mllm_edge.recipes.data.scene_pixels import box_shares
from mllm_edge.recipes.modules import t5_groups
from mllm_edge.recipes.parts import part_folder, read_part, save_part
from mllm_edge.recipes.recipe import Recipe
from mllm_edge.recipes.tasks.language import COUNTED
from mllm_edge.scenes import ToldScene, attributes, mixed_scene, telegram, terse, told_scene

CORPUS = 1_500  # scenes that the tokenizers are trained on
VALIDATION = 10_000_000  # first scene that is never trained on
IN_BAGS = 0.85  # share of scenes given as bags of words instead of text
TAGGED = 0.5  # share of prompts with tags
BRIEF = (0.15, 0.25)  # shares of the scenes without places that get telegrams, and terse questions
TELEGRAMS = 0.3  # share of telegrams in the opening's second half
PLACED = 0.6  # share of scenes whose rows have places, for all tasks
ALONE = 4  # questions of a scene that each have a prompt
NEAR = 4.0  # how much more a head looks at its own distance than at others
PARTS = 4  # of a batch, by length
COPIES, BLANKS = 8, 24  # most rows of one object, most empty ones
Places = Sequence[np.ndarray[Any, Any] | None]


@dataclass(frozen=True)
class Told:
    """A prompt and its answer with what its ids count; `bags` are rows of word ids in front of the prompt, `places` the
    box of each, None where it says none."""

    prompt: list[int]
    answer: list[int]
    weights: list[float]
    bags: list[list[int]]
    places: list[np.ndarray[Any, Any] | None]


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Lists of ids as int64 [n,longest]."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def answer_tensors(answers: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]) -> dict[str, Tensor]:
    """What the decoder reads, the start token first, what it is to say, int64 [n,T] each, and how much each id counts,
    float32 [n,T]."""
    return {
        "answer": padded([[0, *ids[:-1]] for ids in answers], 0),
        "labels": padded(answers, IGNORE),
        "weights": nn.utils.rnn.pad_sequence([torch.tensor(row) for row in weights], batch_first=True),
    }


def alike(prompts: Tensor, answers: Tensor) -> tuple[Tensor, ...]:
    """The numbers of n questions in `PARTS` parts of much the same length, given the lengths int64 [n] of both sides:
    on a CPU, what is padded costs as much as what is said."""
    return torch.argsort(prompts + answers, stable=True).chunk(PARTS)


def packed(rows: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n,S,D] that are `seen` (bool [n,S]) one behind the other, and the mask of those: [n,longest,D] and float
    [n,longest]."""
    order = torch.argsort(seen.long(), dim=1, descending=True, stable=True)[:, : int(seen.sum(dim=1).max())]
    kept = rows.gather(1, order.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
    return kept, seen.gather(1, order).float()


def answer_sums(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Float [4] from logits [n,T,V], labels [n,T] and weights [n,T]: the weighted sum of cross-entropies, the weights'
    sum, how many ids are the likeliest, and how many there are."""
    each = functional.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
    said = labels != IGNORE  # [n,T]
    right = (logits.argmax(-1) == labels) & said
    return torch.stack([(each * weights).sum(), weights.sum(), right.sum(), said.sum()])


def mean_losses(parts: Sequence[Tensor]) -> dict[str, Tensor]:
    """The weighted mean loss of all parts' answers (see `answer_sums`), and the share of their ids that are right."""
    loss, weight, right, said = torch.stack(list(parts)).sum(dim=0)
    return {"loss": loss / weight, "token_accuracy": right / said}


class ToldModel(nn.Module):
    """The T5 with its loss."""

    def __init__(self, dims: LionDims, soft: int):
        super().__init__()
        plain = asdict(dims.language) | {"bottleneck": 0}
        self.t5 = T5(type(dims.language)(**plain))
        self.soft = soft
        with torch.no_grad():
            for name, parameter in self.t5.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
                if name.endswith(".q.weight"):  # in place of the scaling that T5's attention lacks (T5PreTrainedModel)
                    parameter.mul_(dims.language.head_width**-0.5)
            # Near words are looked at from the start: tables that began near 0 had not moved after 2,000 steps, and
            # the digits of a box came out in any order.
            half = dims.language.buckets // 2
            for stack, near in ((self.t5.encoder, (1, half + 1)), (self.t5.decoder, (1, 2, 3))):
                first: Any = stack.block[0]
                table = first.layer[0].SelfAttention.relative_attention_bias.weight  # [buckets,heads]
                table.normal_(std=0.5)
                for head, bucket in enumerate(near):  # one word back, one ahead; one, two and three words back
                    table[bucket, head] += NEAR
            # Words must stand out of what the layers add to them, because nothing norms the stream between.
            self.t5.shared.weight.normal_()

    def forward(
        self, bags: Tensor, codes: Tensor, prompt: Tensor, answer: Tensor, labels: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """`bags` int64 [n,R,W] padded with -1 (an empty row) or -2 (no row), `codes` [n,R,D] of places, `prompt` [n,L]
        padded with -1, and `answer_tensors`."""
        table = self.t5.shared.weight
        words = functional.embedding(bags.clamp(min=0), table) * (bags >= 0).unsqueeze(-1)  # [n,R,W,D]
        rows = words.sum(dim=2) + codes  # [n,R,D]
        rows = torch.cat([rows, functional.embedding(prompt.clamp(min=0), table)], dim=1)  # [n,R+L,D]
        seen = torch.cat([bags[..., 0] > -2, prompt >= 0], dim=1)
        sums = []
        for part in alike(seen.sum(dim=1), (labels != IGNORE).sum(dim=1)):
            kept, mask = packed(rows[part], seen[part])
            said = int((labels[part] != IGNORE).sum(dim=1).max())
            cross = self.t5.decoder.cross(self.t5.encoder(kept, mask=mask))
            states, _ = self.t5.decoder(self.t5.shared(answer[part, :said]), cross, mask=mask)
            sums.append(answer_sums(self.t5.logits(states), labels[part, :said], weights[part, :said]))
        return mean_losses(sums)


class LionLanguageTask:
    """Questions about scenes in words."""

    def __init__(self, recipe: Recipe):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.dims = CONFIGS[recipe.config]
        self.wide = wide_share(recipe.data)
        self.packed = float(recipe.data.get("packed", PACKED))
        self.lone = float(recipe.data.get("lone", 0.0))
        self.opening = int(recipe.data.get("opening", 0)) * recipe.batch
        self.places = self.opening + int(recipe.data.get("places", 0)) * recipe.batch
        self.folder = Path(recipe.out)
        if recipe.init.get("t5") and not (self.folder / TOKENIZER).is_file():
            _copy_tokenizers(part_folder(recipe.init["t5"]), self.folder)
        if not (self.folder / TOKENIZER).is_file():
            scenes = (mixed_scene("train", index, recipe.seed, self.wide) for index in range(CORPUS))
            sizes = self.dims.language.vocabulary, self.dims.qformer.vocabulary
            train_tokenizers(self.folder, sizes, list(corpus(scenes, recipe.seed)))
        self.words = Words(self.folder)
        self.model = ToldModel(self.dims, self.words.soft)
        if recipe.init.get("t5"):
            self.model.t5.load_state_dict(read_part(recipe.init["t5"], "t5"))

    def parameters(self) -> list[dict[str, Any]]:
        return t5_groups(self.model.named_parameters(), self.recipe.lr, self.dims.language.head_width)

    def sample(self, index: int) -> list[Told]:
        rng = np.random.default_rng([self.recipe.seed, 93, index])
        if index < self.opening // 3:
            return self._copied(index, rng)
        if index < self.opening:
            told = told_scene(index, self.recipe.seed, other_names=True, wide=self.wide)
            return self._brief(told, rng, 1.0 if index < 2 * self.opening // 3 else TELEGRAMS)
        if index < self.places or rng.random() < self.lone:
            return self._lone(index, rng)
        if rng.random() < PLACED:
            return self._placed(index, rng)
        told = told_scene(index, self.recipe.seed, other_names=True, wide=self.wide)
        if rng.random() < sum(BRIEF):
            return self._brief(told, rng, BRIEF[0] / sum(BRIEF))
        bags, _ = self._bags(told.things, rng) if rng.random() < IN_BAGS else ([], [])
        drawn = [LionTurn("vqa", *one.asked(short=rng.random() < 0.75)) for one in told.questions[:QUESTIONS]]
        made = []
        for turn in self._some(drawn, rng):
            text = turn.question if bags else f"{told.text} {turn.question}"
            text = prompted(text, []) if rng.random() < TAGGED else text
            made.append(self._told(replace(turn, question=text), bags))
        return made

    def _some(self, asked: list[LionTurn], rng: np.random.Generator) -> list[LionTurn]:
        """All of them in one prompt, or the first ones in a prompt each."""
        return together(asked, rng) if rng.random() < self.packed else asked[:ALONE]

    def _copied(self, index: int, rng: np.random.Generator) -> list[Told]:
        """Turns to be repeated word by word: boxes and whole sentences of an answer stand in order after it."""
        scene = mixed_scene("train", index, self.recipe.seed, self.wide)
        asked = [turn for task in TASKS for turn in turns(scene, task, rng, 1)]
        texts = [f"{turn.question} {turn.answer}" for turn in asked]
        return [self._told(LionTurn("", text, text)) for text in texts]

    def _brief(self, told: ToldScene, rng: np.random.Generator, telegrams: float) -> list[Told]:
        """Telegrams in this share, else terse questions."""
        bags, _ = self._bags(told.things, rng)
        pairs = [terse(question) for question in told.questions[:QUESTIONS]]
        if rng.random() < telegrams:
            pairs = [telegram(told.things, rng) for _ in range(QUESTIONS)]
        asked = self._some([LionTurn("vqa", *pair) for pair in pairs], rng)
        return [self._told(turn, bags) for turn in asked]

    def _lone(self, index: int, rng: np.random.Generator) -> list[Told]:
        """Single things and the questions where they are: reading a code is learned apart from finding its row."""
        scene = mixed_scene("train", index, self.recipe.seed, self.wide)
        things, shares = scene.objects, box_shares(scene)
        made = []
        for turn, target in located(scene, rng)[:ALONE]:
            bags, owners = self._bags([attributes(things[target])], rng)
            places = [None if owner is None else shares[target] for owner in owners]
            made.append(self._told(turn, bags, places))
        return made or self._placed(index, rng)

    def _placed(self, index: int, rng: np.random.Generator) -> list[Told]:
        """Turns of one task about a scene whose rows have places."""
        scene = mixed_scene("train", index, self.recipe.seed, self.wide)
        task = one_of(list(TASKS), rng)
        asked = self._some(turns(scene, task, rng, QUESTIONS) or turns(scene, "caption", rng, 1), rng)
        bags, owners = self._bags([attributes(item) for item in scene.objects], rng)
        shares = box_shares(scene)
        places = [None if owner is None else shares[owner] for owner in owners]
        tags = tags_of(scene) if rng.random() < TAGGED else None
        return [self._told(replace(turn, question=prompted(turn.question, tags)), bags, places) for turn in asked]

    def _told(self, turn: LionTurn, bags: Sequence[list[int]] = (), places: Places = ()) -> Told:
        answer = self.words.answer(turn.answer)
        weights = self.words.weights(answer, turn.count)
        return Told(self.words.prompt(turn.question), answer, weights, list(bags), list(places))

    def _bags(
        self, things: Sequence[Sequence[str]], rng: np.random.Generator
    ) -> tuple[list[list[int]], list[int | None]]:
        """Rows in any order, several of a thing with a mark on one, so that it counts once, and empty ones; and whose
        each is."""
        rows: list[tuple[list[int], int | None]] = [([], None)] * int(rng.integers(BLANKS + 1))
        for number, thing in enumerate(things):
            words = " ".join(thing)
            rows.append((self.words.answer(f"{words} {COUNTED}")[:-1], number))
            rows += [(self.words.answer(words)[:-1], number)] * int(rng.integers(COPIES))
        mixed = [rows[i] for i in rng.permutation(len(rows))]
        return [ids for ids, _ in mixed], [owner for _, owner in mixed]

    def collate(self, samples: Sequence[list[Told]]) -> dict[str, Tensor]:
        told = [one for sample in samples for one in sample]
        rows, width = max(len(one.bags) for one in told), max([1, *(len(bag) for one in told for bag in one.bags)])
        bags, codes = torch.full((len(told), rows, width), -2), torch.zeros(len(told), rows, self.dims.language.width)
        for number, one in enumerate(told):
            for row, bag in enumerate(one.bags):
                bags[number, row] = -1
                bags[number, row, : len(bag)] = torch.tensor(bag, dtype=torch.int64)
            placed = [row for row, box in enumerate(one.places) if box is not None]
            if placed:
                found = place_codes(np.array([one.places[row] for row in placed]), codes.shape[-1])
                codes[number, placed] = torch.from_numpy(found)
        return {
            "bags": bags,
            "codes": codes,
            "prompt": padded([one.prompt for one in told], -1),
            **answer_tensors([one.answer for one in told], [one.weights for one in told]),
        }

    @torch.no_grad()
    def evaluate(self, samples: int) -> dict[str, float]:
        """Shares of exact short answers about scenes in bags of words, of all and by kind of question."""
        device = next(self.model.parameters()).device
        exact: dict[str, list[bool]] = {"exact": []}
        for index in range(VALIDATION, VALIDATION + samples):
            told = told_scene(index, self.recipe.seed)
            bags, _ = self._bags(told.things, np.random.default_rng([self.recipe.seed, 95, index]))
            for question in told.questions[:QUESTIONS]:
                asked, answer = question.asked(short=True)
                one = self._told(LionTurn("vqa", asked, answer), bags)
                batch = {key: value.to(device) for key, value in self.collate([[one]]).items()}
                right = float(self.model(**batch)["token_accuracy"]) == 1.0
                for name in ("exact", question.kind):
                    exact.setdefault(name, []).append(right)
        return {f"validation_{name}": round(float(np.mean(found)), 4) for name, found in exact.items()}

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        save_part(folder, "t5", asdict(self.dims.language), state, "t5.", self.recipe.dtype)
        if folder != self.folder:
            _copy_tokenizers(self.folder, folder)


def _copy_tokenizers(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (TOKENIZER, "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    shutil.copytree(source / QUESTION, folder / QUESTION, dirs_exist_ok=True)
