"""Changes that tasks make to the modules they train."""

from __future__ import annotations

from collections.abc import Iterable
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


def decaying(parameters: Iterable[nn.Parameter], rate: float = 0.0) -> list[dict[str, Any]]:
    """The optimizer's groups of those that are trained: matrices, and vectors without weight decay; at the learning
    rate `rate`, or the recipe's."""
    trained = [p for p in parameters if p.requires_grad]
    own = {"lr": rate} if rate else {}
    groups = [
        {"params": [p for p in trained if p.ndim > 1], **own},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, **own},
    ]
    return [group for group in groups if group["params"]]


def t5_groups(parameters: Iterable[tuple[str, nn.Parameter]], rate: float, head_width: int) -> list[dict[str, Any]]:
    """The groups of a model with a T5, from its named parameters. A T5 does not scale its attention, so its queries
    begin smaller, by the root of `head_width`, and must move slower by as much: at the others' rate they grow sixfold,
    the softmax saturates, and nothing more is learned."""
    named = list(parameters)
    queries = [p for name, p in named if name.endswith(".q.weight") and p.requires_grad]
    others = [p for name, p in named if not name.endswith(".q.weight")]
    slow = [{"params": queries, "lr": rate * head_width**-0.5}] if queries else []
    return [*decaying(others), *slow]


def plain_attention(decoder: Any) -> Any:
    """Select the attention for training: on a CPU the eager one, whose bf16 gradients take half the time of torch's
    fused kernel there."""
    if not torch.cuda.is_available():
        decoder.set_attn_implementation("eager")
    return decoder


def hide_channels(features: Tensor, share: float, training: bool) -> Tensor:
    """In training, zero a random `share` of the encoder's channels [B,N,Dv], drawn per picture and equal at all its
    positions: a feature that a drawing style lacks must not be needed to name a thing."""
    return features * functional.dropout(features.new_ones(len(features), 1, features.shape[-1]), share, training)


@torch.no_grad()
def unit_variance(connector: nn.Module, features: Tensor, last: float = 1.0) -> None:
    """Scale a connector layer by layer so that each unit has mean 0 and standard deviation 1 (`last` in the last
    layer) over real features [B,N,D] (layer-sequential unit variance, Mishkin & Matas 2016)."""
    layers = list(connector.children())
    final = [layer for layer in layers if isinstance(layer, nn.Linear)][-1]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            layer.bias.zero_()
            out = layer(features)
            gain = (last if layer is final else 1.0) / out.std(dim=(0, 1)).clamp(min=1e-6)  # [D']
            layer.weight.mul_(gain.unsqueeze(1))
            layer.bias.copy_(-out.mean(dim=(0, 1)) * gain)
        features = layer(features)
