"""Recipe task `gill-encoder`: teaches the class token of the shared vision encoder what is in a picture.

CLIP's loss against captions (Radford et al. 2021), whose small text tower is thrown away, and a loss on what linear
heads tell of the class token: the colored shapes that are there, and what each thing from left to right is and where.
GILL reads pictures by linear layers on that token alone.
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

from mllm_edge.errors import BadInput, look_up
from mllm_edge.models.blocks.vit import VitDims
from mllm_edge.models.gill.model import CONFIGS, PooledEncoder
from mllm_edge.models.text_to_image import TextDims, text_encoder
from mllm_edge.recipes.contrast import info_nce, recall
from mllm_edge.recipes.data.caption_tokens import (
    TOKENIZER,
    caption_ids,
    read_caption_tokenizer,
    train_caption_tokenizer,
)
from mllm_edge.recipes.data.gill_scenes import CLASSES, PAIRS, SLOTS, pairs_shown, pixels, slots, told, told_apart
from mllm_edge.recipes.modules import decaying
from mllm_edge.recipes.parts import read_part, save_part
from mllm_edge.recipes.recipe import Recipe
from mllm_edge.recipes.slots import SlotHeads
from mllm_edge.scenes import Scene, sample_scene
from mllm_edge.scenes.captions import full_caption

TEXT = TextDims(layers=2, length=48)  # four things with all their attributes have 40 words
FULL = 0.5  # share of captions that say everything
CORPUS = 1500  # captions that the tokenizer learns from
MOST_SCALE = 100.0  # as CLIP's
MOST = 500  # pictures among which one is looked for

Sample = dict[str, np.ndarray[Any, Any]]


class SeenModel(nn.Module):
    """The encoder with the linear heads on its pooled vector, and the text tower."""

    def __init__(self, dims: VitDims, width: int):
        super().__init__()
        self.vision_encoder = PooledEncoder(dims)
        self.visual_fc = nn.Linear(dims.width, width)
        self.pairs, self.slots = nn.Linear(dims.width, len(PAIRS)), SlotHeads(dims.width)
        self.text_encoder, self.text_fc = text_encoder(TEXT), nn.Linear(TEXT.width, width)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def read(self, ids: Tensor) -> Tensor:
        """Captions int64 [B,L] as vectors [B,d], from the state at their first end token."""
        vector: Tensor = self.text_fc(self.text_encoder(ids).pooler_output)
        return vector

    def forward(self, pixel_values: Tensor, ids: Tensor, pairs: Tensor, **labels: Tensor) -> dict[str, Tensor]:
        """`pixel_values` float32 [B,3,S,S], `ids` int64 [B,L], `pairs` float32 [B,48] (see `pairs_shown`), and the
        classes of `slots`, int64 [B,4] each."""
        pooled = self.vision_encoder(pixel_values)  # [B,D]
        scale = self.logit_scale.clamp(max=float(np.log(MOST_SCALE)))
        contrast = info_nce(self.read(ids), self.visual_fc(pooled), scale)
        there = self.pairs(pooled).float()  # [B,48]
        shown = functional.binary_cross_entropy_with_logits(there, pairs, reduction="none").sum(1).mean() / SLOTS
        told_of, right = self.slots.losses(pooled, labels)
        exact = ((there > 0) == (pairs > 0.5)).all(1).float().mean()
        return {"loss": contrast + shown + told_of, "contrast": contrast, "pairs": exact, **right}


class GillEncoderTask:
    """Train the encoder of GILL's `recipe.config`; `init.vision_encoder` names the encoder whose layers it begins
    with."""

    def __init__(self, recipe: Recipe):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.dims = look_up("config", recipe.config, {"tiny": CONFIGS["tiny"]})
        self.model = SeenModel(self.dims.vision, self.dims.query_width)
        if recipe.init.get("vision_encoder"):
            begin(self.model.vision_encoder, read_part(recipe.init["vision_encoder"], "vision_encoder"))
        tokenizer = Path(recipe.out) / TOKENIZER
        if not tokenizer.is_file():
            tokenizer.parent.mkdir(parents=True, exist_ok=True)
            texts = (self.caption(sample_scene("train", i, recipe.seed), i) for i in range(CORPUS))
            train_caption_tokenizer(tokenizer, TEXT.vocabulary, TEXT.length, texts)
        self.tokenizer = read_caption_tokenizer(tokenizer)

    def caption(self, scene: Scene, index: int) -> str:
        """The scene in words, often all that can be said."""
        rng = np.random.default_rng([self.recipe.seed, 87, index])
        return full_caption(scene, rng) if rng.random() < FULL else told(scene, index, self.recipe.seed)

    def parameters(self) -> list[dict[str, Any]]:
        return decaying(self.model.parameters())

    def sample(self, index: int) -> Sample:
        scene = sample_scene("train", index, self.recipe.seed)
        return self.labelled(scene, self.caption(scene, index))

    def labelled(self, scene: Scene, text: str) -> Sample:
        """The picture, its caption and what is in it."""
        return {
            "pixel_values": pixels(scene, self.dims),
            "ids": caption_ids(self.tokenizer, [text])[0],
            "pairs": pairs_shown(scene),
            **slots(scene),
        }

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}

    @torch.no_grad()
    def evaluate(self, samples: int) -> dict[str, float]:
        """On up to 500 scenes of the test split whose captions say everything and differ: R@1 both ways, and shares
        that are told right: all colored shapes of a picture, and each class of a thing."""
        device = next(self.model.parameters()).device
        batch = self.collate([self.labelled(*one) for one in told_apart("test", min(samples, MOST), self.recipe.seed)])
        batch = {name: value.to(device) for name, value in batch.items()}
        found = self.model(**batch)
        texts = self.model.read(batch["ids"])
        images = self.model.visual_fc(self.model.vision_encoder(batch["pixel_values"]))
        told_right = {name: round(float(found[name]), 4) for name in ("pairs", *CLASSES)}
        return {**recall(texts, images), **told_right}

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        save_part(folder, "vision_encoder", asdict(self.dims.vision), state, "vision_encoder.", self.recipe.dtype)


def begin(encoder: PooledEncoder, held: dict[str, Tensor]) -> None:
    """Fill an encoder with one that may lack its last layers and norm, which stay as they are.

    Raises:
        BadInput: the other has tensors of other sizes, or such as this one has not.
    """
    fresh = encoder.state_dict()
    for name, tensor in held.items():
        if name not in fresh or fresh[name].shape != tensor.shape:
            raise BadInput(f"init.vision_encoder has another {name}; give an encoder of the same size")
    encoder.load_state_dict({**fresh, **held})
