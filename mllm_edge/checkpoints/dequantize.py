"""Checkpoints whose weights are codes, read as the numbers that the codes stand for.

FP8 (`quant_method` fp8 and fbgemm_fp8), compressed-tensors (float-quantized, int-quantized, naive-quantized,
pack-quantized) and bitsandbytes (8 bit, nf4, fp4). Each number is computed in float32 by the format's own definition;
activations, which some of these formats quantize as a model runs, are left as they are.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mllm_edge.checkpoints.tensors import Shape, Tensors, open_folder
from mllm_edge.errors import BadInput

_MOST = 1 << 34  # elements of a tensor
_PACKED_BITS = (4, 8)
_CT_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")


class _Code(NamedTuple):
    """A tensor made of several: their names, its shape and how it is computed."""

    parts: list[str]
    shape: Shape
    get: Callable[[], Tensor]


def open_weights(folder: Path, config: Mapping[str, Any]) -> Tensors:
    """`open_folder`, with codes turned into float32 numbers as they are read.

    Args:
        folder: the checkpoint.
        config: its config.json, whose `quantization_config` (or that of its `text_config`) names the format.

    Raises:
        BadInput: a format that has no exact numbers or is not known, by its name; parts that are missing or do not fit.
    """
    source = open_folder(folder)
    settings = quantization(config)
    if settings is None:
        return source
    form, find = _reader(settings, folder)
    found = {name: find(source, name) for name in source}
    codes = {name.removesuffix("_packed"): code for name, code in found.items() if code is not None}
    if not codes:
        raise BadInput(f"{folder} says that its weights are codes of {form}, but holds none; copy it again")
    warnings.warn(f"{folder}: its weights are codes of {form} and are read as the numbers they stand for", stacklevel=2)
    taken = {part for code in codes.values() for part in code.parts}
    names = [*codes, *(name for name in source if name not in taken)]
    return Tensors(
        names,
        lambda name: codes[name].get() if name in codes else source[name],
        lambda name: codes[name].shape if name in codes else source.shape(name),
        lambda name: source.origin(codes[name].parts[0] if name in codes else name),
    )


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The settings of the format of a config's weights, or None where they are plain."""
    for inner in (config, config.get("text_config"), config.get("vision_config")):
        if isinstance(inner, Mapping):
            found = inner.get("quantization_config") or inner.get("compression_config")
            if found:
                return found if isinstance(found, Mapping) else {"quant_method": str(found)}
    return None


def format_name(settings: Mapping[str, Any]) -> str:
    """What a format calls itself: "compressed-tensors pack-quantized"."""
    named = [str(settings[key]) for key in ("quant_method", "format") if settings.get(key)]
    return " ".join(named) or "an unnamed format"


def _reader(settings: Mapping[str, Any], folder: Path) -> tuple[str, Callable[[Tensors, str], _Code | None]]:
    form, method = format_name(settings), settings.get("quant_method")
    if method == "bitsandbytes":
        return form, _bitsandbytes
    if method == "fp8" and settings.get("activation_scheme", "dynamic") == "dynamic":
        block = settings.get("weight_block_size")
        if block is None or _is_block(block):
            return form, lambda source, name: _scaled(source, name, "_scale_inv", tuple(block or ()))
    if method == "fbgemm_fp8":
        return form, lambda source, name: _scaled(source, name, "_scale", ())
    if method == "compressed-tensors" and settings.get("format") in _CT_FORMATS:
        return form, _compressed(settings, folder)
    raise not_plain(settings, folder / "config.json")


def not_plain(settings: Mapping[str, Any], where: Path, but: str = "") -> BadInput:
    """The refusal of a format, by its name and what about it is not supported."""
    return BadInput(
        f"{where} has a quantization_config: its weights are codes of {format_name(settings)}{but}; give the "
        "checkpoint that was not quantized, export quantizes it with --quant"
    )


