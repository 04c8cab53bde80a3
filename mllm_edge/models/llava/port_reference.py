"""transformers' own classes as the reference of a checkpoint in its layout.

They are filled from the folder by the names that transformers gives its parts, not by our loader's rules: a tensor that
our loader mistakes differs in parity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mllm_edge.checkpoints.tensors import Tensors
from mllm_edge.errors import BadInput


class _Eyes(nn.Module):
    """CLIP's hidden state that LLaVA reads, without the class token (`LlavaModel.get_image_features`)."""

    def __init__(self, clip: nn.Module, layer: int):
        super().__init__()
        self.clip, self.layer = clip, layer

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B,3,S,S] -> [B,N,D]."""
        states: Tensor = self.clip(pixel_values, output_hidden_states=True).hidden_states[self.layer]
        return states[:, 1:]


def references(config: Any, weights: Tensors) -> Mapping[str, Callable[[], nn.Module]]:
    """By stage, what builds transformers' module with a checkpoint's weights, in fp32.

    Args:
        config: transformers' `LlavaConfig` of the folder.
        weights: the folder's tensors under their own names.
    """

    def eyes() -> nn.Module:
        from transformers import CLIPVisionModel

        clip = CLIPVisionModel._from_config(config.vision_config, attn_implementation="eager")
        return _Eyes(_filled(clip, weights, "vision_tower."), config.vision_feature_layer)

    def projector() -> nn.Module:
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

        return _filled(LlavaMultiModalProjector(config), weights, "multi_modal_projector.")

    return {"vision_encoder": eyes, "connector": projector}


def _filled(module: nn.Module, weights: Tensors, part: str) -> nn.Module:
    """The module with the tensors whose names have `part` in them; a tower's `vision_model.` came and went between
    transformers' versions."""

    def tail(name: str) -> str:
        return name.partition(part)[2].removeprefix("vision_model.")

    state = {tail(name): name for name in weights if part in name}
    wanted = {name: name.removeprefix("vision_model.") for name in module.state_dict() if "position_ids" not in name}
    missing = [name for name in wanted.values() if name not in state and not name.startswith("post_layernorm.")]
    if missing:
        raise BadInput(f"the checkpoint lacks {part}{missing[0]}; copy the whole checkpoint")
    held = {name: weights[state[short]].to(torch.float32) for name, short in wanted.items() if short in state}
    module.load_state_dict(held, strict=False)
    return module.eval()
