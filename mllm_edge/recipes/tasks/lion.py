"""Recipe tasks `lion-stage1` to `lion-stage3`: LION's stages on scenes (Chen et al. 2024, section 3.4).

Stage 1 trains the Q-Former and the adapters of whole pictures on captions and questions, stage 2 the aggregator and the
adapters of regions on boxes both ways, stage 3 all of these with the router on both. EVA is frozen; so is the T5's
base, unless `data.base` says otherwise. A batch has one type of task, because the router is given one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mllm_edge.errors import BadInput
from mllm_edge.models.language.t5_parts import TASKS as TYPES
from mllm_edge.models.language.t5_parts import T5Reference, task_rows
from mllm_edge.models.lion.layouts import TAGS, save_lion
from mllm_edge.models.lion.model import CONFIGS, Lion, LionDims
from mllm_edge.models.lion.plan import preprocessing
from mllm_edge.models.lion.prompts import BOX, TASKS
from mllm_edge.models.resolve import resolve
from mllm_edge.recipes.data.conversation import IGNORE
from mllm_edge.recipes.data.lion_words import (
    PACKED,
    QUESTIONS,
    LionTurn,
    Words,
    one_of,
    prompted,
    tags_of,
    together,
    turns,
)
from mllm_edge.recipes.data.lion_words import TAGS as TAG_WORDS
from mllm_edge.recipes.data.mixture import wide_share
from mllm_edge.recipes.data.scene_pixels import drawn
from mllm_edge.recipes.modules import t5_groups
from mllm_edge.recipes.parts import part_folder, read_part
from mllm_edge.recipes.recipe import Recipe
from mllm_edge.recipes.tasks.lion_language import alike, answer_sums, answer_tensors, mean_losses, padded
from mllm_edge.runtime.boxes import box_iou
from mllm_edge.runtime.preprocess import preprocess
from mllm_edge.scenes import mixed_scene

STAGES = {1: ("caption", "vqa"), 2: ("rec", "reg"), 3: tuple(TASKS)}
ALWAYS = {"vqa": "caption", "rec": "reg"}  # a task of the same type for scenes that allow no question of the first
UNTAGGED, MISTAGGED = 0.1, 0.04  # shares of right tags that a prompt in training lacks, of wrong ones that it has


@dataclass(frozen=True)
class Asked:
    """A picture with questions of one type of task, as ids."""

    pixels: np.ndarray[Any, np.dtype[np.float32]]
    heard: list[list[int]]  # what the Q-Former reads
    prompts: list[list[int]]
    answers: list[list[int]]
    weights: list[list[float]]
    kind: int


class LionModel(nn.Module):
    """LION with its loss: cross-entropy on the answer."""

    def __init__(self, lion: Lion, soft: int):
        super().__init__()
        self.lion, self.soft = lion, soft

    def forward(
        self,
        pixel_values: Tensor,
        owners: Tensor,
        heard: Tensor,
        prompt: Tensor,
        answer: Tensor,
        labels: Tensor,
        weights: Tensor,
        task: Tensor,
    ) -> dict[str, Tensor]:
        """`pixel_values` [P,3,S,S]; n questions: `owners` int64 [n] (their pictures), `heard` [n,L'], `prompt` [n,L]
        padded with 0, and `answer_tensors`; `task` float [2]."""
        with torch.no_grad():
            taps = self.lion.vision_encoder(pixel_values)
        rows = []
        if "query" in self.lion.dims.levels:
            rows.append(self.lion.queries(taps[0][owners], heard))
        if "region" in self.lion.dims.levels:
            rows.append(self.lion.aggregator(*taps)[owners])
        visual, text = torch.cat(rows, dim=1).float(), self.lion.embed(prompt, self.soft)
        asked, said = (prompt != 0).sum(dim=1), (labels != IGNORE).sum(dim=1)
        sums = []
        for part in alike(asked, said):
            length, end = int(asked[part].max()), int(said[part].max())
            mask = (prompt[part, :length] != 0).float()
            logits = self.lion(visual[part], text[part, :length], mask, answer[part, :end], task)
            sums.append(answer_sums(logits, labels[part, :end], weights[part, :end]))
        return mean_losses(sums)


class LionTask:
    """One stage; `init.lion` is a LION checkpoint or the name of a shipped one. Without it `init.vision_encoder` and
    `init.t5` begin anew, with the `init.connectors` of lion-align. `init.tagger` is not trained here."""

    def __init__(self, recipe: Recipe, stage: int):
        torch.manual_seed(recipe.seed)
        self.recipe, self.stage = recipe, stage
        self.wide = wide_share(recipe.data)
        self.tagged = bool(recipe.data.get("tags", True))
        self.packed = float(recipe.data.get("packed", PACKED))
        lion, self.texts, self.tagger = self._start()
        self.dims = lion.dims
        self.words = Words(self.texts)
        self.model = LionModel(lion, self.words.soft)
        self._freeze(lion, bool(recipe.data.get("base", False)))

    def _start(self) -> tuple[Lion, Path, dict[str, Tensor]]:
        """The model, the folder of its tokenizers, and the tagger, which is not trained here."""
        init = self.recipe.init
        if init.get("lion"):
            held = resolve("lion", init["lion"])
            lion = Lion(held.dims)
            lion.load_state_dict({name: held.tensors[name].float() for name in lion.state_dict()})
            if init.get("tagger"):
                return lion, held.tokenizer, self._tagger(init["tagger"])
            self.tags = held.tokenizer / TAGS
            tagger = {name: held.tensors[name].float() for name in held.tensors if name.startswith("tagger.")}
            return lion, held.tokenizer, tagger
        missing = [part for part in ("vision_encoder", "t5", "tagger") if not init.get(part)]
        if missing:
            raise BadInput(
                f"the recipe's init names no {missing[0]}; add init.{missing[0]}=FOLDER, or init.lion=FOLDER"
            )
        lion = Lion(self._dims())
        lion.vision_encoder.load_state_dict(read_part(init["vision_encoder"], "vision_encoder"))
        lost = lion.language_model.load_state_dict(read_part(init["t5"], "t5"), strict=False)
        if lost.unexpected_keys or any(".adapter." not in name for name in lost.missing_keys):
            raise BadInput(f"{init['t5']} holds no T5 of config {self.recipe.config}; train lion-language for it")
        if init.get("connectors"):
            aligned, own = read_part(init["connectors"], "connectors"), lion.state_dict()
            lion.load_state_dict({name: tensor for name, tensor in aligned.items() if name in own}, strict=False)
        return lion, part_folder(init["t5"]), self._tagger(init["tagger"])

    def _tagger(self, folder: str) -> dict[str, Tensor]:
        self.tags = part_folder(folder) / TAGS
        return {f"tagger.{name}": tensor for name, tensor in read_part(folder, "tagger").items()}

    def _dims(self) -> LionDims:
        """The config's, less what `data.levels` and `data.router` take from it for an ablation."""
        dims = CONFIGS[self.recipe.config]
        levels = tuple(self.recipe.data.get("levels", dims.levels))
        adapters = 2 if self.recipe.data.get("router", True) else 1
        return replace(dims, levels=levels, language=replace(dims.language, adapters=adapters))

    def _freeze(self, lion: Lion, base: bool) -> None:
        lion.requires_grad_(False)
        lion.language_model.requires_grad_(base)
        learns = {1: ("queries.", ".adapters.1."), 2: ("aggregator.", ".adapters.0."), 3: ()}[self.stage]
        alone = lion.dims.language.adapters == 1
        for name, parameter in lion.named_parameters():
            adapter = ".adapter." in name
            if self.stage == 3 or (adapter and alone):
                chosen = adapter or name.startswith(("queries.", "aggregator.", "soft_prompt"))
            else:
                chosen = any(part in name for part in learns)
            if adapter or chosen:
                parameter.requires_grad_(chosen)

    def parameters(self) -> list[dict[str, Any]]:
        return t5_groups(self.model.named_parameters(), self.recipe.lr, self.dims.language.head_width)

    def task(self, index: int) -> str:
        """The task of sample `index`; those of one optimizer step have one type."""
        chosen = one_of(STAGES[self.stage], np.random.default_rng([self.recipe.seed, 97, index // self.recipe.batch]))
        own = [task for task in STAGES[self.stage] if TASKS[task] == TASKS[chosen]]
        return one_of(own, np.random.default_rng([self.recipe.seed, 98, index]))

    def sample(self, index: int, split: str = "train", task: str = "", wide: float | None = None) -> Asked:
        rng = np.random.default_rng([self.recipe.seed, 99, index])
        scene = mixed_scene(split, index, self.recipe.seed, self.wide if wide is None else wide)
        task = task or self.task(index)
        tags = tags_of(scene) if split != "train" else self._mistaken(tags_of(scene), rng)
        pack = split == "train" and task != "caption" and rng.random() < self.packed
        many = QUESTIONS if pack else 1
        asked = turns(scene, task, rng, many) or turns(scene, ALWAYS[task], rng, many)
        asked = together(asked, rng) if pack else asked
        pixels = preprocess(drawn(scene, self.dims.vision.image_size), preprocessing(self.dims)[0])[0]
        return self._asked(pixels, asked, tags if self.tagged else None)

    def _mistaken(self, tags: Sequence[str], rng: np.random.Generator) -> list[str]:
        """Tags as a tagger may find them."""
        kept = {True: 1 - UNTAGGED, False: MISTAGGED}
        return [tag for tag in TAG_WORDS if rng.random() < kept[tag in tags]]

    def _asked(self, pixels: Any, asked: Sequence[LionTurn], tags: list[str] | None) -> Asked:
        answers = [self.words.answer(turn.answer) for turn in asked]
        return Asked(
            pixels,
            [self.words.question(turn.question, self.dims.question_length) for turn in asked],
            [self.words.prompt(prompted(turn.question, tags)) for turn in asked],
            answers,
            [self.words.weights(ids, turn.count) for ids, turn in zip(answers, asked, strict=True)],
            TASKS[asked[0].task],
        )

    def collate(self, samples: Sequence[Asked]) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.from_numpy(np.stack([one.pixels for one in samples])),
            "owners": torch.tensor([number for number, one in enumerate(samples) for _ in one.prompts]),
            "heard": torch.tensor([ids for one in samples for ids in one.heard]),
            "prompt": padded([ids for one in samples for ids in one.prompts], 0),
            **answer_tensors(
                [ids for one in samples for ids in one.answers], [row for one in samples for row in one.weights]
            ),
            "task": torch.eye(TYPES)[samples[0].kind],
        }

    @torch.no_grad()
    def evaluate(self, samples: int) -> dict[str, float]:
        """On validation scenes, greedy: exact answers to a question, and boxes whose IoU is above 0.5 and 0.75."""
        metrics: dict[str, float] = {}
        for wide in (0.0, 1.0) if self.wide else (0.0,):
            form = "wide_" if wide else ""
            for task in STAGES[self.stage]:
                right = [self._score(index, task, wide) for index in range(samples)]
                found = {f"{task}_exact": [exact for exact, _ in right]}
                if task == "rec":
                    found = {f"rec_{least}": [iou >= least for _, iou in right] for least in (0.5, 0.75)}
                metrics |= {f"{form}validation_{name}": round(float(np.mean(v)), 4) for name, v in found.items()}
        return metrics

    def _score(self, index: int, task: str, wide: float) -> tuple[bool, float]:
        one = self.sample(index, "validation", task, wide)
        lion, device = self.model.lion, next(self.model.parameters()).device
        pixels, heard = torch.from_numpy(one.pixels)[None].to(device), torch.tensor([one.heard[0]], device=device)
        text = lion.embed(torch.tensor([one.prompts[0]], device=device), self.words.soft)
        rows = torch.cat([lion.look(pixels, heard), text], dim=1)[0].float().cpu().numpy()
        if self.dims.language.bottleneck:
            rows = np.concatenate([task_rows(self.dims.language)[one.kind], rows])
        said = self.words.text(T5Reference(lion.language_model).generate(rows, 64, lambda token: token == 1))
        wanted = self.words.text(one.answers[0])
        return said == wanted, spoken_iou(said, wanted)

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        names = {name.removeprefix("lion."): tensor for name, tensor in state.items()}
        dtype = getattr(torch, self.recipe.dtype)
        save_lion(folder / "checkpoint", self.recipe.config, self.dims, {**names, **self.tagger}, self.texts, dtype)
        shutil.copy(self.tags, folder / "checkpoint" / TAGS)


def spoken_iou(said: str, wanted: str) -> float:
    """IoU of the first boxes of two texts, 0 where one has none."""

    found = [re.search(BOX.pattern, text) for text in (said, wanted)]
    if not all(found):
        return 0.0
    try:
        a, b = ([float(number) for number in match.groups()] for match in found if match)
    except ValueError:
        return 0.0
    return box_iou(a, b)
