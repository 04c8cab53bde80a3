"""Recipe task `sam`: trains the small SAM to segment the object at a point or in a box; GLaMM starts from it.

As in SAM's own training (Kirillov et al. 2023, section 5) a picture is encoded once and decoded for many prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.sam import SamImageEncoder
from mllm_edge.models.blocks.sam_decoder import MaskDecoder, PromptEncoder
from mllm_edge.models.glamm.model import CONFIGS, GlammDims, tensor_shapes
from mllm_edge.models.glamm.plan import preprocessing
from mllm_edge.models.resolve import resolve
from mllm_edge.recipes.data.mixture import wide_share
from mllm_edge.recipes.data.scene_pixels import drawn, repaint, square_masks
from mllm_edge.recipes.losses import bce_loss, dice_loss, mean_iou, upscaled
from mllm_edge.recipes.modules import decaying
from mllm_edge.recipes.parts import save_part
from mllm_edge.recipes.recipe import Recipe
from mllm_edge.runtime.preprocess import preprocess
from mllm_edge.scenes import Scene, mixed_scene

PROMPTS = 4  # per picture: half of them points, half boxes
REPAINTED = 0.5  # share of pictures in unnamed colors
JITTER = 0.1  # random shift of a box's sides, relative to its size
WEIGHTS = {"bce": 2.0, "dice": 0.5}  # as in GLaMM, which starts from this model

Sample = dict[str, np.ndarray[Any, Any]]


def mask_pixels(scene: Scene, dims: GlammDims) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The scene's pixels for the mask encoder, by the runtime's own preprocessing: float32 [3,S,S]."""
    return preprocess(drawn(scene, dims.mask_encoder.image_size), preprocessing(dims)[1])[0]


