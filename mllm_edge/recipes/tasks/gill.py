"""Recipe task `gill`: joins a frozen OPT, a frozen vision encoder and a frozen diffusion model (Koh et al. 2023).

What is trained: the connector, mapper, retrieval head, the factor of the contrast and the rows of the picture tokens.
Each step learns captions, retrieval and generation from the same pictures. Three things differ from the original:
frozen rows of the table never decay, since the picture tokens' are a tensor of their own; what is trained is kept in
fp32; the learning rate falls by a cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mllm_edge.errors import BadInput, look_up
from mllm_edge.models.blocks.unet import UNet, UNetDims
from mllm_edge.models.blocks.vae import VaeDecoder
from mllm_edge.models.gill.layouts import save_gill
from mllm_edge.models.gill.model import CONFIGS, LM, TOKENS, tensor_shapes
from mllm_edge.models.language.opt import TABLE
from mllm_edge.models.text_to_image import TextDims
from mllm_edge.recipes.data.caption_tokens import TOKENIZER, read_caption_tokenizer
from mllm_edge.recipes.data.gill_batches import MODES, Batches, Sample
from mllm_edge.recipes.data.gill_scenes import request, told
from mllm_edge.recipes.data.gill_words import Words
from mllm_edge.recipes.modules import decaying
from mllm_edge.recipes.parts import part_dims, part_folder, read_part
from mllm_edge.recipes.recipe import Recipe
from mllm_edge.recipes.tasks.gill_model import GillModel, at_length
from mllm_edge.recipes.tasks.gill_scores import Artist, empty_text, scores
from mllm_edge.recipes.tasks.scene_classifier import read_classifier
from mllm_edge.recipes.tasks.vae import half_of, read_vae
from mllm_edge.scenes import sample_scene

PARTS = {
    "language": "gill-language",
    "vision_encoder": "gill-encoder",
    "diffusion": "diffusion-pretrain",
    "vae": "vae-pretrain",
}
JOINED = 0.5  # how often neighbors are one sequence, in each mode
ASKED = 0.25  # share of captions that are requests in the last two


class GillTask:
    """Train a GILL of `recipe.config` on captioned scenes of one to four things. `init` names the runs of its parts
    (`PARTS`), and of the classifier that judges what it draws (`judge`), without which nothing is drawn."""

    def __init__(self, recipe: Recipe):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        config = look_up("config", recipe.config, {"tiny": CONFIGS["tiny"]})
        if recipe.batch % (2 * recipe.accumulate):
            raise BadInput(f"batch {recipe.batch} is not in pairs; give a multiple of {2 * recipe.accumulate}")
        for part, name in PARTS.items():
            if not recipe.init.get(part):
                raise BadInput(f"the recipe's init names no {part}; add init.{part}=FOLDER, a run of {name}")
        init = recipe.init
        length = int(recipe.data.get("length", 48))
        vae, held = read_vae(init["vae"])
        unet, text = part_dims(init["diffusion"], "unet"), TextDims(**part_dims(init["diffusion"], "text_encoder"))
        unet |= {key: tuple(unet[key]) for key in ("widths", "attends", "heads")}
        mapper = replace(config.mapper, queries=text.length, out_width=text.width)
        self.dims = replace(config, mapper=mapper, unet=UNetDims(**unet), vae=vae, decides=False)
        self.folder = part_folder(init["language"])
        words = Words(self.folder)
        if words.start != self.dims.start:
            raise BadInput(f"{self.folder} has {TOKENS[0]} at {words.start}, not {self.dims.start}; train it again")
        tokenizer = read_caption_tokenizer(part_folder(init["diffusion"]) / TOKENIZER)
        self.batches = Batches(self.dims, words, tokenizer, length)
        self.model = GillModel(self.dims, text)
        # Frozen and in no loss, so they are not part of the model, whose state is saved again and again.
        unet_of, decoder = UNet(self.dims.unet), VaeDecoder(vae)
        fill(unet_of, read_part(init["diffusion"], "unet"), "diffusion")
        decoder.load_state_dict(half_of(held, decoder))
        fill(self.model.text_encoder, read_part(init["diffusion"], "text_encoder"), "diffusion")
        fill(self.model.vision_encoder, read_part(init["vision_encoder"], "vision_encoder"), "vision_encoder")
        fill(self.model.language_model, read_part(init["language"], "language_model"), "language")
        self.model.begin_rows()
        # After the model, whose first weights must not depend on it.
        judge = read_classifier(init["judge"]) if init.get("judge") else None
        shape = (self.dims.unet.out_channels, self.dims.unet.side, self.dims.unet.side)
        self.artist = Artist(shape, unet_of, decoder, vae.scale, judge)

    def parameters(self) -> list[dict[str, Any]]:
        """Matrices decay, among them the picture tokens' rows; frozen rows are no part of it."""
        return decaying(self.model.parameters())

    def sample(self, index: int) -> Sample:
        scene = sample_scene("train", index, self.recipe.seed)
        text = told(scene, index, self.recipe.seed)
        asked = np.random.default_rng([self.recipe.seed, 88, index]).random() < ASKED
        return {"index": index, **self.batches.seen(scene, text, request(text) if asked else text)}

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Of each mode by its own chance single captions, or neighbors in one sequence."""
        chances = np.random.default_rng([self.recipe.seed, 89, samples[0]["index"]]).random(len(MODES))
        return self.batches.batch(samples, [bool(chance < JOINED) for chance in chances])

    def evaluate(self, samples: int) -> dict[str, float]:
        """See `gill_scores.scores`."""
        return scores(self.model, self.batches, self.artist, self.recipe.seed, samples)

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """A whole GILL in our own layout (`models/gill/layouts.py`), which export takes."""
        table = state[f"{LM}{TABLE}"][: self.dims.start]
        whole = {
            **state,
            f"{LM}{TABLE}": torch.cat([table, at_length(state["rows"], table)]),
            **{f"unet.{name}": tensor for name, tensor in self.artist.unet.state_dict().items()},
            **{f"vae_decoder.{name}": tensor for name, tensor in self.artist.decoder.state_dict().items()},
            "empty_text": empty_text(self.model, self.batches),
        }
        kept = {name: whole[name] for name in tensor_shapes(self.dims)}
        name = f"gill-{self.recipe.config}"
        save_gill(folder, name, self.dims, kept, self.folder, getattr(torch, self.recipe.dtype))


def fill(module: nn.Module, held: dict[str, Tensor], part: str) -> None:
    """Load tensors of the run that `init.part` names. Raises BadInput where they are of another size."""
    try:
        module.load_state_dict(held)
    except RuntimeError:
        raise BadInput(f"init.{part} is of another size; give a run of {PARTS[part]} of this config") from None
