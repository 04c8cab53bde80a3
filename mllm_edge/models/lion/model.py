"""LION: two levels of visual knowledge for an encoder-decoder (Chen et al. 2024, arXiv 2311.11860).

A Q-Former that reads the question gives the level of the whole picture, the Vision Aggregator that of its regions; a
mixture of adapters in the T5, chosen by the type of task, keeps their tasks from spoiling each other; tags of a frozen
tagger enter the prompt behind a learned vector. Parameters of the published file map one to one (`layouts.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mllm_edge.models.blocks.bert import BertDims, BertLayer
from mllm_edge.models.blocks.eva import EvaDims, EvaEncoder
from mllm_edge.models.blocks.qformer import QFormer, QFormerDims
from mllm_edge.models.blocks.swin import Swin, SwinDims
from mllm_edge.models.language.t5 import T5, T5Dims
from mllm_edge.models.parts import filled
from mllm_edge.models.plan import Checkpoint

REGION, IMAGE = 0, 1  # types of tasks, the router's rows


@dataclass(frozen=True)
class TaggerDims:
    """Shape of RAM: a Swin whose features `tags` queries of `label_width` read in `layers` layers."""

    swin: SwinDims
    tags: int
    label_width: int = 512
    width: int = 768
    heads: int = 4
    mlp_width: int = 3072
    layers: int = 2


@dataclass(frozen=True)
class LionDims:
    """The whole system's shape. `levels` are the kinds of visual knowledge that the T5 reads: "query" (Q-Former),
    "region" (Vision Aggregator) or both; `question_length` is the most tokens of a question that the Q-Former reads,
    `norm_eps` that of the norm before it; with `tags` there is a learned vector for the prompt that has them. Answers
    are searched with `beams` and `repeat_penalty`, by default the paper's."""

    vision: EvaDims
    qformer: QFormerDims
    language: T5Dims
    aggregator_heads: int = 16
    aggregator_mlp: int = 3072
    levels: tuple[str, ...] = ("query", "region")
    question_length: int = 128
    tagger: TaggerDims | None = None
    tags: bool = True
    norm_eps: float = 1e-5
    beams: int = 5
    repeat_penalty: float = 1.5

    @property
    def aggregator(self) -> BertDims:
        """Dims of the aggregator's layers, which read features as wide as their own."""
        width = self.vision.width
        return BertDims(width, self.aggregator_heads, self.aggregator_mlp, cross_width=width)

    @property
    def visual_tokens(self) -> int:
        """Rows that a picture takes in the prompt."""
        return ("query" in self.levels) * self.qformer.queries + ("region" in self.levels) * (self.vision.patches + 1)


class Aggregator(nn.Module):
    """Features of the last tap, gathered with those of the other two, in the T5's space.

    The layers look both ways; the original flags them as a decoder's only to have cross-attention.
    """

    def __init__(self, dims: LionDims):
        super().__init__()
        width, out = dims.vision.width, dims.language.width
        self.blocks = nn.ModuleList(BertLayer(dims.aggregator) for _ in dims.vision.taps[1:])
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, out))
        for block in self.blocks:  # at first each layer is three norms of its input
            for name, parameter in block.named_parameters():
                if "output.dense" in name:
                    nn.init.zeros_(parameter)

    def forward(self, last: Tensor, *others: Tensor) -> Tensor:
        """[B,1+N,Dv] of each tap, the last block's first -> [B,1+N,D]."""
        for block, tap in zip(self.blocks, others, strict=True):
            last = block(last, tap)
        rows: Tensor = self.proj(self.norm(last))
        return rows


class Queries(nn.Module):
    """The Q-Former between its norm and its projection into the T5's space."""

    def __init__(self, dims: LionDims):
        super().__init__()
        self.norm = nn.LayerNorm(dims.vision.width, eps=dims.norm_eps)
        self.qformer = QFormer(dims.qformer)
        self.proj = nn.Linear(dims.qformer.width, dims.language.width)

    def forward(self, features: Tensor, *question: Tensor) -> Tensor:
        """`features` [B,1+N,Dv] of the last tap; `question` int64 [B,L] padded with 0, where the Q-Former reads words
        -> [B,Q,D]."""
        heard = [question[0], (question[0] != 0).to(features.dtype)] if question else []
        rows: Tensor = self.proj(self.qformer(self.norm(features), *heard))
        return rows


