"""Recipe task `scene-classifier`: a small convolutional net that says which colored shapes a picture has.

It judges generated pictures, so it shares no weights and no data with what draws them. Each cell of a raster says
whether an object's center lies in it, and the color and shape of the object that covers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_edge.errors import BadInput
from mllm_edge.models.text_to_image import TINY_VAE
from mllm_edge.recipes.data.conversation import IGNORE
from mllm_edge.recipes.data.small_scenes import small_pixels
from mllm_edge.recipes.modules import decaying
from mllm_edge.recipes.parts import read_part, save_part
from mllm_edge.recipes.recipe import Recipe
from mllm_edge.recipes.tasks.encoder import dense_labels
from mllm_edge.scenes import COLORS, SHAPES, Scene, pick, sample_scene
from mllm_edge.scenes.model import Pair
from mllm_edge.scenes.sampling import jittered_rgb

SIDE = TINY_VAE.side
GRID = 8  # cells along a side
WIDTHS = (24, 48, 96)
SERIES = 1000  # added to the seed: other scenes than those that the diffusion model learns from
RARE = 8.0  # weight of a cell with a center

Sample = dict[str, np.ndarray[Any, Any]]


class SceneClassifier(nn.Module):
    """Pictures as rasters of what is where."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in WIDTHS:
            for stride, inputs in ((2, before), (1, width)):
                layers += [nn.Conv2d(inputs, width, 3, stride, 1), nn.GroupNorm(8, width), nn.SiLU()]
            before = width
        self.body = nn.Sequential(*layers, nn.Conv2d(before, before, 3, padding=1), nn.SiLU())
        self.parts = (len(COLORS), len(SHAPES), 1)
        self.heads = nn.Conv2d(before, sum(self.parts), 1)

    def read(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """float32 [B,3,64,64] in -1..1 -> logits of colors [B,8,N], shapes [B,6,N] and centers [B,N] of 8 x 8 cells."""
        color, shape, center = self.heads(self.body(pixel_values)).flatten(2).float().split(self.parts, dim=1)
        return color, shape, center[:, 0]

    def forward(
        self, pixel_values: Tensor, color: Tensor, shape: Tensor, weight: Tensor, center: Tensor
    ) -> dict[str, Tensor]:
        """Labels as `encoder.dense_labels` has them, a row a picture: `color`, `shape` int64 [B,N], `weight`, `center`
        float32 [B,N]."""
        *looks, middles = self.read(pixel_values)
        rare = torch.tensor(RARE, device=middles.device)
        loss = functional.binary_cross_entropy_with_logits(middles, center, pos_weight=rare)
        result: dict[str, Tensor] = {}
        for name, logits, truth in zip(("color", "shape"), looks, (color, shape)):
            each = functional.cross_entropy(logits, truth, ignore_index=IGNORE, reduction="none")  # [B,N]
            loss = loss + (each * weight).sum() / weight.sum()
            result[name] = ((logits.argmax(1) == truth) * weight).sum() / weight.sum()
        return {"loss": loss, **result}

    @torch.no_grad()
    def pairs(self, pixel_values: Tensor) -> list[set[Pair]]:
        """The colored shapes that each picture shows; float32 [B,3,64,64] in -1..1."""
        color, shape, center = self.read(pixel_values)
        looks = zip((center > 0).tolist(), color.argmax(1).tolist(), shape.argmax(1).tolist())
        return [{(COLORS[c], SHAPES[s]) for has, c, s in zip(*rows) if has} for rows in looks]


def read_classifier(folder: str) -> SceneClassifier:
    """A trained one, for judging. Raises BadInput where there is none, or it is of another size."""
    model = SceneClassifier()
    try:
        model.load_state_dict(read_part(folder, "scene_classifier"))
    except RuntimeError:
        raise BadInput(f"the scene_classifier in {folder} has another size; train scene-classifier again") from None
    return model.eval()


def recolored(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with every object in any of the colors: a judge must know all pairs, the held-out ones as well."""
    colors = [pick(rng, COLORS) for _ in scene.objects]
    return replace(
        scene,
        objects=tuple(replace(o, color=c, rgb=jittered_rgb(c, rng)) for o, c in zip(scene.objects, colors)),
    )


class SceneClassifierTask:
    """Train the classifier on drawn scenes in all colors."""

    def __init__(self, recipe: Recipe):
        torch.manual_seed(recipe.seed)
        if recipe.config != "tiny":
            raise BadInput(f"there is no classifier of config {recipe.config}; use config=tiny")
        self.recipe = recipe
        self.model = SceneClassifier()

    def parameters(self) -> list[dict[str, Any]]:
        return decaying(self.model.parameters())

    def _scene(self, index: int, split: str) -> Scene:
        scene = sample_scene(split, index, self.recipe.seed + SERIES)
        return recolored(scene, np.random.default_rng([self.recipe.seed, 63, index])) if split == "train" else scene

    def sample(self, index: int, split: str = "train") -> Sample:
        scene = self._scene(index, split)
        labels = dense_labels(scene, GRID, SIDE)
        kept = {name: labels[name] for name in ("color", "shape", "weight", "center")}
        return {"pixel_values": small_pixels(scene, SIDE), **kept}

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}

    def evaluate(self, samples: int) -> dict[str, float]:
        """On drawings of the validation and held-out splits: the share of objects whose color and shape are found, and
        of pictures in which exactly those are."""
        device = next(self.model.parameters()).device
        metrics: dict[str, float] = {}
        for split in ("validation", "held_out"):
            scenes = [self._scene(index, split) for index in range(samples)]
            pixels = torch.from_numpy(np.stack([small_pixels(scene, SIDE) for scene in scenes]))
            metrics |= judged(self.model.pairs(pixels.to(device)), scenes, split)
        return metrics

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        save_part(folder, "scene_classifier", {"widths": WIDTHS}, state, "", self.recipe.dtype)


def judged(found: Sequence[set[Pair]], scenes: Sequence[Scene], name: str) -> dict[str, float]:
    """`NAME_objects`: the share of objects that were found by color and shape; `NAME_pictures`: of pictures in which
    they were, and nothing else."""
    asked = [[thing.pair for thing in scene.objects] for scene in scenes]
    hits = [pair in there for there, pairs in zip(found, asked) for pair in pairs]
    exact = [there == set(pairs) for there, pairs in zip(found, asked)]
    return {
        f"{name}_objects": round(sum(hits) / len(hits), 4),
        f"{name}_pictures": round(sum(exact) / len(exact), 4),
    }
