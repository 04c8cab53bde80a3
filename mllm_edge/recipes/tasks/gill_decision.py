"""Recipe task `gill-decision`: a linear head that decides between looking for a picture and drawing one.

The original's labels are votes of people on which picture fits better. Ours follow from what the small diffusion model
was taught: captions of one to three things are drawn, those of four and more, which it has never drawn, are looked
for. The head reads the state at [IMG0] of caption and picture tokens; every step sees all captions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_edge.errors import BadInput
from mllm_edge.models.gill.layouts import save_gill
from mllm_edge.models.gill.model import LM, GillDims
from mllm_edge.models.resolve import resolve
from mllm_edge.models.text_to_image import TextDims, text_encoder
from mllm_edge.recipes.data.caption_tokens import TOKENIZER, caption_ids, read_caption_tokenizer
from mllm_edge.recipes.data.gill_scenes import few_things, fuller_scene, told
from mllm_edge.recipes.data.gill_words import Words, shortened, stacked, telling
from mllm_edge.recipes.parts import part_dims, part_folder, read_part
from mllm_edge.recipes.recipe import Recipe
from mllm_edge.recipes.tasks.gill_language import at_rows, final_states, headless

DRAW, LOOK = 0, 1  # in the weights' order; the heads give them the other way round
DROPPED = 0.5
AT_ONCE = 50
HEAD = "heads.decision."
ALIKE = 0.02  # rows of no text from one text encoder, kept in fp16


class DecisionModel(nn.Module):
    """The head with all captions' states, float32 [n,D], and what each asks for, int64 [n]."""

    states: Tensor
    labels: Tensor

    def __init__(self, states: Tensor, labels: Tensor):
        super().__init__()
        self.decision = nn.Linear(states.shape[1], 2)
        self.register_buffer("states", states, persistent=False)
        self.register_buffer("labels", labels, persistent=False)

    def forward(self, step: Tensor) -> dict[str, Tensor]:
        """`step` says nothing: all captions are one batch."""
        logits = self.decision(functional.dropout(self.states, DROPPED, self.training)).float()
        right = (logits.detach().argmax(-1) == self.labels).float().mean()
        return {"loss": functional.cross_entropy(logits, self.labels), "accuracy": right}


class GillDecisionTask:
    """Train the head of the GILL in `init.gill`, a folder or the name of a shipped one, on `data.captions` captions of
    the train split, half of each kind. With `init.diffusion` it draws with that run's UNet from now on, which must have
    been trained with the text encoder that the GILL's mapper speaks for."""

    def __init__(self, recipe: Recipe):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        if not recipe.init.get("gill"):
            raise BadInput("the recipe's init names no gill; add init.gill=FOLDER, a run of gill")
        self.held = resolve("gill", recipe.init["gill"])
        self.dims: GillDims = self.held.dims
        self.drawing = self._unet(recipe.init["diffusion"]) if recipe.init.get("diffusion") else {}
        self.words = Words(self.held.tokenizer)
        self.length = int(recipe.data.get("length", 64))
        many = int(recipe.data.get("captions", 600))
        if many < 2 or many % 2:
            raise BadInput(f"data.captions is {many}; give an even number")
        self.model = DecisionModel(*self.features("train", many))

    def _unet(self, folder: str) -> dict[str, Tensor]:
        """That run's UNet, under our names. Raises BadInput where its text encoder or its size is another."""
        text = text_encoder(TextDims(**part_dims(folder, "text_encoder")))
        text.load_state_dict(read_part(folder, "text_encoder"))
        ids = torch.from_numpy(caption_ids(read_caption_tokenizer(part_folder(folder) / TOKENIZER), [""]))
        with torch.no_grad():
            empty, own = text(ids).last_hidden_state, self.held.tensors["empty_text"].float()
        tensors = {f"unet.{name}": tensor for name, tensor in read_part(folder, "unet").items()}
        held = {name: self.held.tensors[name].shape for name in self.held.tensors if name.startswith("unet.")}
        alike = empty.shape == own.shape and torch.allclose(empty, own, atol=ALIKE)
        if not alike or {name: tensor.shape for name, tensor in tensors.items()} != held:
            raise BadInput(f"init.diffusion={folder} has another text encoder or size than the GILL; train gill again")
        return tensors

    def features(self, split: str, many: int) -> tuple[Tensor, Tensor]:
        """States at [IMG0] of captions and picture tokens, float32 [n,D], and labels, int64 [n], by turns."""
        labels = [(DRAW, LOOK)[index % 2] for index in range(many)]
        scenes = [
            (few_things if label == DRAW else fuller_scene)(split, index, self.recipe.seed)
            for index, label in enumerate(labels)
        ]
        texts = [told(scene, index, self.recipe.seed) for index, scene in enumerate(scenes)]
        decoder = opt_of(self.held.tensors, self.dims)
        table, start = decoder.get_input_embeddings().weight, self.dims.start
        found = []
        with torch.no_grad():
            for first in range(0, many, AT_ONCE):
                captions = [shortened(self.words.ids(text), self.length) for text in texts[first : first + AT_ONCE]]
                ids, _ = stacked(telling((caption,), start) for caption in captions)
                found.append(final_states(decoder, at_rows(table, ids, table[:0]))[ids == start])
        return torch.cat(found), torch.tensor(labels)

    def parameters(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters()), "weight_decay": 0.0}]

    def sample(self, index: int) -> int:
        return index

    def collate(self, samples: Sequence[int]) -> dict[str, Tensor]:
        return {"step": torch.tensor(samples)}

    @torch.no_grad()
    def evaluate(self, samples: int) -> dict[str, float]:
        """Accuracy and the mean F1 of both decisions on captions of the test split."""
        states, labels = self.features("test", samples)
        found = self.model.decision(states.to(self.model.states.device)).argmax(-1).cpu()
        return {
            "accuracy": round(float((found == labels).float().mean()), 4),
            "macro_f1": round(macro_f1(found, labels), 4),
        }

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """The whole GILL with its new head."""
        tensors = {name: self.held.tensors[name] for name in self.held.tensors} | self.drawing
        tensors |= {HEAD + name: state[f"decision.{name}"] for name in ("weight", "bias")}
        dims = replace(self.dims, decides=True)
        save_gill(folder, self.held.config, dims, tensors, self.held.tokenizer, getattr(torch, self.recipe.dtype))


def opt_of(tensors: Mapping[str, Tensor], dims: GillDims) -> Any:
    """The OPT of a checkpoint, in fp32, without its head."""
    decoder = headless(dims.language)
    decoder.load_state_dict({name: tensors[LM + name].float() for name in decoder.state_dict()})
    return decoder.eval()


def macro_f1(found: Tensor, labels: Tensor) -> float:
    """The mean of both classes' F1, 0 where a class is neither found nor there."""
    each = []
    for kind in (DRAW, LOOK):
        hits = int(((found == kind) & (labels == kind)).sum())
        named = int((found == kind).sum()) + int((labels == kind).sum())
        each.append(2 * hits / named if named else 0.0)
    return sum(each) / len(each)
