"""Recipe task `tagger`: trains LION's small tagger to name the colors, shapes and sizes that a scene has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_edge.errors import BadInput
from mllm_edge.models.lion.layouts import TAGS as TAGS_FILE
from mllm_edge.models.lion.model import CONFIGS, Tagger, TaggerDims
from mllm_edge.models.lion.plan import preprocessing
from mllm_edge.recipes.data.conversation import IGNORE
from mllm_edge.recipes.data.lion_words import TAGS, tags_of
from mllm_edge.recipes.data.mixture import wide_share
from mllm_edge.recipes.data.scene_pixels import drawn
from mllm_edge.recipes.modules import decaying
from mllm_edge.recipes.parts import save_part
from mllm_edge.recipes.recipe import Recipe
from mllm_edge.recipes.tasks.encoder import dense_labels
from mllm_edge.runtime.preprocess import preprocess
from mllm_edge.scenes import COLORS, SHAPES, SIZES, mixed_scene

SCENES = 400  # that the thresholds are chosen on
SEEN = 0.3  # weight of what is seen where
STEPS = np.linspace(0.1, 0.9, 33)  # possible thresholds

Sample = dict[str, np.ndarray[Any, Any]]


class TaggerModel(nn.Module):
    """The tagger with its losses: binary cross-entropy of each tag, and what its Swin sees where.

    The second is there in training alone: from tags of whole pictures a small Swin hardly learns shapes.
    """

    def __init__(self, dims: TaggerDims):
        super().__init__()
        self.tagger = Tagger(dims)
        self.classes = {"color": len(COLORS), "shape": len(SHAPES), "size": len(SIZES)}
        self.heads = nn.Linear(dims.swin.out_width, sum(self.classes.values()))

    def forward(self, pixel_values: Tensor, tags: Tensor, **labels: Tensor) -> dict[str, Tensor]:
        """`pixel_values` [B,3,S,S], `tags` float [B,n] of 0 and 1; `color`, `shape` and `size` int64 [B,N] with
        `weight` [B,N] as `encoder.dense_labels` has them."""
        features = self.tagger.visual_encoder(pixel_values)  # [B,N,C]
        chances = self.tagger.read(features).float()
        right = ((chances > 0.5) == (tags > 0.5)).float().mean()
        loss = functional.binary_cross_entropy(chances, tags)
        objects = labels["weight"].sum().clamp(min=1)
        parts = self.heads(features).float().split(list(self.classes.values()), dim=-1)  # [B,N,classes] each
        for name, logits in zip(self.classes, parts, strict=True):
            each = functional.cross_entropy(logits.transpose(1, 2), labels[name], ignore_index=IGNORE, reduction="none")
            loss = loss + SEEN * (each * labels["weight"]).sum() / objects
        return {"loss": loss, "tag_accuracy": right}


class TaggerTask:
    """Train the tagger of `recipe.config` on scenes."""

    def __init__(self, recipe: Recipe):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        dims = CONFIGS[recipe.config]
        if dims.tagger is None or dims.tagger.tags != len(TAGS):
            raise BadInput(f"config {recipe.config} has no tagger for scenes; use config=tiny")
        self.dims, self.pixels = dims.tagger, preprocessing(dims)[1]
        self.wide = wide_share(recipe.data)
        self.model = TaggerModel(self.dims)
        swin = self.dims.swin
        self.grid = swin.image_size // (swin.patch_size << (len(swin.depths) - 1))  # of its last layer

    def parameters(self) -> list[dict[str, Any]]:
        return decaying(self.model.parameters())

    def sample(self, index: int, split: str = "train", wide: float | None = None) -> Sample:
        scene = mixed_scene(split, index, self.recipe.seed, self.wide if wide is None else wide)
        there = tags_of(scene)
        labels = dense_labels(scene, self.grid, self.dims.swin.image_size, squashed=True)
        return {
            **{name: labels[name] for name in (*self.model.classes, "weight")},
            "pixel_values": preprocess(drawn(scene, self.dims.swin.image_size), self.pixels)[0],
            "tags": np.array([tag in there for tag in TAGS], np.float32),
        }

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}

    @torch.no_grad()
    def evaluate(self, samples: int) -> dict[str, float]:
        """Recall and precision of all tags on scenes of the test split, at thresholds chosen on others."""
        least = np.array(self._thresholds())
        metrics: dict[str, float] = {}
        for wide in (0.0, 1.0) if self.wide else (0.0,):
            chances, there = self._chances("test", samples, wide)
            said, form = chances > least, "wide_" if wide else ""
            metrics |= {
                f"{form}test_recall": round(float((said & there).sum() / there.sum()), 4),
                f"{form}test_precision": round(float((said & there).sum() / max(1, said.sum())), 4),
            }
        return metrics

    def _chances(self, split: str, number: int, wide: float) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """What the tagger says and what is there, [number,n] each."""
        device = next(self.model.parameters()).device
        batch = self.collate([self.sample(index, split, wide) for index in range(number)])
        return self.model.tagger(batch["pixel_values"].to(device)).float().cpu().numpy(), batch["tags"].numpy() > 0.5

    def _thresholds(self) -> list[float]:
        """For each tag that with the best F1 on validation scenes; of those as good the middle one."""
        pairs = [self._chances("validation", SCENES, wide) for wide in ((0.0, 1.0) if self.wide else (0.0,))]
        chances, there = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
        said = chances[..., None] > STEPS  # [m,n,k]
        hits = (said & there[..., None]).sum(axis=0)  # [n,k]
        f1 = 2 * hits / np.maximum(1, said.sum(axis=0) + there.sum(axis=0)[:, None])
        best = [np.flatnonzero(row >= row.max() - 1e-9) for row in f1]
        return [round(float(STEPS[places[len(places) // 2]]), 3) for places in best]

    @torch.no_grad()
    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        save_part(folder, "tagger", asdict(self.dims), state, "tagger.", self.recipe.dtype)
        self.model.eval()
        text = json.dumps({"tags": list(TAGS), "thresholds": self._thresholds()}, indent=2)
        (folder / TAGS_FILE).write_text(text + "\n", encoding="utf-8")
