"""Recipe task `naming`: a connector learns to say what a picture shows in the decoder's own word embeddings.

Before the stages of LLaVA, and without the decoder: the mean of a picture's embeddings is compared with those of all
names in the data, as CLIP compares pictures and texts (Radford et al. 2021, arXiv 2103.00020). A small decoder then
finds known words in the picture instead of learning a language of pictures, which takes many more steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.encoders import vision_encoder
from mllm_edge.models.llava import CONFIGS, LlavaDims, connector, preprocessing
from mllm_edge.recipes.language import read_vocabulary
from mllm_edge.recipes.readers import Conversation, read_llava
from mllm_edge.recipes.recipe import Recipe
from mllm_edge.recipes.weights import read_part, save_part, tokenizer_folder
from mllm_edge.runtime.images import load_image
from mllm_edge.runtime.preprocess import preprocess

Features = np.ndarray[Any, np.dtype[np.float16]]
WORD_SCALE = 2.0  # how long a picture's embeddings end up, in deviations of the words'
TEMPERATURE = 0.07  # CLIP's first


class NamingModel(nn.Module):
    """A connector, and a fixed direction for each name."""

    names: Tensor

    def __init__(self, dims: LlavaDims, names: Tensor):
        super().__init__()
        self.connector = connector(dims.connector, dims.vision.width, dims.language.width)
        self.scale = nn.Parameter(torch.tensor(1 / TEMPERATURE).log())
        self.register_buffer("names", functional.normalize(names, dim=-1))

    def forward(self, features: Tensor, name: Tensor) -> dict[str, Tensor]:
        """`loss` and `accuracy` of pictures' features [B,N,Dv] that show the things number `name`, int64 [B]."""
        mean = functional.normalize(self.connector(features).mean(dim=1).float(), dim=-1)
        logits = mean @ self.names.T * self.scale.exp()
        right = (logits.argmax(-1) == name).float().mean()
        return {"loss": functional.cross_entropy(logits, name), "accuracy": right}


class NamingTask:
    """Trains the connector of `recipe.config` on conversations whose first answer is a name."""

    def __init__(self, recipe: Recipe):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.dims = CONFIGS[recipe.config]
        if "conversations" not in recipe.data:
            raise BadInput("this recipe needs data.conversations=FILE.json, whose answers are names")
        self.conversations = self._read(recipe.data["conversations"])
        self.names = sorted({named(entry) for entry in self.conversations})
        self.number = {name: number for number, name in enumerate(self.names)}
        self.words = read_part(recipe.init["language_model"], "language_model")["model.embed_tokens.weight"]
        vocabulary = read_vocabulary(tokenizer_folder(recipe.init["language_model"]))
        means = torch.stack([self.words[vocabulary.ids(f" {name}")].mean(dim=0) for name in self.names])
        self.model = NamingModel(self.dims, means - self.words.mean(dim=0))
        self.vision_encoder = vision_encoder(self.dims.vision).requires_grad_(False).eval()
        self.vision_encoder.load_state_dict(read_part(recipe.init["vision_encoder"], "vision_encoder"))
        self._features: dict[Path, Features] = {}  # of a frozen encoder: computed in the first epoch, then known

    def _read(self, file: str) -> list[Conversation]:
        return list(read_llava(Path(file), Path(self.recipe.data.get("images", "."))))

    def parameters(self) -> list[dict[str, Any]]:
        return [{"params": [*self.model.connector.parameters(), self.model.scale]}]

    def sample(self, index: int) -> tuple[Features, int]:
        epoch, place = divmod(index, len(self.conversations))
        order = np.random.default_rng([self.recipe.seed, 29, epoch]).permutation(len(self.conversations))
        return self._one(self.conversations[order[place]])

    @torch.no_grad()
    def _one(self, entry: Conversation) -> tuple[Features, int]:
        if entry.image is None:
            raise BadInput("a conversation without a picture teaches no name; take it out of the data")
        if entry.image not in self._features:
            pixel_values = torch.from_numpy(preprocess(load_image(entry.image), preprocessing(self.dims)))
            self._features[entry.image] = self.vision_encoder(pixel_values)[0].half().numpy()
        return self._features[entry.image], self.number[named(entry)]

    def collate(self, samples: Sequence[tuple[Features, int]]) -> dict[str, Tensor]:
        features, numbers = zip(*samples, strict=True)
        return {"features": torch.from_numpy(np.stack(features)).float(), "name": torch.tensor(numbers)}

    @torch.no_grad()
    def evaluate(self, samples: int) -> dict[str, float]:
        """Share of right names, out of all, on the files of `data.tests` (up to `samples` pictures of each)."""
        metrics = {}
        for file in self.recipe.data.get("tests", []):
            entries = [entry for entry in self._read(file) if named(entry) in self.number][:samples]
            right = [float(self.model(**self.collate([self._one(entry)]))["accuracy"]) for entry in entries]
            metrics[Path(file).stem] = round(sum(right) / max(1, len(right)), 4)
        return metrics

    @torch.no_grad()
    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        *_, last = [name for name in state if name.startswith("connector.") and name.endswith("weight")]
        batch = self.collate([self.sample(index) for index in range(32)])
        embeds = self.model.connector(batch["features"])
        gain = WORD_SCALE * self.words.std() / embeds.std()  # the comparison leaves the length open
        state = {**state, **{name: state[name] * gain for name in (last, last.replace("weight", "bias"))}}
        save_part(folder, "connector", {"kind": self.dims.connector}, state, "connector.", self.recipe.dtype)


def named(entry: Conversation) -> str:
    """The name in the first answer: "A red apple." names a "red apple"."""
    words = entry.turns[0][1].rstrip(".").lower().split()
    return " ".join(words[1:] if words[:1] in (["a"], ["an"]) and len(words) > 1 else words)