def _is_block(block: Any) -> bool:
    return (
        isinstance(block, list) and len(block) == 2 and all(type(side) is int and 0 < side < 1 << 20 for side in block)
    )


def _scaled(source: Tensors, name: str, suffix: str, block: tuple[int, ...], zero: bool = False) -> _Code | None:
    """A matrix of codes times the scale of the tensor, of each row, of each group of a row, or of each block."""
    scale = name + suffix
    if not name.endswith("weight") or scale not in source:
        return None
    shape, scales = source.shape(name), source.shape(scale)
    parts = [name, scale, *([f"{name}_zero_point"] if zero and f"{name}_zero_point" in source else [])]

    def get() -> Tensor:
        codes = source[name].float()
        if len(parts) == 3:
            codes -= _spread(source[parts[2]].float(), shape, block, source.origin(parts[2]))
        return codes * _spread(source[scale].float(), shape, block, source.origin(scale))

    _spread(torch.empty(scales, device="meta"), shape, block, source.origin(scale))
    return _Code(parts, shape, get)


def _spread(scales: Tensor, shape: Shape, block: tuple[int, ...], origin: str) -> Tensor:
    """Scales as a tensor that multiplies a matrix of that shape."""
    if scales.numel() == 1:
        return scales.reshape(1)
    if len(shape) != 2:
        raise _misfit(origin, shape)
    rows, columns = shape
    if block:
        if tuple(scales.shape) == (math.ceil(rows / block[0]), math.ceil(columns / block[1])):
            whole = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            return whole[:rows, :columns]
    elif scales.ndim == 1 or scales.shape[1] == 1:
        if scales.shape[0] == rows:
            return scales.reshape(rows, 1)
    elif scales.shape[0] == rows and scales.shape[1] and columns % scales.shape[1] == 0:
        return scales.repeat_interleave(columns // scales.shape[1], 1)
    raise _misfit(origin, shape)


def _compressed(settings: Mapping[str, Any], folder: Path) -> Callable[[Tensors, str], _Code | None]:
    """compressed-tensors: one scheme for all its layers (where none is told, the scales say it)."""
    groups = settings.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    where = folder / "config.json"
    scheme = schemes[0] if schemes else {"weights": {}}
    if settings.get("sparsity_config") or len(schemes) > 1 or not isinstance(scheme, Mapping):
        raise not_plain(settings, where, " with several schemes or sparsity")
    weights, inputs = scheme.get("weights"), scheme.get("input_activations")
    if not isinstance(weights, Mapping) or weights.get("actorder"):
        raise not_plain(settings, where, " with reordered or unnamed weights")
    if isinstance(inputs, Mapping) and not inputs.get("dynamic"):
        raise not_plain(settings, where, " with statically quantized activations")
    block = weights.get("block_structure")
    if block is not None and not _is_block(block):
        raise not_plain(settings, where, f" with blocks {block!r}")
    if settings["format"] != "pack-quantized":
        return lambda source, name: _scaled(source, name, "_scale", tuple(block or ()), zero=True)
    bits = weights.get("num_bits")
    if bits not in _PACKED_BITS or weights.get("symmetric") is False:
        raise not_plain(settings, where, f" with {bits} bits, not symmetric")
    return lambda source, name: _packed(source, name, bits)


def _packed(source: Tensors, name: str, bits: int) -> _Code | None:
    """Codes of `bits` in int32 words along a row, the first in the lowest bits, each with half its range added."""
    if not name.endswith("weight_packed"):
        return None
    stem = name.removesuffix("_packed")
    parts = [name, f"{stem}_scale", f"{stem}_shape"]
    _all_there(source, parts)
    rows, columns = shape = _shape(source[parts[2]].tolist(), source.origin(parts[2]))
    each = 32 // bits
    if source.shape(name) != (rows, math.ceil(columns / each)):
        raise _misfit(source.origin(name), shape)
    _spread(torch.empty(source.shape(parts[1]), device="meta"), shape, (), source.origin(parts[1]))

    def get() -> Tensor:
        words = source[name].to(torch.int64).unsqueeze(-1) >> torch.arange(0, 32, bits)  # [rows, words, each]
        codes = (words & (1 << bits) - 1).flatten(1)[:, :columns].float() - (1 << bits - 1)
        return codes * _spread(source[parts[1]].float(), shape, (), source.origin(parts[1]))

    return _Code(parts, shape, get)


def _bitsandbytes(source: Tensors, name: str) -> _Code | None:
    stem = name.removesuffix("weight")
    if not name.endswith("weight"):
        return None
    if f"{stem}SCB" in source:  # LLM.int8: rows times their largest value over 127
        parts = [name, f"{stem}SCB", *(part for part in (f"{stem}weight_format",) if part in source)]
        shape = source.shape(name)
        if len(shape) != 2 or source.shape(parts[1]) not in ((shape[0],), (shape[0], 1)):
            raise BadInput(
                f"{source.origin(parts[1])} does not fit a weight of {list(shape)}; copy the checkpoint again"
            )
        return _Code(parts, shape, lambda: source[name].float() * (source[parts[1]].float().reshape(-1, 1) / 127))
    states = [part for part in source if part.startswith(f"{name}.quant_state.bitsandbytes__")]
    return _four_bits(source, name, states[0]) if states else None


def _four_bits(source: Tensors, name: str, state: str) -> _Code:
    """nf4 and fp4: two codes a byte, the first in the high half, a table of 16 values and a scale for each block."""
    origin = source.origin(state)
    parts = [name, state, f"{name}.absmax", f"{name}.quant_map"]
    nested = f"{name}.nested_absmax" in source
    parts += [f"{name}.nested_absmax", f"{name}.nested_quant_map"] if nested else []
    _all_there(source, parts)
    try:
        told = json.loads(bytes(source[state].tolist()))
        shape, block = _shape(told["shape"], origin), int(told["blocksize"])
        inner, offset = int(told.get("nested_blocksize", 1)), float(told.get("nested_offset", 0.0))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput(f"{origin} is damaged ({error!r}); copy the checkpoint again") from None
    count = math.prod(shape)
    blocks = math.ceil(count / block) if 0 < block <= 1 << 20 else 0
    sizes = {name: (count + 1) // 2, parts[2]: blocks, parts[3]: 16}
    if nested:
        sizes |= {parts[4]: math.ceil(blocks / inner) if 0 < inner <= 1 << 20 else 0, parts[5]: 256}
    for part, size in sizes.items():
        if math.prod(source.shape(part)) != size or not size:
            raise _misfit(source.origin(part), shape)

    def get() -> Tensor:
        scales = source[parts[2]].flatten()  # [blocks]
        if nested:
            coarse = source[parts[4]].float().flatten().repeat_interleave(inner)[:blocks]
            scales = source[parts[5]].float().flatten()[scales.long()] * coarse + offset
        packed = source[name].flatten()
        codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:count]  # [count]
        values = source[parts[3]].float().flatten()[codes.long()]
        return (values * scales.float().repeat_interleave(block)[:count]).reshape(shape)

    return _Code(parts, shape, get)


def _misfit(origin: str, shape: Shape) -> BadInput:
    return BadInput(f"{origin} does not fit a weight of shape {list(shape)}; copy the checkpoint again")


def _all_there(source: Tensors, parts: list[str]) -> None:
    missing = [part for part in parts if part not in source]
    if missing:
        raise BadInput(f"{source.origin(parts[0])} lacks {missing[0]}; copy the checkpoint again")


def _shape(sides: Any, origin: str) -> Shape:
    good = (
        isinstance(sides, list) and len(sides) == 2 and all(type(side) is int and 0 < side <= _MOST for side in sides)
    )
    if not good or math.prod(sides) > _MOST:
        raise BadInput(f"{origin} gives a weight the shape {sides!r}; copy the checkpoint again")
    return tuple(sides)
