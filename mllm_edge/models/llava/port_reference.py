"""transformers' own classes as the reference of a checkpoint in its layout.

They are loaded from the folder by transformers' own code: what our loader or our reading of the config mistakes differs
in parity. Each reference holds its part alone: the decoder of the one for pictures, and CLIP of the one for words, have
no layers.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm_edge.checkpoints.tensors import Tensors, some
from mllm_edge.errors import BadInput, first_line

_PICTURES = ("vision_tower.", "multi_modal_projector.")


class _Eyes(nn.Module):
    """CLIP's hidden state that LLaVA reads, without the class token (`LlavaModel.get_image_features`)."""

    def __init__(self, clip: nn.Module, layer: int):
        super().__init__()
        self.clip, self.layer = clip, layer

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B,3,S,S] -> [B,N,D]."""
        states: Tensor = self.clip(pixel_values, output_hidden_states=True).hidden_states[self.layer]
        return states[:, 1:]


def references(
    config: Any, folder: Path, vocabulary: int, numbers: Tensors | None
) -> Mapping[str, Callable[[], nn.Module]]:
    """By part, what builds transformers' module with a checkpoint's weights, in fp32.

    Args:
        config: transformers' `LlavaConfig` of the folder.
        folder: the checkpoint's.
        vocabulary: rows of its embedding table.
        numbers: what its weights stand for under their own names, where they are codes. The language model then has
            no reference here: transformers takes such numbers as a whole, a second time in memory.

    Returns:
        "vision_encoder", "connector" and "language_model" (`LlavaForConditionalGeneration`, which reads embeddings).
        Each raises BadInput where transformers does not load it.
    """

    def pictures() -> Any:
        small = _plain(config, vocabulary)
        small.text_config.num_hidden_layers = 0
        state = None
        if numbers is not None:
            state = {name: numbers[name] for name in numbers if any(part in name for part in _PICTURES)}
        return _loaded(small, folder, state, lambda name: _is_read(name, config)).model

    def eyes() -> nn.Module:
        return _Eyes(pictures().vision_tower, config.vision_feature_layer)

    def projector() -> nn.Module:
        module: nn.Module = pictures().multi_modal_projector
        return module

    def words() -> nn.Module:
        small = _plain(config, vocabulary)
        small.vision_config.num_hidden_layers = 0
        module: nn.Module = _loaded(small, folder, None, lambda name: not any(part in name for part in _PICTURES))
        return module

    by_name = {"vision_encoder": eyes, "connector": projector}
    return by_name if numbers is not None else {**by_name, "language_model": words}


def _plain(config: Any, vocabulary: int) -> Any:
    """A copy whose weights are numbers."""
    plain = copy.deepcopy(config)
    plain.text_config.vocab_size = vocabulary
    for one in (plain, plain.text_config, plain.vision_config):
        if hasattr(one, "quantization_config"):
            del one.quantization_config
    return plain


def _is_read(name: str, config: Any) -> bool:
    """Whether a tensor of transformers' LLaVA has an effect on a picture's embeddings."""
    layer, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    number = re.search(r"encoder\.layers\.(\d+)\.", name)
    late = "post_layernorm" in name or (number and int(number[1]) >= (layer if layer >= 0 else layers + 1 + layer))
    return any(part in name for part in _PICTURES) and not late


def _loaded(config: Any, folder: Path, state: dict[str, Tensor] | None, is_needed: Callable[[str], bool]) -> Any:
    """`LlavaForConditionalGeneration` of a folder, or of `state` where there is one."""
    from transformers import LlavaForConditionalGeneration

    how = {"config": config, "dtype": torch.float32, "local_files_only": True, "output_loading_info": True}
    with _quiet():
        try:
            load: Any = LlavaForConditionalGeneration.from_pretrained  # of two results with output_loading_info
            model, told = load(None if state is not None else str(folder), state_dict=state, **how)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"transformers does not load {folder} ({first_line(error)}); copy it again") from None
    missing = sorted(name for name in told["missing_keys"] if is_needed(name))
    if missing:
        raise BadInput(f"transformers finds no {some(missing)} in {folder}; copy the whole checkpoint")
    return model.eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and its report of what was left out, which is on purpose here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
