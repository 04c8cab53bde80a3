"""LION in our own layout and its authors' (`original.py`), InstructBLIP and BLIP-2 in transformers' (`blip.py`).

In ours the T5's tokenizer lies in the checkpoint's folder, the Q-Former's in its folder `question`, and the tagger's
words are in `tags.json`.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_edge.checkpoints.tensors import Tensors, check_all_used, check_shapes, open_folder, read_json
from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.eva import EvaDims
from mllm_edge.models.blocks.qformer import QFormerDims
from mllm_edge.models.blocks.swin import SwinDims
from mllm_edge.models.fields import bounded, refuse_quantized, well_typed
from mllm_edge.models.language.t5 import T5Dims
from mllm_edge.models.layouts import OURS, copy_tokenizer, opened, save, tokenizer_of
from mllm_edge.models.lion.blip import KINDS, READER, open_blip
from mllm_edge.models.lion.model import LionDims, TaggerDims, tensor_shapes
from mllm_edge.models.lion.original import BERT, is_original, open_original, original_tags
from mllm_edge.models.plan import Checkpoint

if TYPE_CHECKING:
    import torch

TAGS, QUESTION = "tags.json", "question"


def load(folder: Path) -> Checkpoint:
    """Open a folder in our layout.

    Raises:
        BadInput: not LION (what it is instead is named), missing or misfit tensors.
    """
    if is_original(folder):
        dims, tensors, t5 = open_original(folder)
        check_shapes(tensors, tensor_shapes(dims), str(folder))
        return opened("lion", folder, {}, dims, tensors, [folder, t5], t5)
    config = read_json(folder / "config.json")
    if config.get("model_type") in KINDS:
        refuse_quantized(config, folder / "config.json")
        dims, tensors = open_blip(folder, config)
        check_shapes(tensors, tensor_shapes(dims), str(folder))
        return opened("lion", folder, config, dims, tensors, [folder], tokenizer_of([folder]))
    if config.get(OURS) != "lion":
        raise BadInput(f"{folder} holds no LION, neither in our layout nor its authors'; give a checkpoint's folder")
    refuse_quantized(config, folder / "config.json")
    dims, tensors = _ours(folder, config)
    check_shapes(tensors, tensor_shapes(dims), str(folder))
    check_all_used(tensors, tensor_shapes(dims), {}, str(folder))
    return opened("lion", folder, config, dims, tensors, [folder, folder / QUESTION], tokenizer_of([folder]))


def tags_of(tokenizer: Path) -> tuple[list[str], list[float]]:
    """The tagger's words and their thresholds, of a checkpoint with its T5's tokenizer there: from `tags.json` in our
    layout, from RAM's two lists in the authors'.

    Raises:
        BadInput: they are missing, or differ in length.
    """
    if not (tokenizer / TAGS).is_file() and is_original(tokenizer.parent):
        return original_tags(tokenizer.parent)
    data = read_json(tokenizer / TAGS)
    tags, thresholds = data.get("tags"), data.get("thresholds")
    if not isinstance(tags, list) or not isinstance(thresholds, list) or len(tags) != len(thresholds):
        raise BadInput(f"{tokenizer / TAGS} must hold as many thresholds as tags; copy it again")
    return [str(tag) for tag in tags], [float(value) for value in thresholds]


def question_tokenizer(tokenizer: Path) -> Path:
    """The Q-Former's `tokenizer.json`, of a checkpoint with its T5's tokenizer there."""
    places = (tokenizer / QUESTION, tokenizer / READER, tokenizer.parent / BERT)
    return next((place for place in places if place.is_dir()), places[0]) / "tokenizer.json"


def save_lion(
    folder: Path, name: str, dims: LionDims, state: Mapping[str, torch.Tensor], tokenizer: Path, dtype: torch.dtype
) -> None:
    """Write our own layout, with the tokenizers and tags of the folder `tokenizer`."""
    shape = _without_zeros(dataclasses.asdict(dims))
    save(folder, "lion", shape, {key: state[key] for key in tensor_shapes(dims)}, dtype, name=name)
    copy_tokenizer(tokenizer, folder)
    if (tokenizer / QUESTION).is_dir():
        (folder / QUESTION).mkdir(exist_ok=True)
        copy_tokenizer(tokenizer / QUESTION, folder / QUESTION)
    if (tokenizer / TAGS).is_file():
        shutil.copy(tokenizer / TAGS, folder / TAGS)


def _without_zeros(dims: dict[str, Any]) -> dict[str, Any]:
    """Dims but for those that are 0 or None, as they are by default where they may be."""
    return {
        key: _without_zeros(value) if isinstance(value, dict) else value
        for key, value in dims.items()
        if value not in (0, None) or isinstance(value, bool)
    }


def _ours(folder: Path, config: dict[str, Any]) -> tuple[LionDims, Tensors]:
    where = folder / "config.json"
    bounded(config.get("dims"), where)
    try:
        data = dict(config["dims"])
        vision, tagger = data.pop("vision"), data.pop("tagger", None)
        if tagger:
            swin = tagger.pop("swin")
            swin = SwinDims(**{**swin, "depths": tuple(swin["depths"]), "heads": tuple(swin["heads"])})
            tagger = TaggerDims(swin=swin, **tagger)
        dims = LionDims(
            vision=EvaDims(**{**vision, "taps": tuple(vision["taps"])}),
            qformer=QFormerDims(**data.pop("qformer")),
            language=T5Dims(**data.pop("language")),
            levels=tuple(data.pop("levels")),
            tagger=tagger,
            **data,
        )
        well_typed(dims, where)
        return dims, open_folder(folder)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{where} does not describe lion's dims ({error}); train or copy it again") from None
