"""Recipe task `encoder`: pretrains the small vision transformer on dense labels of scenes, one prediction per patch.

Its checkpoint takes CLIP's place, shared by all tiny systems. Each patch predicts the color, shape and size of the
object that covers it, whether the object's center lies in it, and where in the picture that center is (LION's, which
writes boxes: where its box is); the classes have separate heads, so that a color is recognized on shapes it was never
seen on. Objects count alike, small or large. The mean of all patches predicts how many objects there are, and the kind
of page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_edge.bundle.sources import Pixels
from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.eva import EvaDims, EvaEncoder
from mllm_edge.models.blocks.vit import VisionEncoder, VitDims
from mllm_edge.models.lion.model import CONFIGS as LION_CONFIGS
from mllm_edge.models.lion.plan import preprocessing as lion_preprocessing
from mllm_edge.models.llava.model import CONFIGS
from mllm_edge.models.llava.plan import preprocessing
from mllm_edge.recipes.data.conversation import IGNORE
from mllm_edge.recipes.data.mixture import wide_share
from mllm_edge.recipes.data.scene_pixels import (
    box_shares,
    drawn,
    owners,
    padded_centers,
    raster,
    repaint,
    square_masks,
    squashed_masks,
)
from mllm_edge.recipes.parts import read_part, save_part
from mllm_edge.recipes.recipe import Recipe
from mllm_edge.runtime.preprocess import preprocess
from mllm_edge.scenes import COLORS, PAGES, SHAPES, SIZES, Scene, mixed_scene
from mllm_edge.scenes.wide import MOST_OBJECTS

WHOLE = 0.2  # weight of the losses on whole pictures
REPAINTED = 0.7  # share of training pictures whose objects get unnamed colors


def dense_labels(scene: Scene, grid: int, size: int, squashed: bool = False) -> dict[str, np.ndarray[Any, Any]]:
    """Labels per patch of a `grid` x `grid` raster over the square that a picture is padded to, or squashed into.

    Returns:
        `color`, `shape`, `size`, `cell` (of a 3x3 raster over the picture, row-major): int64 [N], -100 where no object
        covers the patch or has its center in it; `weight`: float32 [N], what the patch counts for: those of one object
        1 together; `object`, `center`: float32 [N] in {0,1}; `place`: float32 [N,2], the object's center in picture
        widths and heights from the top left; `box`: float32 [N,4], its box likewise; `count` (objects less one) and
        `page` (number of its kind): int64 [].
    """
    covered = squashed_masks(scene, size) if squashed else square_masks(scene, size, centered=True)  # [n,S,S]
    centers = np.array([(thing.x, thing.y) for thing in scene.objects])  # [n,2]
    seen_at = centers if squashed else padded_centers(scene)
    owner = owners(covered, seen_at, grid)  # [N]
    center = np.zeros(grid * grid, np.float32)
    center[raster(seen_at, grid)] = 1
    owned_patches = np.bincount(owner[owner >= 0], minlength=len(scene.objects))  # [n]

    def classes(indices: list[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.where(owner >= 0, np.array(indices)[owner], IGNORE).astype(np.int64)

    return {
        "color": classes([list(COLORS).index(thing.color) for thing in scene.objects]),
        "shape": classes([list(SHAPES).index(thing.shape) for thing in scene.objects]),
        "size": classes([list(SIZES).index(thing.size) for thing in scene.objects]),
        "cell": classes(raster(centers, 3).tolist()),
        "weight": np.where(owner >= 0, 1 / np.maximum(1, owned_patches)[owner], 0).astype(np.float32),
        "object": (owner >= 0).astype(np.float32),
        "center": center,
        "place": centers[owner].astype(np.float32),
        "box": box_shares(scene)[owner].astype(np.float32),
        "count": np.array(len(scene.objects) - 1),
        "page": np.array(list(PAGES).index(scene.background.kind)),
    }


def sine_positions(grid: int, width: int) -> Tensor:
    """Initial position embeddings: 2-D sines and cosines (He et al. 2022, MAE), zeros for the class token.

    Neighbors and places are linear functions of them; with random vectors both must be learned patch by patch.

    Returns:
        float32 [1 + grid * grid, width], the first half of each vector for the column, the second for the row.
    """
    quarter = width // 4
    angles = torch.arange(grid).float().unsqueeze(1) / 10_000 ** (torch.arange(quarter) / quarter)  # [grid, width / 4]
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, width / 2]
    columns, rows = line.repeat(grid, 1), line.repeat_interleave(grid, dim=0)  # [grid * grid, width / 2] each
    return torch.cat([torch.zeros(1, width), torch.cat([columns, rows], dim=1)])


class DenseModel(nn.Module):
    """Vision encoder with the dense heads on the tapped hidden state."""

    def __init__(self, dims: VitDims | EvaDims):
        super().__init__()
        self.dims = dims
        self.grid = dims.image_size // dims.patch_size
        self.vision_encoder = VisionEncoder(dims) if isinstance(dims, VitDims) else EvaEncoder(dims)
        held: Any = self.vision_encoder
        positions = (held.embeddings if isinstance(dims, VitDims) else held).position_embedding.weight
        with torch.no_grad():
            positions.copy_(sine_positions(self.grid, dims.width))
        self.classes = {"color": len(COLORS), "shape": len(SHAPES), "size": len(SIZES), "cell": 9}
        self.split = {**self.classes, "flags": 2, "place": 2 if isinstance(dims, VitDims) else 4}
        self.whole = {"count": MOST_OBJECTS, "page": len(PAGES)}
        self.norm = nn.LayerNorm(dims.width)
        self.heads = nn.Linear(dims.width, sum(self.split.values()))
        self.whole_heads = nn.Linear(dims.width, sum(self.whole.values()))

    def predict(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """[B,3,S,S] -> logits of each head per patch, [B,N,classes], and per picture, [B,classes]."""
        seen = self.vision_encoder(pixel_values)
        features = self.norm(seen if isinstance(self.dims, VitDims) else seen[0][:, 1:])  # [B,N,D]
        parts = self.heads(features).split(list(self.split.values()), dim=-1)  # [B,N,classes] each
        wholes = self.whole_heads(features.mean(dim=1)).split(list(self.whole.values()), dim=-1)  # [B,classes] each
        return {**dict(zip(self.split, parts, strict=True)), **dict(zip(self.whole, wholes, strict=True))}

    def forward(self, pixel_values: Tensor, **labels: Tensor) -> dict[str, Tensor]:
        """`loss` and the accuracy of each class, over objects (the mean of their patches) or over pictures."""
        out = {name: value.float() for name, value in self.predict(pixel_values).items()}
        result: dict[str, Tensor] = {}
        loss = torch.zeros((), device=pixel_values.device)
        for name in self.classes:
            truth = labels[name]  # [B,N]
            weight = labels["weight"] * (truth != IGNORE)  # [B,N]
            objects = weight.sum().clamp(min=1)  # a batch may hold only repainted pictures
            flat = out[name].flatten(0, 1), truth.flatten()  # [B*N,classes], [B*N]
            each = functional.cross_entropy(*flat, ignore_index=IGNORE, reduction="none")  # [B*N]
            loss = loss + (each * weight.flatten()).sum() / objects
            result[name] = ((out[name].argmax(-1) == truth) * weight).sum() / objects
        for name in self.whole:
            loss = loss + WHOLE * functional.cross_entropy(out[name], labels[name])
            result[name] = (out[name].argmax(-1) == labels[name]).float().mean()
        flags = torch.stack([labels["object"], labels["center"]], dim=-1)  # [B,N,2]
        rare = torch.tensor([1.0, 8.0], device=flags.device)  # one patch in about 30 holds a center
        loss = loss + functional.binary_cross_entropy_with_logits(out["flags"], flags, pos_weight=rare)
        return {"loss": loss + self._away(out["place"], labels), **result}

    def _away(self, place: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """The loss of places: of centers over all patches of objects, of boxes over objects."""
        if place.shape[-1] == 2:
            covered = labels["object"].unsqueeze(-1)  # [B,N,1]
            return 4 * functional.smooth_l1_loss(place * covered, labels["place"] * covered, beta=0.05)
        away = functional.smooth_l1_loss(place, labels["box"], beta=0.02, reduction="none").mean(dim=-1)  # [B,N]
        return 10 * (away * labels["weight"]).sum() / labels["weight"].sum().clamp(min=1)


class EncoderTask:
    """Train an encoder of `recipe.config` on dense labels of scenes: CLIP's, or with `data.family` "eva" LION's."""

    def __init__(self, recipe: Recipe):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.wide = wide_share(recipe.data)
        self.family = str(recipe.data.get("family", "clip"))
        self.dims, self.pixels = _family(self.family, recipe.config)
        self.model = DenseModel(self.dims)
        if "vision_encoder" in recipe.init:
            held = read_part(recipe.init["vision_encoder"], "vision_encoder")
            if isinstance(self.dims, EvaDims) and "patch_embedding.weight" not in held:
                self.model.vision_encoder.load_state_dict(as_eva(held, self.model.vision_encoder.state_dict()))
            else:
                self.model.vision_encoder.load_state_dict(held)

    def parameters(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters())}]

    def sample(self, index: int, split: str = "train", wide: float | None = None) -> dict[str, np.ndarray[Any, Any]]:
        scene = mixed_scene(split, index, self.recipe.seed, self.wide if wide is None else wide)
        return self.labelled(scene, index, split)

    def labelled(self, scene: Scene, index: int, split: str) -> dict[str, np.ndarray[Any, Any]]:
        """A scene's pixels and labels; in training most are repainted."""
        labels = dense_labels(scene, self.model.grid, self.dims.image_size, self.pixels.fit == "squash")
        rng = np.random.default_rng([self.recipe.seed, 13, index])
        if split == "train" and rng.random() < REPAINTED:
            scene = repaint(scene, rng)
            labels["color"] = np.full_like(labels["color"], IGNORE)
        return {"pixel_values": preprocess(drawn(scene, self.dims.image_size), self.pixels)[0], **labels}

    def collate(self, samples: Sequence[dict[str, np.ndarray[Any, Any]]]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}

    @torch.no_grad()
    def evaluate(self, samples: int) -> dict[str, float]:
        """Accuracy per object (of count and page: per picture) on validation scenes and on scenes with held-out
        pairs, and on wide ones of both splits if the recipe trains on such."""
        metrics: dict[str, float] = {}
        device = next(self.model.parameters()).device
        for wide in (0.0, 1.0) if self.wide else (0.0,):
            for split in ("validation", "held_out"):
                batch = self.collate([self.sample(i, split, wide) for i in range(samples)])
                result = self.model(**{name: value.to(device) for name, value in batch.items()})
                form = "wide_" if wide else ""
                metrics |= {f"{form}{split}_{name}": round(float(value), 4) for name, value in result.items()}
        return metrics

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        save_part(folder, "vision_encoder", asdict(self.dims), state, "vision_encoder.", self.recipe.dtype)


def _family(family: str, config: str) -> tuple[VitDims | EvaDims, Pixels]:
    """The dims of an encoder and how it sees a picture."""
    if family == "eva":
        lion = LION_CONFIGS[config]
        return lion.vision, lion_preprocessing(lion)[0]
    if family != "clip":
        raise BadInput(f"data.family is {family!r}; use clip or eva")
    llava = CONFIGS[config]
    if not isinstance(llava.vision, VitDims):
        raise BadInput("this recipe trains a vision transformer; use config=tiny")
    return llava.vision, preprocessing(llava)


def as_eva(clip: dict[str, Tensor], fresh: dict[str, Tensor]) -> dict[str, Tensor]:
    """An EVA's tensors begun with those of a CLIP of the same width: all but its first norm, which EVA lacks.

    Raises:
        BadInput: the CLIP has other sizes.
    """
    renamed = {name.replace("encoder.layers.", "layers.").removeprefix("embeddings."): t for name, t in clip.items()}
    begun = {name: renamed.get(name, tensor) for name, tensor in fresh.items()}
    for name, tensor in fresh.items():
        if begun[name].shape != tensor.shape:
            raise BadInput(f"init.vision_encoder has another {name}; give an encoder of the same size")
    return begun
