"""What each config of a system weighs and costs: counted once and shipped, so that planning needs no PyTorch.

`python -m mllm_edge.export.counting` writes the files anew; a test compares them with the modules.
"""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import dataclass

from mllm_edge import models
from mllm_edge.errors import look_up
from mllm_edge.models.language.reference import DecoderDims
from mllm_edge.typed_json import typed

FILE = "counts.json"


@dataclass(frozen=True)
class StageCounts:
    """A stage: weights, floating-point operations of a call, the precisions that it can have, and whether a picture's
    place in the prompt needs it (`early`)."""

    name: str
    weights: int
    flops: int
    precisions: list[str]
    early: bool


@dataclass(frozen=True)
class LanguageModelCounts:
    """The counts of a language model: see `DecoderDims`."""

    vocabulary: int
    width: int
    context: int
    layers: int
    kv_width: int
    attention_width: int
    weights: int
    product_weights: int
    prompt_weights: int


@dataclass(frozen=True)
class Counts:
    """One config; `picture_tokens` are the positions that a picture takes in the prompt, `engines` (of
    `quants.ENGINES`) those that run its language model, the usual one first."""

    picture_tokens: int
    stages: list[StageCounts]
    language_model: LanguageModelCounts
    engines: list[str]


def counts(system: str, config: str) -> Counts:
    """Read a config's counts. Raises BadInput, with the known names, for a system or config that is unknown."""
    package = importlib.resources.files(f"mllm_edge.models.{models.get(system).name}")
    text = (package / FILE).read_text(encoding="utf-8")
    table: dict[str, Counts] = typed(dict[str, Counts], json.loads(text), FILE)
    return look_up(f"config of {system}", config, table)


def kv_bytes_per_token(dims: DecoderDims, bytes_per_number: float = 2) -> int:
    """Bytes of one position's keys and values."""
    return int(2 * dims.layers * dims.kv_width * bytes_per_number)