class SamModel(nn.Module):
    """Encoder, prompt encoder and mask decoder with their loss."""

    def __init__(self, dims: GlammDims):
        super().__init__()
        self.mask_encoder = SamImageEncoder(dims.mask_encoder)
        self.prompt_encoder = PromptEncoder(dims.mask_decoder)
        self.mask_decoder = MaskDecoder(dims.mask_decoder)

    def forward(self, pixel_values: Tensor, points: Tensor, boxes: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """`pixel_values` [B,3,S,S], `points` [B,P,2] and `boxes` [B,Q,4] in 0..1, `masks` [B,P+Q,S,S] of 0 and 1."""
        ask = self.prompt_encoder
        prompts = torch.cat([_each(ask.points, points), _each(ask.boxes, boxes)], dim=1)  # [B,P+Q,2,C]
        # n = B * (P+Q)
        embedding = self.mask_encoder(pixel_values).repeat_interleave(prompts.shape[1], dim=0)  # [n,C,G,G]
        logits = upscaled(self.mask_decoder(embedding, prompts.flatten(0, 1), ask), masks.shape[-1])
        truth = masks.flatten(0, 1).float()  # [n,S,S], as logits
        bce, dice = bce_loss(logits, truth), dice_loss(logits, truth)
        by_point = (torch.arange(len(truth), device=truth.device) % prompts.shape[1]) < points.shape[1]
        return {
            "loss": WEIGHTS["bce"] * bce + WEIGHTS["dice"] * dice,
            "point_iou": mean_iou(logits[by_point], truth[by_point]),
            "box_iou": mean_iou(logits[~by_point], truth[~by_point]),
        }


def starting_sam(recipe: Recipe, dims: GlammDims) -> dict[str, Tensor]:
    """SAM in fp32 under GLaMM's names: `init.sam`, the folder of a run or a file in SAM's own layout, else the SAM in
    the GLaMM that `init.glamm` names.

    Raises:
        BadInput: there is neither, or its shapes are not those of `dims`.
    """
    from mllm_edge.models.glamm.layouts import read_sam

    if recipe.init.get("sam"):
        tensors = read_sam(Path(recipe.init["sam"]))
    elif recipe.init.get("glamm"):
        source = resolve("glamm", recipe.init["glamm"])
        parts = ("mask_encoder.", "mask_head.mask_decoder.", "mask_head.prompt_encoder.")
        tensors = {name: source.tensors[name].float() for name in source.tensors if name.startswith(parts)}
    else:
        raise BadInput("the recipe's init names no sam; add init.sam=PATH")
    shapes = tensor_shapes(dims)
    for name, tensor in tensors.items():
        if shapes.get(name) != tuple(tensor.shape):
            raise BadInput(f"{name} of init is not that of config {recipe.config}; give a SAM of that size")
    return tensors


def _each(embed: Callable[[Tensor], Tensor], places: Tensor) -> Tensor:
    """Apply `embed` to places [B,n,x]: -> [B,n,2,C]."""
    return embed(places.flatten(0, 1)).reshape(*places.shape[:2], 2, -1)


class SamTask:
    """Train SAM of `recipe.config` on scenes."""

    def __init__(self, recipe: Recipe):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.dims = CONFIGS[recipe.config]
        self.wide = wide_share(recipe.data)
        self.model = SamModel(self.dims)
        if recipe.init:
            self._load(starting_sam(recipe, self.dims))

    def _load(self, tensors: dict[str, Tensor]) -> None:
        missing, unknown = self.model.load_state_dict(
            {name.removeprefix("mask_head."): tensor for name, tensor in tensors.items()}, strict=False
        )
        if missing or unknown:
            raise BadInput(f"init is no SAM of config {self.recipe.config}: {(missing or unknown)[0]}")

    def parameters(self) -> list[dict[str, Any]]:
        return decaying(self.model.parameters())

    def sample(self, index: int, split: str = "train", wide: float | None = None) -> Sample:
        rng = np.random.default_rng([self.recipe.seed, 41, index])
        scene = mixed_scene(split, index, self.recipe.seed, self.wide if wide is None else wide)
        visible = square_masks(scene, self.dims.mask_encoder.image_size, centered=False)
        if split == "train" and rng.random() < REPAINTED:
            scene = repaint(scene, rng)
        chosen = visible[rng.integers(len(visible), size=PROMPTS)]
        return {
            "pixel_values": mask_pixels(scene, self.dims),
            "points": np.stack([_point(mask, rng) for mask in chosen[: PROMPTS // 2]]),
            "boxes": np.stack([_box(mask, rng) for mask in chosen[PROMPTS // 2 :]]),
            "masks": chosen,
        }

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}

    @torch.no_grad()
    def evaluate(self, samples: int) -> dict[str, float]:
        """Mean IoU of masks from points and from boxes on validation scenes, and on wide ones if trained on such."""
        device = next(self.model.parameters()).device
        metrics: dict[str, float] = {}
        for wide in (0.0, 1.0) if self.wide else (0.0,):
            batch = self.collate([self.sample(i, "validation", wide) for i in range(samples)])
            result = self.model(**{name: value.to(device) for name, value in batch.items()})
            form = "wide_" if wide else ""
            metrics |= {f"{form}validation_{name}": round(float(value), 4) for name, value in result.items()}
        return metrics

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        dims = {"mask_encoder": asdict(self.dims.mask_encoder), "mask_decoder": asdict(self.dims.mask_decoder)}
        save_part(folder, "sam", dims, state, "", self.recipe.dtype)


def _point(mask: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A pixel of the mask as x, y in 0..1."""
    rows, columns = np.nonzero(mask)
    one = int(rng.integers(len(rows)))
    return ((np.array([columns[one], rows[one]]) + 0.5) / len(mask)).astype(np.float32)


def _box(mask: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The mask's extent with jittered sides, x1,y1,x2,y2 in 0..1."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / len(mask)
    sides = np.tile(box[2:] - box[:2], 2)
    return np.clip(box + rng.normal(0, JITTER / 2, 4) * sides, 0, 1).astype(np.float32)
