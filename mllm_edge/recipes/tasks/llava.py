"""Recipe tasks `llava-pretrain` (connector only) and `llava-finetune` (connector and decoder, or LoRA).

The two stages of the paper. The vision encoder stays frozen in both, as in the original scripts.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mllm_edge.errors import BadInput, first_line
from mllm_edge.models.blocks.connectors import RESAMPLERS
from mllm_edge.models.llava import packaged as llava_packaged
from mllm_edge.models.llava.model import CONFIGS, IMAGE_INDEX, Llava, LlavaDims, tensor_shapes
from mllm_edge.models.llava.plan import preprocessing
from mllm_edge.models.llava.prompts import PROMPTS
from mllm_edge.models.plan import Checkpoint
from mllm_edge.models.resolve import resolve
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
from mllm_edge.recipes.data.pictures.compose import TrainingPictures
from mllm_edge.recipes.data.readers import Conversation, read_llava
from mllm_edge.recipes.data.scene_pixels import pixels, repaint
from mllm_edge.recipes.data.scene_turns import brief_turns, dialogue, single_turns
from mllm_edge.recipes.data.vocabulary import read_vocabulary
from mllm_edge.recipes.modules import add_lora, decaying, hide_channels, plain_attention, unit_variance
from mllm_edge.recipes.parts import PACKAGES, read_part, save_part, tokenizer_folder
from mllm_edge.recipes.recipe import Recipe
from mllm_edge.runtime.preprocess import preprocess
from mllm_edge.scenes import (
    Scene,
    draw_questions,
    mixed_scene,
    questions,
    recolor,
)

DIALOGUES = 0.15  # share of pictures with a conversation of several turns
REPAINTED = 0.15  # share of the others that are shown in unnamed colors
RECOLORED = 0.4  # share of those with some objects in named colors that drawn scenes do not have
LONE = 0.4  # share of the one-object scenes, which are learned early, that are kept
# Shares of the pictures without a conversation that get telegrams, and terse questions, instead of full questions.
BRIEF = {"pretrain": (0.6, 0.3), "finetune": (0.15, 0.25)}
WORD_SCALE = 2.0  # initial scale of a picture's embeddings relative to a word's: each holds several words


class LlavaModel(nn.Module):
    """LLaVA with its loss: cross-entropy on the assistant's text."""

    def __init__(self, llava: Llava, hidden: float = 0.0):
        super().__init__()
        self.llava = llava
        self.hidden = hidden

    def forward(
        self,
        ids: Tensor,
        labels: Tensor,
        mask: Tensor,
        pixel_values: Tensor,
        branches: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> dict[str, Tensor]:
        features = hide_channels(self.llava.vision_encoder(pixel_values), self.hidden, self.training)  # [P,N,Dv]
        embeds = self.llava.splice(ids, self.llava.connector(features))  # [B,T,D]
        return answer_loss(self.llava.language_model, embeds, visibility(mask, branches), positions, labels)


@torch.no_grad()
def start_connector(llava: Llava, pixel_values: Tensor) -> None:
    """Scale a fresh connector so that its outputs have `WORD_SCALE` times the standard deviation of word embeddings.

    With random initialization a picture's embeddings are many times as long as a word's, and the decoder's layers
    hardly change them.
    """
    words = llava.language_model.get_input_embeddings().weight.std()
    unit_variance(llava.connector, llava.vision_encoder(pixel_values), float(words) * WORD_SCALE)


def _starting_checkpoint(recipe: Recipe) -> Checkpoint | None:
    """The LLaVA that `init.llava` names: a shipped one, a folder or a hub id. Its dims are then the run's.

    Raises:
        BadInput: it is no LLaVA.
    """
    if "llava" not in recipe.init:
        return None
    start = resolve("llava", recipe.init["llava"])
    if start.prompt and (own := _own_prompt(start)) is not None:
        warnings.warn(
            f"{recipe.init['llava']} has a prompt of its own ({own}); it is trained, and then exported, with "
            f"{start.dims.template}",
            stacklevel=2,
        )
    return start


def _own_prompt(start: Checkpoint) -> str | None:
    """Where a checkpoint's prompt is from, or why it is not known, if it is not the one that it is trained with."""
    assert start.prompt
    try:
        prompt, origin = start.prompt()
    except BadInput as error:  # with advice for an export
        return str(error).split("; ")[0]
    return None if prompt == PROMPTS[start.dims.template] else origin


@functools.lru_cache(maxsize=1)
def _order(seed: int, epoch: int, number: int) -> list[int]:
    order: list[int] = np.random.default_rng([seed, 23, epoch]).permutation(number).tolist()
    return order


class LlavaTask:
    """Both stages of the paper; `stage` is "pretrain" or "finetune"."""

    def __init__(self, recipe: Recipe, stage: str):
        torch.manual_seed(recipe.seed)
        self.recipe, self.stage = recipe, stage
        self.start = _starting_checkpoint(recipe)
        self.dims: LlavaDims = self.start.dims if self.start else CONFIGS[recipe.config]
        self.anew = bool(recipe.connector or recipe.tokens)  # a connector that is named begins anew
        if self.anew:
            kind = recipe.connector or self.dims.connector
            merge = 1 if kind in RESAMPLERS else self.dims.merge
            self.dims = replace(self.dims, connector=kind, tokens=recipe.tokens, merge=merge)
        plain = stage == "pretrain" and "conversations" in recipe.data  # captions alone, as in LLaVA-1.5
        self.prompt = PROMPTS["plain" if plain else self.dims.template]
        self.turns = int(recipe.data.get("turns", 5))
        self.questions = int(recipe.data.get("questions", 8))
        self.wide = wide_share(recipe.data)
        self.on_packages = recipe.init.get("language_model") == PACKAGES
        self.tokenizer = self.start.tokenizer if self.start else tokenizer_folder(self._init("language_model"))
        self.vocabulary = read_vocabulary(self.tokenizer)
        self.conversations = self._read_conversations()
        self.pictures = TrainingPictures(recipe.data.get("grounds", ""))
        self.model = LlavaModel(self._assemble(), float(recipe.data.get("hidden_channels", 0.0)))

    def _init(self, part: str) -> str:
        if part not in self.recipe.init:
            raise BadInput(f"the recipe's init names no {part}; add init.{part}=FOLDER")
        return self.recipe.init[part]

    def _assemble(self) -> Llava:
        llava = Llava(self.dims)
        plain_attention(llava.language_model)
        llava.vision_encoder.load_state_dict(self._part("vision_encoder"))
        words = self._part("language_model")
        if self.dims.language.tied:
            words["lm_head.weight"] = words["model.embed_tokens.weight"]
        llava.language_model.load_state_dict(words)
        if self.recipe.init.get("connector") or (self.start and not self.anew):
            try:
                llava.connector.load_state_dict(self._part("connector"))
            except RuntimeError as error:
                reason = first_line(error)
                raise BadInput(f"init.connector is no {self.dims.connector} of this size ({reason})") from None
        else:
            start_connector(llava, torch.stack([torch.from_numpy(self._first_picture(i)) for i in range(64)]))
        llava.requires_grad_(False)
        llava.connector.requires_grad_(True)
        if self.stage == "finetune":
            if self.recipe.lora is None:
                llava.language_model.requires_grad_(True)
            else:
                llava.language_model = add_lora(llava.language_model, self.recipe.lora)
        return llava

    def _part(self, part: str) -> dict[str, Tensor]:
        """A part in fp32: of the folder that `init` names for it, else of the checkpoint `init.llava`."""
        if self.recipe.init.get(part) or self.start is None:
            return read_part(self._init(part), part)
        tensors, prefix = self.start.tensors, f"{part}."
        names = [name for name in tensor_shapes(self.dims) if name.startswith(prefix) and name in tensors]
        return {name.removeprefix(prefix): tensors[name].float() for name in names}

    def _read_conversations(self) -> list[Conversation]:
        if "conversations" not in self.recipe.data:
            return []
        return list(read_llava(Path(self.recipe.data["conversations"]), Path(self.recipe.data.get("images", "."))))

    def _first_picture(self, index: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        if self.conversations:
            return self._from_file(self._conversation(index), np.random.default_rng([self.recipe.seed, 31, index]))[1]
        return pixels(mixed_scene("train", index, self.recipe.seed, self.wide), self.dims)

    def parameters(self) -> list[dict[str, Any]]:
        llava = self.model.llava
        return [
            *decaying(llava.language_model.parameters(), self.recipe.lr),
            *decaying(llava.connector.parameters(), self.recipe.connector_lr or self.recipe.lr),
        ]

    def sample(self, index: int) -> tuple[Sample, np.ndarray[Any, np.dtype[np.float32]]]:
        rng = np.random.default_rng([self.recipe.seed, 17, index])
        if self.conversations:
            turns, pixel_values = self._from_file(self._conversation(index), rng)
        else:
            scene = self._scene(index, rng)
            if self.stage == "pretrain" or rng.random() > DIALOGUES:
                return self._asked(scene, rng)
            pixel_values, turns = pixels(scene, self.dims), dialogue(scene, rng, self.turns)
        return self._encode(turns), pixel_values

    def _conversation(self, index: int) -> Conversation:
        """Conversation number `index`: all of them once per epoch, in a different random order each."""
        epoch, place = divmod(index, len(self.conversations))
        return self.conversations[_order(self.recipe.seed, epoch, len(self.conversations))[place]]

    def _encode(self, turns: list[tuple[str, str]]) -> Sample:
        limit = self.dims.language.context
        return encode_dialogue(self.prompt, turns, self.vocabulary, self.dims.image_tokens, limit)

    def _scene(self, index: int, rng: np.random.Generator) -> Scene:
        """One of this sample's own four scenes; most of those with one object are skipped."""
        for number in range(4 * index, 4 * index + 4):
            scene = mixed_scene("train", number, self.recipe.seed, self.wide)
            if len(scene.objects) > 1 or rng.random() < LONE:
                break
        return scene

    def _asked(self, scene: Scene, rng: np.random.Generator) -> tuple[Sample, np.ndarray[Any, np.dtype[np.float32]]]:
        """Many questions about one picture, each on its own; some pictures are in unnamed colors, so that shapes are
        seen and not guessed from the color."""
        look = rng.random()
        repainted = look < REPAINTED
        if REPAINTED <= look < REPAINTED + RECOLORED:
            scene = recolor(scene, rng)
        picture = pixels(repaint(scene, rng) if repainted else scene, self.dims)
        telegrams, terse_questions = BRIEF[self.stage]
        form = rng.random()
        if form < telegrams + terse_questions:
            opening = [*self.vocabulary.start, *[IMAGE_INDEX] * self.dims.image_tokens]
            turns = brief_turns(scene, rng, colors=not repainted, telegrams=form < telegrams)
            return share_prefix([encode_brief(opening, *turn, self.vocabulary) for turn in turns]), picture
        turns = single_turns(scene, rng, self.questions, colors=not repainted)
        return share_prefix([self._encode([turn]) for turn in turns]), picture

    def _from_file(
        self, entry: Conversation, rng: np.random.Generator
    ) -> tuple[list[tuple[str, str]], np.ndarray[Any, np.dtype[np.float32]]]:
        """A user's own conversation. Text-only ones get a blank picture, whose embeddings no id refers to."""
        if entry.image is None:
            size = self.dims.vision.image_size
            return list(entry.turns), np.zeros((3, size, size), np.float32)
        turns = list(entry.turns)
        if self.stage == "pretrain":
            turns = [("<image>", turns[0][1])]
        return turns, preprocess(self.pictures.open(entry.image, rng), preprocessing(self.dims))[0]

    def collate(self, samples: Sequence[tuple[Sample, np.ndarray[Any, np.dtype[np.float32]]]]) -> dict[str, Tensor]:
        pictures = np.stack([picture for sample, picture in samples if min(sample.ids) < 0] or [samples[0][1]])
        batch = pad([sample for sample, _ in samples], self.vocabulary.pad)
        return {**batch, "pixel_values": torch.from_numpy(pictures)}

    @torch.no_grad()
    def evaluate(self, samples: int) -> dict[str, float]:
        """Share of short answers that are exact (teacher-forced: every token of the answer is the most likely)."""
        sets = [(wide, split) for wide in (0.0, 1.0)[: 1 + bool(self.wide)] for split in ("validation", "held_out")]
        return {
            f"{'wide_' if wide else ''}{split}_exact": round(
                sum(self._is_exact(split, index, wide) for index in range(samples)) / samples, 4
            )
            for wide, split in sets
        }

    def _is_exact(self, split: str, index: int, wide: float) -> bool:
        scene = mixed_scene(split, index, self.recipe.seed, wide)
        rng = np.random.default_rng([self.recipe.seed, 19, index])
        question, answer = draw_questions(questions(scene, rng), rng, 1)[0].asked(short=True)
        turns = [("<image>\n" + question, answer)]
        prompt = PROMPTS[self.dims.template]
        sample = encode_dialogue(prompt, turns, self.vocabulary, self.dims.image_tokens, 4096)
        device = next(self.model.parameters()).device
        batch = {k: v.to(device) for k, v in self.collate([(sample, pixels(scene, self.dims))]).items()}
        return bool(self.model(**batch)["token_accuracy"] == 1.0)

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        connector = {name: tensor for name, tensor in state.items() if name.startswith("llava.connector.")}
        save_part(folder, "connector", {"kind": self.dims.connector}, connector, "llava.connector.", self.recipe.dtype)
        if self.stage == "finetune":
            self._save_whole(folder, state)

    def _save_whole(self, folder: Path, state: dict[str, Tensor]) -> None:
        from mllm_edge.models.llava.layouts import save_llava, save_on_packages

        dtype = getattr(torch, self.recipe.dtype)
        checkpoint = folder / "checkpoint"
        if self.recipe.lora is not None:
            decoder = self.model.llava.language_model
            adapter = checkpoint / llava_packaged.ADAPTER  # small; `checkpoint` has it merged or beside it
            lora = {name: tensor.to(dtype) for name, tensor in decoder.state_dict().items() if "lora_" in name}
            decoder.save_pretrained(adapter, state_dict=lora)
            (adapter / "README.md").unlink(missing_ok=True)  # peft's unfilled model card template
            if not self.on_packages:
                self.model.llava.language_model = decoder.merge_and_unload()
                state = self.model.state_dict()
        names = {name.removeprefix("llava."): tensor.detach().cpu() for name, tensor in state.items()}
        if self.on_packages:
            connector = {name: tensor for name, tensor in names.items() if name.startswith("connector.")}
            save_on_packages(checkpoint, self.recipe.config, self.dims, connector, dtype)
            return
        save_llava(checkpoint, self.recipe.config, self.dims, names, self.tokenizer, dtype)
