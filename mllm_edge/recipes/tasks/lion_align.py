"""Recipe task `lion-align`: the Q-Former and the aggregator learn to express what is where in the T5's own words.

In place of the pretraining that the published system starts from (BLIP-2's first stage for its Q-Former): a small T5
that can look things up in bags of words (`lion-language`) then finds such bags in a picture's rows. The target of a row
is the sum of the word embeddings of the object there, with one more word at its middle so that it can be counted, and
the code of its place (`place_code.py`); empty places are zero. A row of the aggregator stands for a patch, a query for
one of as many equal parts of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mllm_edge.errors import BadInput
from mllm_edge.models.lion.model import CONFIGS, Lion, LionDims
from mllm_edge.models.lion.plan import preprocessing
from mllm_edge.recipes.data.lion_words import Words, turns
from mllm_edge.recipes.data.mixture import wide_share
from mllm_edge.recipes.data.place_code import place_codes
from mllm_edge.recipes.data.scene_pixels import box_shares, drawn, owners, raster, squashed_masks
from mllm_edge.recipes.modules import decaying
from mllm_edge.recipes.parts import part_folder, read_part, save_part
from mllm_edge.recipes.recipe import Recipe
from mllm_edge.recipes.tasks.language import COUNTED
from mllm_edge.runtime.preprocess import preprocess
from mllm_edge.scenes import Scene, attributes, mixed_scene, pick

MOST_WORDS = 12  # pieces of one object's words
TASKS = ("caption", "vqa", "rec")
Sample = dict[str, np.ndarray[Any, Any]]


class AlignModel(nn.Module):
    """Both connectors behind a frozen encoder, with the loss of their rows."""

    words: Tensor

    def __init__(self, lion: Lion):
        super().__init__()
        self.vision_encoder = lion.vision_encoder.requires_grad_(False)
        self.queries, self.aggregator = lion.queries, lion.aggregator
        self.register_buffer("words", lion.language_model.shared.weight.detach().clone(), persistent=False)

    def forward(
        self,
        pixel_values: Tensor,
        heard: Tensor,
        patches: Tensor,
        parts: Tensor,
        patch_codes: Tensor,
        part_codes: Tensor,
    ) -> dict[str, Tensor]:
        """`pixel_values` [B,3,S,S], `heard` int64 [B,L]; `patches` [B,N,W] and `parts` [B,Q,W] are ids of words, -1
        where there are no more, with codes [B,N,D] and [B,Q,D]. The loss is in units of the targets' mean square."""
        with torch.no_grad():
            taps = self.vision_encoder(pixel_values)
        result: dict[str, Tensor] = {}
        for name, rows, ids, codes in (
            ("aggregator", self.aggregator(*taps)[:, 1:], patches, patch_codes),  # the class token stands for no place
            ("queries", self.queries(taps[0], heard), parts, part_codes),
        ):
            words = self.words[ids.clamp(min=0)] * (ids >= 0).unsqueeze(-1)  # [B,N,W,D]
            target = words.sum(dim=2) + codes  # [B,N,D]
            away = (rows.float() - target).square().sum(dim=-1)  # [B,N]
            there = ids[..., 0] >= 0
            norm = target.square().sum(dim=-1)[there].mean()
            result[name] = (away[there].mean() + away[~there].mean()) / norm
        return {"loss": result["aggregator"] + result["queries"], **{n: v.detach() for n, v in result.items()}}


class LionAlignTask:
    """Train both connectors of `recipe.config`; `init` names the runs of the encoder and of the T5."""

    def __init__(self, recipe: Recipe):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.dims: LionDims = CONFIGS[recipe.config]
        missing = [part for part in ("vision_encoder", "t5") if not recipe.init.get(part)]
        if missing:
            raise BadInput(f"the recipe's init names no {missing[0]}; add init.{missing[0]}=FOLDER")
        self.wide = wide_share(recipe.data)
        self.words = Words(part_folder(recipe.init["t5"]))
        lion = Lion(self.dims)
        lion.vision_encoder.load_state_dict(read_part(recipe.init["vision_encoder"], "vision_encoder"))
        with torch.no_grad():
            lion.language_model.shared.weight.copy_(read_part(recipe.init["t5"], "t5")["shared.weight"])
        self.model = AlignModel(lion)
        self.grids = [math.isqrt(n) for n in (self.dims.vision.patches, self.dims.qformer.queries)]
        if self.grids[1] ** 2 != self.dims.qformer.queries:
            raise BadInput(f"{self.dims.qformer.queries} queries are no square grid; this recipe is for config=tiny")

    def parameters(self) -> list[dict[str, Any]]:
        return decaying(self.model.parameters())

    def sample(self, index: int, split: str = "train", wide: float | None = None) -> Sample:
        scene = mixed_scene(split, index, self.recipe.seed, self.wide if wide is None else wide)
        rng = np.random.default_rng([self.recipe.seed, 101, index])
        asked = turns(scene, pick(rng, TASKS), rng, 1) or turns(scene, "caption", rng, 1)
        (patches, patch_codes), (parts, part_codes) = (self._targets(scene, grid) for grid in self.grids)
        return {
            "pixel_values": preprocess(drawn(scene, self.dims.vision.image_size), preprocessing(self.dims)[0])[0],
            "heard": np.array(self.words.question(asked[0].question, self.dims.question_length)),
            "patches": patches,
            "parts": parts,
            "patch_codes": patch_codes,
            "part_codes": part_codes,
        }

    def _targets(self, scene: Scene, grid: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Ids of the words of what is in each cell, [N,W] filled with -1, and the codes of its places [N,D]."""
        said = [" ".join(attributes(item)) for item in scene.objects]
        covered = squashed_masks(scene, self.dims.vision.image_size)
        centers = np.array([(item.x, item.y) for item in scene.objects])
        owner = owners(covered, centers, grid)
        words = np.full((grid * grid, MOST_WORDS), -1)
        for cell in np.flatnonzero(owner >= 0):
            counted = cell in raster(centers[owner[cell]][None], grid)  # its object's middle, so that it counts once
            ids = self.words.answer(f"{said[owner[cell]]} {COUNTED}" if counted else said[owner[cell]])[:-1]
            words[cell, : len(ids)] = ids
        codes = place_codes(box_shares(scene), self.dims.language.width)
        codes = np.concatenate([codes, np.zeros((1, codes.shape[1]), np.float32)])
        return words, codes[owner]  # the last row, of 0, where there is no owner

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}

    @torch.no_grad()
    def evaluate(self, samples: int) -> dict[str, float]:
        """The loss of each connector on validation scenes."""
        device = next(self.model.parameters()).device
        batch = self.collate([self.sample(index, "validation", 0.0) for index in range(samples)])
        result = self.model(**{name: value.to(device) for name, value in batch.items()})
        return {f"validation_{name}": round(float(value), 4) for name, value in result.items()}

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        kept = {name: tensor for name, tensor in state.items() if not name.startswith("vision_encoder.")}
        save_part(folder, "connectors", asdict(self.dims), kept, "", self.recipe.dtype)