class Tagger(nn.Module):
    """RAM: how likely each tag is for a picture (Zhang et al. 2023, `ram/models/ram.py`)."""

    def __init__(self, dims: TaggerDims):
        super().__init__()
        layer = BertDims(dims.width, dims.heads, dims.mlp_width, cross_width=dims.label_width, looks_inside=False)
        self.visual_encoder = Swin(dims.swin)
        self.image_proj = nn.Linear(dims.swin.out_width, dims.label_width)
        self.label_embed = nn.Parameter(torch.randn(dims.tags, dims.label_width) * 0.02)
        self.wordvec_proj = nn.Linear(dims.label_width, dims.width)
        self.layers = nn.ModuleList(BertLayer(layer) for _ in range(dims.layers))
        self.fc = nn.Linear(dims.width, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B,3,S,S] -> chances [B,n], n tags."""
        return self.read(self.visual_encoder(pixel_values))

    def read(self, features: Tensor) -> Tensor:
        """The Swin's features [B,N,C] -> chances [B,n]."""
        features = torch.cat([features.mean(dim=1, keepdim=True), features], dim=1)  # [B,1+N,C]
        read = self.image_proj(features)
        x = torch.relu(self.wordvec_proj(self.label_embed)).expand(len(read), -1, -1)  # [B,n,width]
        for layer in self.layers:
            x = layer(x, read)
        return torch.sigmoid(self.fc(x)).squeeze(-1)


class Lion(nn.Module):
    """All parts but the tagger, for training and as the reference of every parity check."""

    def __init__(self, dims: LionDims):
        super().__init__()
        self.dims = dims
        self.vision_encoder = EvaEncoder(dims.vision)
        if "query" in dims.levels:
            self.queries = Queries(dims)
        if "region" in dims.levels:
            self.aggregator = Aggregator(dims)
        if dims.tags:
            self.soft_prompt = nn.Parameter(torch.randn(dims.language.width) * 0.02)
        self.language_model = T5(dims.language)

    def look(self, pixel_values: Tensor, *question: Tensor) -> Tensor:
        """[B,3,S,S] and the Q-Former's ids [B,L], if it reads any -> the rows of a picture in the prompt [B,M,D]."""
        taps = self.vision_encoder(pixel_values)
        rows = []
        if "query" in self.dims.levels:
            rows.append(self.queries(taps[0], *question))
        if "region" in self.dims.levels:
            rows.append(self.aggregator(*taps))
        return torch.cat(rows, dim=1)

    def embed(self, ids: Tensor, soft: int) -> Tensor:
        """Rows of the table [B,T,D], the learned vector where an id is `soft`."""
        rows: Tensor = self.language_model.shared(ids)
        return torch.where((ids == soft).unsqueeze(-1), self.soft_prompt.to(rows.dtype), rows)

    def forward(self, visual: Tensor, text: Tensor, mask: Tensor, answer: Tensor, task: Tensor) -> Tensor:
        """Logits [B,T,V] of an answer's ids [B,T], shifted by the start token.

        `visual` [B,M,D], `text` [B,L,D] with `mask` [B,L], `task` float [2], 1 at the type of this batch.
        """
        prompt = torch.cat([visual, text.to(visual.dtype)], dim=1)
        seen = torch.cat([mask.new_ones(visual.shape[:2]), mask], dim=1)
        model = self.language_model
        choice = task if self.dims.language.bottleneck else None
        encoded = model.encoder(prompt, choice, seen)
        states, _ = model.decoder(model.shared(answer), model.decoder.cross(encoded), task=choice, mask=seen)
        return model.logits(states)


EVA_G = EvaDims(image_size=224, patch_size=14, width=1408, heads=16, mlp_width=6144, taps=(38, 28, 18))
RAM = TaggerDims(SwinDims(384, 192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12), tags=4585)
_QFORMER = QFormerDims(
    width=768, layers=12, heads=12, mlp_width=3072, queries=32, read_width=1408, vocabulary=30523, positions=512
)


def _flan(width: int, ffn_width: int, heads: int) -> T5Dims:
    """Flan-T5 as LION uses it: exact GELU, two adapters of 64."""
    return T5Dims(32128, width, ffn_width, 24, heads, 64, activation="gelu", bottleneck=64)


CONFIGS: dict[str, LionDims] = {
    "tiny": LionDims(
        EvaDims(image_size=128, patch_size=16, width=192, heads=3, mlp_width=768, taps=(4, 3, 2)),
        QFormerDims(96, 4, 3, 128, queries=16, read_width=192, vocabulary=320, positions=48),
        T5Dims(384, 160, 256, 3, 4, 40, context=512, activation="gelu", bottleneck=16),
        aggregator_heads=3,
        aggregator_mlp=192,
        question_length=48,
        beams=1,
        repeat_penalty=1.0,
        tagger=TaggerDims(SwinDims(96, 32, (2, 2), (2, 4), window=6), tags=16, label_width=32, width=64, mlp_width=128),
    ),
    "4b": LionDims(EVA_G, _QFORMER, _flan(2048, 5120, 32), tagger=RAM),
    "12b": LionDims(EVA_G, _QFORMER, _flan(4096, 10240, 64), tagger=RAM),
}


SHIPPED = ("tiny",)  # configs whose weights ship with the package


def tensor_shapes(dims: LionDims) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of the system, without allocating any."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Lion(dims).state_dict().items()}
        if dims.tagger:
            shapes |= {f"tagger.{name}": tuple(t.shape) for name, t in Tagger(dims.tagger).state_dict().items()}
    return shapes


def build(checkpoint: Checkpoint) -> nn.Module:
    """All parts but the tagger with the checkpoint's weights, in fp32."""
    return filled(Lion(checkpoint.dims), checkpoint.tensors)
