"""Recipe task `naming`: trains a connector to express what a picture shows in the decoder's own word embeddings.

It runs before the stages of LLaVA and without the decoder: the mean of a picture's embeddings is compared with those of
all names in the data, as CLIP compares pictures and texts (Radford et al. 2021, arXiv 2103.00020). A small decoder then
finds known words in the picture instead of learning new embeddings, which takes many more steps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.encoders import vision_encoder
from mllm_edge.models.llava.model import CONFIGS, LlavaDims
from mllm_edge.models.llava.plan import preprocessing
from mllm_edge.recipes.data.pictures.compose import TrainingPictures
from mllm_edge.recipes.data.readers import Conversation, read_llava
from mllm_edge.recipes.data.vocabulary import read_vocabulary
from mllm_edge.recipes.modules import hide_channels, unit_variance
from mllm_edge.recipes.parts import read_part, save_part, tokenizer_folder
from mllm_edge.recipes.recipe import Recipe
from mllm_edge.recipes.trainer import native_bf16
from mllm_edge.runtime.images import load_image
from mllm_edge.runtime.preprocess import preprocess

Features = np.ndarray[Any, np.dtype[np.float16]]
ENCODED = 64  # pictures per encoder batch
SMOOTHING = 0.1  # label smoothing: there are many names, some with nearly the same meaning
WHITENED = 0.1  # share of the names' mean variance added to each variance before whitening
WORD_SCALE = 2.0  # final scale of a picture's embeddings, in standard deviations of the words'
TEMPERATURE = 1 / 30
NEARNESS = 10.0  # weight of 1 - cosine with the name's own embedding, which the decoder reads


class NamingModel(nn.Module):
    """A connector, and a fixed direction for each name."""

    names: Tensor
    white: Tensor

    def __init__(self, dims: LlavaDims, names: Tensor, hidden: float = 0.0):
        super().__init__()
        self.hidden = hidden
        self.connector = dims.projector()
        self.register_buffer("names", names - names.mean(dim=0))
        self.register_buffer("white", whitening(names))

    def forward(self, features: Tensor, name: Tensor) -> dict[str, Tensor]:
        """`loss` and `accuracy` for features [B,N,Dv] of pictures with the indices of their names, int64 [B]."""
        mean = self.connector(hide_channels(features, self.hidden, self.training)).float().mean(dim=1)  # [B,D]
        with torch.autocast(mean.device.type, enabled=False):
            directions = functional.normalize(self.names @ self.white, dim=-1)  # [n,D]
            logits = functional.normalize(mean @ self.white, dim=-1) @ directions.T / TEMPERATURE  # [B,n]
            cosine = functional.cosine_similarity(mean, self.names[name]).mean()
            apart = functional.cross_entropy(logits, name, label_smoothing=SMOOTHING)
        right = (logits.argmax(-1) == name).float().mean()
        return {"loss": apart + NEARNESS * (1 - cosine), "accuracy": right, "cosine": cosine.detach()}


def whitening(names: Tensor) -> Tensor:
    """A symmetric matrix [D,D] that gives the names' embeddings [n,D] about equal variance in every direction.

    Words share a few dominant directions, which make all names similar by cosine.
    """
    centered = names - names.mean(dim=0)
    values, vectors = torch.linalg.eigh(centered.T @ centered / len(names))
    return vectors @ torch.diag((values + WHITENED * values.mean()) ** -0.5) @ vectors.T


class NamingTask:
    """Trains the connector of `recipe.config` on conversations whose first answer is a name.

    The encoder is frozen, so its features are computed once and kept in `features.npy` of the run, `data.variations`
    times for every picture (drawings get a different background each time, see `TrainingPictures`).
    """

    def __init__(self, recipe: Recipe):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.dims = CONFIGS[recipe.config]
        if "conversations" not in recipe.data:
            raise BadInput("this recipe needs data.conversations=FILE.json, whose answers are names")
        self.conversations = self._read(recipe.data["conversations"])
        self.variations = int(recipe.data.get("variations", 1))
        self.pictures = TrainingPictures(recipe.data.get("grounds", ""))
        self.names = sorted({named(entry) for entry in self.conversations})
        self.number = {name: number for number, name in enumerate(self.names)}
        self.words = read_part(recipe.init["language_model"], "language_model")["model.embed_tokens.weight"]
        vocabulary = read_vocabulary(tokenizer_folder(recipe.init["language_model"]))
        means = torch.stack([self.words[vocabulary.ids(f" {name}")].mean(dim=0) for name in self.names])
        hidden = float(recipe.data.get("hidden_channels", 0.0))
        self.model = NamingModel(self.dims, means - self.words.mean(dim=0), hidden)
        self.vision_encoder = vision_encoder(self.dims.vision).requires_grad_(False).eval()
        self.vision_encoder.load_state_dict(read_part(recipe.init["vision_encoder"], "vision_encoder"))
        self.features = self._known_features(Path(recipe.out))
        sample = self.features[:: max(1, len(self.features) // ENCODED)][:ENCODED]
        unit_variance(self.model.connector, torch.from_numpy(np.array(sample)).float())

    def _read(self, file: str) -> list[Conversation]:
        return list(read_llava(Path(file), Path(self.recipe.data.get("images", "."))))

    @torch.no_grad()
    def _known_features(self, out: Path) -> Features:
        """Features of every conversation's picture, by variation; a finished file of the same data is reused."""
        file, sketch = out / "features.npy", out / "features.json"
        made_from = json.dumps([self.recipe.seed, self.variations, self.dims.vision.patches, self._identity()])
        if file.is_file() and sketch.is_file() and sketch.read_text(encoding="utf-8") == made_from:
            return np.load(file, mmap_mode="r")
        out.mkdir(parents=True, exist_ok=True)
        sketch.unlink(missing_ok=True)
        number = self.variations * len(self.conversations)
        shape = (number, self.dims.vision.patches, self.dims.vision.width)
        features = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=shape)
        for start in track(range(0, number, ENCODED), "pictures seen by the encoder", console=Console(stderr=True)):
            stop = min(start + ENCODED, number)
            features[start:stop] = self._encode([self._picture(index) for index in range(start, stop)])
        features.flush()
        sketch.write_text(made_from, encoding="utf-8")
        return features

    def _identity(self) -> str:
        text = repr([(str(entry.image), named(entry)) for entry in self.conversations])
        return hashlib.sha256(text.encode()).hexdigest()

    def _picture(self, index: int) -> Image.Image:
        entry = self.conversations[index % len(self.conversations)]
        if entry.image is None:
            raise BadInput("a conversation without a picture teaches no name; take it out of the data")
        return self.pictures.open(entry.image, np.random.default_rng([self.recipe.seed, 37, index]))

    @torch.no_grad()
    def _encode(self, pictures: list[Image.Image]) -> Features:
        pixels = np.concatenate([preprocess(picture, preprocessing(self.dims)) for picture in pictures])
        values = torch.from_numpy(pixels).contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU
        with torch.autocast("cpu", torch.bfloat16, enabled=native_bf16() and self.recipe.precision != "fp32"):
            return self.vision_encoder(values).float().half().numpy()

    def parameters(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.connector.parameters())}]

    def sample(self, index: int) -> tuple[Features, int]:
        epoch, place = divmod(index, len(self.conversations))
        rng = np.random.default_rng([self.recipe.seed, 29, epoch])
        number = int(rng.permutation(len(self.conversations))[place])
        variation = int(np.random.default_rng([self.recipe.seed, 41, index]).integers(self.variations))
        features = self.features[variation * len(self.conversations) + number]
        return features, self.number[named(self.conversations[number])]

    def collate(self, samples: Sequence[tuple[Features, int]]) -> dict[str, Tensor]:
        features, numbers = zip(*samples, strict=True)
        return {"features": torch.from_numpy(np.stack(features)).float(), "name": torch.tensor(numbers)}

    @torch.no_grad()
    def evaluate(self, samples: int) -> dict[str, float]:
        """Share of right names, out of all, on the files of `data.tests` (up to `samples` pictures of each)."""
        metrics = {}
        for file in self.recipe.data.get("tests", []):
            entries = [entry for entry in self._read(file) if named(entry) in self.number][:samples]
            right = 0.0
            for entry in entries:
                assert entry.image  # named pictures, like the training data
                features = self._encode([load_image(entry.image)])[0]
                right += float(self.model(**self.collate([(features, self.number[named(entry)])]))["accuracy"])
            metrics[Path(file).stem] = round(right / max(1, len(entries)), 4)
        return metrics

    @torch.no_grad()
    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        *_, last = [name for name in state if name.startswith("connector.") and name.endswith("weight")]
        batch = self.collate([self.sample(index) for index in range(32)])
        embeds = self.model.connector(batch["features"])
        gain = WORD_SCALE * self.words.std() / embeds.std()  # the cosine leaves the scale free
        state = {**state, **{name: state[name] * gain for name in (last, last.replace("weight", "bias"))}}
        save_part(folder, "connector", {"kind": self.dims.connector}, state, "connector.", self.recipe.dtype)


def named(entry: Conversation) -> str:
    """The name in the first answer: "A red apple." names a "red apple"."""
    words = entry.turns[0][1].rstrip(".").lower().split()
    return " ".join(words[1:] if words[:1] in (["a"], ["an"]) and len(words) > 1 else words)
