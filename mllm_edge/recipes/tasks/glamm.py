"""Recipe task `glamm`: fine-tunes LLaVA to ground phrases in masks (groundingLMM train.py).

Trained are the decoder's LoRA, its embeddings and head, the projection, the mask decoder and the region encoder; CLIP,
the connector and SAM's encoders are frozen. Every optimizer step has one kind of question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mllm_edge.errors import BadInput
from mllm_edge.models.glamm.model import ADDED, CONFIGS, Glamm, GlammDims, tensor_shapes
from mllm_edge.models.glamm.plan import preprocessing
from mllm_edge.models.glamm.prompts import BOX, PROMPT, SEG
from mllm_edge.models.resolve import resolve
from mllm_edge.recipes.data.conversation import (
    Sample,
    Vocabulary,
    encode_dialogue,
    final_states,
    labelled,
    pad,
    share_prefix,
    token_loss,
    visibility,
)
from mllm_edge.recipes.data.grounded import KINDS, GroundedTurn, caption_turns, region_turns, segment_turns
from mllm_edge.recipes.data.grounded_files import GroundedFiles
from mllm_edge.recipes.data.mixture import wide_share
from mllm_edge.recipes.data.scene_pixels import drawn
from mllm_edge.recipes.data.scene_turns import single_turns
from mllm_edge.recipes.data.vocabulary import read_vocabulary
from mllm_edge.recipes.losses import bce_loss, dice_loss, mean_iou, upscaled
from mllm_edge.recipes.modules import add_lora, decaying, plain_attention
from mllm_edge.recipes.parts import read_part
from mllm_edge.recipes.recipe import Recipe
from mllm_edge.recipes.tasks.sam import starting_sam
from mllm_edge.runtime.preprocess import preprocess
from mllm_edge.scenes import Scene, mixed_scene

SHARES = {"chat": 0.15, "region": 0.40, "segment": 0.45}  # of the optimizer steps, as in the original
WEIGHTS = {"ce": 1.0, "bce": 2.0, "dice": 0.5}
DIALOGUES = 0.15  # share of pictures whose turns form one conversation
LIMIT = 1536  # most ids of a sample
TURNS = 8  # per picture; with segments, `CAPTIONS` of them are grounded captions
CAPTIONS = 2
SEVERAL = 3  # least number of objects in the scenes that `data.several` asks for
FROZEN = ("vision_encoder", "connector", "mask_encoder", "mask_head.prompt_encoder")


@dataclass(frozen=True)
class GlammSample:
    """A picture with its ids, the masks (in SAM's frame) and boxes that its tokens stand for, in order."""

    sample: Sample
    picture: Image.Image
    masks: list[np.ndarray[Any, np.dtype[np.bool_]]] = field(default_factory=list)
    boxes: list[tuple[float, ...]] = field(default_factory=list)


class GlammModel(nn.Module):
    """GLaMM with its loss: cross-entropy on the assistant's text, BCE and Dice on the masks."""

    def __init__(self, glamm: Glamm):
        super().__init__()
        self.glamm = glamm
        self.seg, self.box = (glamm.glamm_dims.added_id(token) for token in (SEG, BOX))

    def forward(
        self,
        ids: Tensor,
        labels: Tensor,
        mask: Tensor,
        pixel_values: Tensor,
        branches: Tensor | None = None,
        positions: Tensor | None = None,
        boxes: Tensor | None = None,
        box_owners: Tensor | None = None,
        mask_pixel_values: Tensor | None = None,
        masks: Tensor | None = None,
        mask_owners: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`boxes` [m,4] and `masks` [n,S,S] are in the order of the ids; `*_owners` give their pictures' indices."""
        glamm = self.glamm
        features, levels = glamm.vision_encoder(pixel_values)  # [P,N,Dv], [P,4,N,Dv]
        embeds = glamm.splice(ids, glamm.connector(features))  # [B,T,D]
        if boxes is not None:
            regions = glamm.region_encoder(levels, boxes, box_owners)  # [m,D]
            embeds = embeds.masked_scatter((ids == self.box).unsqueeze(-1), regions.to(embeds.dtype))
        states = final_states(glamm.language_model, embeds, visibility(mask, branches), positions)  # [B,T,D]
        result = token_loss(glamm.language_model, states, labels)
        if masks is None or mask_pixel_values is None:
            return result
        predicting, truths = labelled(states, labels)  # [k,D], [k]
        embedding = glamm.mask_encoder(mask_pixel_values)[mask_owners]  # [n,C,G,G]
        logits = upscaled(glamm.mask_head(embedding, predicting[truths == self.seg]), masks.shape[-1])  # [n,S,S]
        truth = masks.float()
        bce, dice = bce_loss(logits, truth), dice_loss(logits, truth)
        loss = WEIGHTS["ce"] * result["loss"] + WEIGHTS["bce"] * bce + WEIGHTS["dice"] * dice
        return {**result, "loss": loss, "iou": mean_iou(logits, truth)}


class GlammTask:
    """Fine-tune GLaMM of `recipe.config` from LLaVA and SAM, on scenes or on files like RefCOCO's and GranD-f's."""

    def __init__(self, recipe: Recipe):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.dims: GlammDims = CONFIGS[recipe.config]
        self.files = GroundedFiles.from_recipe(recipe.data)
        self.shares = _shares(recipe.data.get("shares", SHARES), self.files)
        self.turns = int(recipe.data.get("turns", TURNS)), int(recipe.data.get("captions", CAPTIONS))
        self.wide = wide_share(recipe.data)
        self.several = float(recipe.data.get("several", 0.0))
        tensors, self.tokenizer = starting_parts(recipe, self.dims)
        known = read_vocabulary(self.tokenizer)
        added = {token: self.dims.added_id(token) for token in ADDED}
        self.vocabulary = Vocabulary(known.encode, known.specials, known.bos, known.pad, added)
        self.model = GlammModel(self._assemble(tensors))

    def _assemble(self, tensors: dict[str, Tensor]) -> Glamm:
        glamm = Glamm(self.dims)
        plain_attention(glamm.language_model)
        missing, unknown = glamm.load_state_dict(tensors, strict=False)
        learned = ("region_encoder.", "mask_head.projection.")  # randomly initialized
        lacking = [name for name in missing if not name.startswith(learned)]
        if unknown or lacking:
            raise BadInput(f"the parts do not make a GLaMM of config {self.recipe.config}: {(lacking or unknown)[0]}")
        for part in FROZEN:
            glamm.get_submodule(part).requires_grad_(part == "connector" and self.recipe.connector_lr > 0)
        if self.recipe.lora is not None:
            glamm.language_model = add_lora(glamm.language_model, self.recipe.lora)
            for module in (glamm.language_model.get_input_embeddings(), glamm.language_model.get_output_embeddings()):
                module.requires_grad_(True)
        return glamm

    def parameters(self) -> list[dict[str, Any]]:
        connector = set(self.model.glamm.connector.parameters())
        others = [p for p in self.model.parameters() if p not in connector]
        return [*decaying(others), *decaying(connector, self.recipe.connector_lr)]

    def kind(self, index: int) -> str:
        """The kind of question in the optimizer step of sample `index`."""
        rng = np.random.default_rng([self.recipe.seed, 43, index // self.recipe.batch])
        return str(rng.choice(KINDS, p=[self.shares[kind] for kind in KINDS]))

    def sample(self, index: int) -> GlammSample:
        rng = np.random.default_rng([self.recipe.seed, 47, index])
        kind = self.kind(index)
        if self.files is not None:
            return self.encode(*self.files.draw(kind, rng, self.dims), dialogue=True)
        return self.encode(*self.scene_turns("train", index, kind, rng), dialogue=rng.random() < DIALOGUES)

    def scene_turns(
        self, split: str, index: int, kind: str, rng: np.random.Generator, wide: float = 0.0
    ) -> tuple[Image.Image, list[GroundedTurn]]:
        """A scene's picture and turns of one kind about it; of other splits than "train" a wide one or not."""
        scene = self._scene(index, rng) if split == "train" else mixed_scene(split, index, self.recipe.seed, wide)
        size = self.dims.mask_encoder.image_size
        picture = drawn(scene, size)
        if kind == "region":
            return picture, region_turns(scene, rng, size)
        if kind == "caption":
            return picture, caption_turns(scene, rng, self.turns[1])
        if kind == "segment":
            return picture, segment_turns(scene, rng, *self.turns, size)
        turns = single_turns(scene, rng, self.turns[0], colors=True)
        return picture, [GroundedTurn(question.removeprefix("<image>\n"), answer) for question, answer in turns]

    def _scene(self, index: int, rng: np.random.Generator) -> Scene:
        """One of this sample's own four scenes; with probability `data.several` the first with several objects."""
        scenes = [mixed_scene("train", 4 * index + offset, self.recipe.seed, self.wide) for offset in range(4)]
        if rng.random() < self.several:
            return next((scene for scene in scenes if len(scene.objects) >= SEVERAL), scenes[0])
        return scenes[0]

    def encode(self, picture: Image.Image, turns: list[GroundedTurn], dialogue: bool) -> GlammSample:
        """Turns about a picture as one conversation, or each as a branch on its own."""
        if dialogue:
            sample = self._dialogue(turns)
        else:
            sample = share_prefix([self._dialogue([turn]) for turn in turns], apart=self.vocabulary.added[BOX])
        masks = [mask for turn in turns for mask in turn.masks]
        boxes = [box for turn in turns for box in turn.boxes]
        # A conversation that was truncated, or could not be masked, has fewer.
        masks = masks[: sample.labels.count(self.vocabulary.added[SEG])]
        return GlammSample(sample, picture, masks, boxes[: sample.ids.count(self.vocabulary.added[BOX])])

    def _dialogue(self, turns: Sequence[GroundedTurn]) -> Sample:
        prompt = PROMPT
        (slot,) = prompt.slots_of("pixels")
        shown = slot.joint.replace(slot.placeholder, slot.open + slot.placeholder + slot.close)
        pairs = [(turn.question, turn.answer) for turn in turns]
        pairs[0] = (shown + pairs[0][0], pairs[0][1])
        return encode_dialogue(prompt, pairs, self.vocabulary, self.dims.llava.image_tokens, LIMIT)

    def collate(self, samples: Sequence[GlammSample]) -> dict[str, Tensor]:
        clip, sam = preprocessing(self.dims)
        batch = pad([one.sample for one in samples], self.vocabulary.pad)
        batch["pixel_values"] = torch.from_numpy(np.concatenate([preprocess(one.picture, clip) for one in samples]))
        boxes = [box for one in samples for box in one.boxes]
        if boxes:
            batch["boxes"] = torch.tensor(boxes, dtype=torch.float32)
            batch["box_owners"] = torch.tensor([i for i, one in enumerate(samples) for _ in one.boxes])
        masks = [mask for one in samples for mask in one.masks]
        if masks:
            pixels = np.concatenate([preprocess(one.picture, sam) for one in samples])
            batch["mask_pixel_values"] = torch.from_numpy(pixels)
            batch["masks"] = torch.from_numpy(np.stack(masks))
            batch["mask_owners"] = torch.tensor([i for i, one in enumerate(samples) for _ in one.masks])
        return batch

    @torch.no_grad()
    def evaluate(self, samples: int) -> dict[str, float]:
        """On validation scenes, teacher-forced: the share of answers to region questions whose every token is the most
        likely one, and the mean IoU of masks."""
        metrics: dict[str, float] = {}
        for wide in (0.0, 1.0) if self.wide else (0.0,):
            form = "wide_" if wide else ""
            metrics |= {f"{form}{name}": value for name, value in self._scores(samples, wide).items()}
        return metrics

    def _scores(self, samples: int, wide: float) -> dict[str, float]:
        device = next(self.model.parameters()).device
        exact, ious = [], []
        for index in range(samples):
            rng = np.random.default_rng([self.recipe.seed, 53, index])
            for kind in ("region", "segment"):
                picture, turns = self.scene_turns("validation", index, kind, rng, wide)
                batch = self.collate([self.encode(picture, turns[:1] if kind == "region" else turns, dialogue=False)])
                result = self.model(**{name: value.to(device) for name, value in batch.items()})
                if kind == "region":
                    exact.append(float(result["token_accuracy"]) == 1.0)
                else:
                    ious.append(float(result["iou"]))
        return {
            "validation_region_exact": round(float(np.mean(exact)), 4),
            "validation_mask_iou": round(float(np.mean(ious)), 4),
        }

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        from mllm_edge.models.glamm.layouts import save_glamm

        if self.recipe.lora is not None:
            self.model.glamm.language_model = self.model.glamm.language_model.merge_and_unload()
            state = self.model.state_dict()
        names = {name.removeprefix("glamm."): tensor for name, tensor in state.items()}
        dtype = getattr(torch, self.recipe.dtype)
        save_glamm(folder / "checkpoint", self.recipe.config, self.dims, names, self.tokenizer, dtype)


def starting_parts(recipe: Recipe, dims: GlammDims) -> tuple[dict[str, Tensor], Path]:
    """The initial tensors, and the folder of the tokenizer.

    `init.glamm` is a GLaMM checkpoint. Otherwise `init.llava` is the name of a shipped LLaVA or any LLaVA checkpoint,
    whose embedding and head get rows for the added tokens, and `init.sam` the folder of a run of `sam-pretrain` or a
    file in SAM's own layout. `init.sam`, `init.vision_encoder` and `init.connector` replace those parts of a GLaMM.

    Raises:
        BadInput: a part is missing, or not of these dims.
    """
    if recipe.init.get("glamm"):
        tensors, tokenizer = _whole(recipe, dims)
    else:
        tensors, tokenizer = _from_llava(recipe)
    if recipe.init.get("sam") or not recipe.init.get("glamm"):
        tensors |= starting_sam(recipe, dims)
    for part in ("vision_encoder", "connector"):
        if recipe.init.get(part):
            tensors |= {f"{part}.{name}": tensor for name, tensor in read_part(recipe.init[part], part).items()}
    return tensors, tokenizer


def _whole(recipe: Recipe, dims: GlammDims) -> tuple[dict[str, Tensor], Path]:
    if recipe.init.get("llava"):
        raise BadInput("init names both a GLaMM and a LLaVA; to begin at the LLaVA say init.glamm=")
    source = resolve("glamm", recipe.init["glamm"])
    if source.dims != dims:
        raise BadInput(f"{recipe.init['glamm']} is not of config {recipe.config}; give a checkpoint of it")
    return {name: source.tensors[name].float() for name in tensor_shapes(dims)}, source.tokenizer


def _from_llava(recipe: Recipe) -> tuple[dict[str, Tensor], Path]:
    from mllm_edge.models.llava import model as llava

    if not recipe.init.get("llava"):
        raise BadInput("the recipe's init names no llava; add init.llava=PATH")
    checkpoint = resolve("llava", recipe.init["llava"])
    tensors = {name: checkpoint.tensors[name].float() for name in llava.tensor_shapes(checkpoint.dims)}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = tensors[f"language_model.{name}"]
        fresh = torch.randn(len(ADDED), table.shape[1]) * table.std(dim=0) + table.mean(dim=0)
        tensors[f"language_model.{name}"] = torch.cat([table, fresh])
    return tensors, checkpoint.tokenizer


def _shares(shares: dict[str, float], files: GroundedFiles | None) -> dict[str, float]:
    """Shares of the kinds that there is data for, normalized to sum 1."""
    unknown = set(shares) - set(KINDS)
    if unknown:
        raise BadInput(f"data.shares has {', '.join(sorted(unknown))}; it can have {', '.join(KINDS)}")
    kinds = KINDS if files is None else files.kinds
    kept = {kind: float(shares.get(kind, 0.0)) if kind in kinds else 0.0 for kind in KINDS}
    total = sum(kept.values())
    if total <= 0:
        raise BadInput(f"data.shares leaves nothing to train on; there is data for {', '.join(kinds)}")
    return {kind: share / total for kind, share in kept.items()}
