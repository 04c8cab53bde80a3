"""Families of vision encoders: selected by the type of dims in a config, by the family's name in a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.mobilenet import MobileNetDims, MobileNetEncoder
from mllm_edge.models.blocks.vit import VisionEncoder, VitDims

EncoderDims = VitDims | MobileNetDims
_FAMILIES: dict[str, tuple[type[Any], Callable[[Any], nn.Module]]] = {
    "clip": (VitDims, VisionEncoder),
    "mobilenet_v2": (MobileNetDims, MobileNetEncoder),
}
# In fp16 the features of three photographs are off by 2.6 to 3.1 % of the largest value, nearly all of it from rounding
# in the first block: with that in fp32, 0.5 % on one of them (tests/export/test_fp16_photographs.py allows 1 %).
_FLOAT32: dict[type[Any], tuple[str, ...]] = {MobileNetDims: ("network.conv_stem.", "network.layer.0.")}


def vision_encoder(dims: EncoderDims) -> nn.Module:
    """An encoder of the family that `dims` belongs to: [B,3,S,S] -> [B,N,D]."""
    return next(build for kind, build in _FAMILIES.values() if type(dims) is kind)(dims)


def float32_modules(dims: EncoderDims) -> tuple[str, ...]:
    """Name prefixes of modules that must stay in fp32."""
    return _FLOAT32.get(type(dims), ())


def encoder_dims(values: Mapping[str, Any]) -> EncoderDims:
    """Dims from a file's settings; `family` selects the type (default "clip").

    Raises:
        BadInput: an unknown family.
        TypeError: settings that the family does not have.
    """
    settings = dict(values)
    family = settings.pop("family", "clip")
    if family not in _FAMILIES:
        raise BadInput(f"vision encoder family {family!r} is not known; it must be one of {', '.join(_FAMILIES)}")
    dims: EncoderDims = _FAMILIES[family][0](**settings)
    return dims


def encoder_settings(dims: EncoderDims) -> dict[str, Any]:
    """The inverse of `encoder_dims`."""
    family = next(name for name, (kind, _) in _FAMILIES.items() if type(dims) is kind)
    return {"family": family, **dataclasses.asdict(dims)}
