"""What tasks do to the modules that they train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_edge.recipes.recipe import LoraSettings


def add_lora(decoder: nn.Module, settings: LoraSettings) -> nn.Module:
    """Wrap linears of the decoder with peft's LoRA."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    wrapped: nn.Module = get_peft_model(decoder, config)
    return wrapped


def plain_attention(decoder: Any) -> Any:
    """Choose the attention to train with: on a CPU plain products, whose gradients in bf16 take half the time of
    torch's fused kernel there."""
    if not torch.cuda.is_available():
        decoder.set_attn_implementation("eager")
    return decoder


def hide_channels(features: Tensor, share: float, training: bool) -> Tensor:
    """Set a `share` of the encoder's channels [B,N,Dv] to 0 in training, others in each picture, the same in all its
    places: what a drawing style lacks must not take the name away with it."""
    return features * functional.dropout(features.new_ones(len(features), 1, features.shape[-1]), share, training)


@torch.no_grad()
def unit_variance(connector: nn.Module, features: Tensor, last: float = 1.0) -> None:
    """Scale a connector layer by layer until each unit has mean 0 and deviation 1 over real features [B,N,D], the last
    layer's the deviation `last` (layer-sequential unit variance, Mishkin & Matas 2016)."""
    layers = list(connector.children())
    final = [layer for layer in layers if isinstance(layer, nn.Linear)][-1]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            layer.bias.zero_()
            out = layer(features)
            gain = (last if layer is final else 1.0) / out.std(dim=(0, 1)).clamp(min=1e-6)
            layer.weight.mul_(gain.unsqueeze(1))
            layer.bias.copy_(-out.mean(dim=(0, 1)) * gain)
        features = layer(features)
