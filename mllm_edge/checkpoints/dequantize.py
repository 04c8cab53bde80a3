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
_MOST_STATE = 1 << 16  # bytes of a tensor that holds settings
_PACKED_BITS = (4, 8)
_CT_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
_BLOCK = (128, 128)  # of fp8 where the config does not say it, as in transformers


class _Code(NamedTuple):
    """A tensor made of several: their names, its shape and how it is computed."""

    parts: list[str]
    shape: Shape
    get: Callable[[], Tensor]


_Find = Callable[[Tensors, str], "_Code | None"]


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
    taken = {part for code in codes.values() for part in code.parts}
    twice = [name for name in codes if name in source and name not in taken]
    if twice:
        raise BadInput(f"{source.origin(twice[0])} is there as codes and as numbers; copy the checkpoint again")
    warnings.warn(f"{folder}: its weights are codes of {form} and are read as the numbers they stand for", stacklevel=2)
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


def not_plain(settings: Mapping[str, Any], where: Path, but: str = "") -> BadInput:
    """The refusal of a format, by its name and what about it is not supported."""
    return BadInput(
        f"{where} has a quantization_config: its weights are codes of {format_name(settings)}{but}; give the "
        "checkpoint that was not quantized, export quantizes it with --quant"
    )


def _reader(settings: Mapping[str, Any], folder: Path) -> tuple[str, _Find]:
    form, method, where = format_name(settings), settings.get("quant_method"), folder / "config.json"
    if method == "bitsandbytes":
        return form, _bitsandbytes
    if method == "fp8":
        return form, _fp8(settings, where)
    if method == "fbgemm_fp8":
        return form, lambda source, name: _scaled(source, name, "_scale", ())
    if method == "compressed-tensors" and settings.get("format") in _CT_FORMATS:
        return form, _compressed(settings, where)
    raise not_plain(settings, where)


def _fp8(settings: Mapping[str, Any], where: Path) -> _Find:
    """transformers' fp8: blocks or the tensor times `weight_scale_inv`; AutoFP8's: the tensor times `weight_scale`."""
    if settings.get("activation_scheme", "dynamic") != "dynamic":
        raise not_plain(settings, where, " with statically quantized activations")
    block = settings.get("weight_block_size", list(_BLOCK))
    if block is not None and not _is_block(block):
        raise not_plain(settings, where, f" with blocks {block!r}")

    def find(source: Tensors, name: str) -> _Code | None:
        by_block = _scaled(source, name, "_scale_inv", tuple(block or ()))
        return by_block or _scaled(source, name, "_scale", ())

    return find


def _is_block(block: Any) -> bool:
    return (
        isinstance(block, list) and len(block) == 2 and all(type(side) is int and 0 < side < 1 << 20 for side in block)
    )


def _scaled(source: Tensors, name: str, suffix: str, block: tuple[int, ...], zero: bool = False) -> _Code | None:
    """A matrix of codes times the scale of the tensor, of each row, of each group of a row, or of each block."""
    scale, point, order = name + suffix, f"{name}_zero_point", f"{name}_g_idx"
    if not name.endswith("weight") or scale not in source:
        return None
    shape, scales = source.shape(name), source.shape(scale)
    held = [part for part in (point, order) if zero and part in source]
    spread = _spread(source, scale, shape, block, order if order in held else "")
    if point in held and math.prod(source.shape(point)) != math.prod(scales):
        raise _misfit(source.origin(point), shape)

    def get() -> Tensor:
        codes = _codes(source, name, 1).float()
        if point in held:
            codes -= spread(_codes(source, point, 1).reshape(scales).float())
        return codes * spread(_numbers(source, scale))

    return _Code([name, scale, *held], shape, get)


def _codes(source: Tensors, name: str, size: int) -> Tensor:
    """A tensor of codes of so many bytes. Raises BadInput where it holds other numbers."""
    tensor = source[name]
    if tensor.element_size() != size or (size > 1 and tensor.is_floating_point()):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise BadInput(f"{source.origin(name)} holds {kind}, no codes of {size} bytes; copy the checkpoint again")
    return tensor


def _numbers(source: Tensors, name: str) -> Tensor:
    """A tensor of scales. Raises BadInput where they are whole numbers, which no format has."""
    tensor = source[name]
    if not tensor.is_floating_point():
        raise BadInput(f"{source.origin(name)} holds codes, not scales; copy the checkpoint again")
    return tensor.float()


def _spread(
    source: Tensors, scale: str, shape: Shape, block: tuple[int, ...], order: str = ""
) -> Callable[[Tensor], Tensor]:
    """How scales (of the shape that tensor `scale` has) become a tensor that multiplies a matrix of `shape`.

    `order` names a tensor with the group of each column, where groups are not neighbours.

    Raises:
        BadInput: their shape does not fit.
    """
    scales = source.shape(scale)
    if math.prod(scales) == 1:
        return lambda values: values.reshape(1)
    if len(shape) != 2 or len(scales) not in (1, 2):
        raise _misfit(source.origin(scale), shape)
    rows, columns = shape
    if block:
        if scales == (math.ceil(rows / block[0]), math.ceil(columns / block[1])):
            down, along = min(block[0], rows), min(block[1], columns)
            return lambda values: values.repeat_interleave(down, 0).repeat_interleave(along, 1)[:rows, :columns]
    elif scales[0] == rows and math.prod(scales[1:]) == 1:
        return lambda values: values.reshape(rows, 1)
    elif scales[0] == rows and scales[1] and order:
        return lambda values: values[:, _order(source, order, columns, scales[1])]
    elif scales[0] == rows and scales[1] and columns % scales[1] == 0:
        return lambda values: values.repeat_interleave(columns // scales[1], 1)
    raise _misfit(source.origin(scale), shape)


def _order(source: Tensors, name: str, columns: int, groups: int) -> Tensor:
    """The group of each column, int64 [columns]; neighbours where the tensor was never filled (-1)."""
    if source.shape(name) != (columns,):
        raise _misfit(source.origin(name), (columns,))
    order = source[name].to(torch.int64)
    if (order < 0).any() and columns % groups == 0:
        return torch.arange(columns) // (columns // groups)
    if (order < 0).any() or (order >= groups).any():
        raise BadInput(f"{source.origin(name)} names groups that are not there; copy the checkpoint again")
    return order


def _compressed(settings: Mapping[str, Any], where: Path) -> _Find:
    """compressed-tensors. How fine the scales are is read off their shapes; blocks and bits are the config's."""
    for key in ("sparsity_config", "transform_config", "kv_cache_scheme"):
        value = settings.get(key)
        if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
            raise not_plain(settings, where, f" with a {key}")
    groups = settings.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [_weights_of(scheme, settings, where) for scheme in schemes]
    blocks = [one.get("block_structure") for one in weights]
    bits = [one.get("num_bits") for one in weights]
    if any(value != kinds[0] for kinds in (blocks, bits) for value in kinds):
        raise not_plain(settings, where, " with several sizes of codes or blocks")
    block, width = (blocks[0], bits[0]) if weights else (None, None)
    if block is not None and not _is_block(block):
        raise not_plain(settings, where, f" with blocks {block!r}")
    if settings["format"] != "pack-quantized":
        return lambda source, name: _scaled(source, name, "_scale", tuple(block or ()), zero=True)
    if width not in _PACKED_BITS:
        raise not_plain(settings, where, f" with {width} bits")
    return lambda source, name: _packed(source, name, int(width))


def _weights_of(scheme: Any, settings: Mapping[str, Any], where: Path) -> Mapping[str, Any]:
    """The part of a scheme that is about weights. Raises BadInput where the rest changes the computation."""
    weights = scheme.get("weights") if isinstance(scheme, Mapping) else None
    if not isinstance(weights, Mapping):
        raise not_plain(settings, where, " with a scheme that names no weights")
    if scheme.get("format") not in (None, settings["format"]):
        raise not_plain(settings, where, f" and {scheme['format']}")
    for key in ("input_activations", "output_activations"):
        activations = scheme.get(key)
        if activations is not None and not (isinstance(activations, Mapping) and activations.get("dynamic") is True):
            raise not_plain(settings, where, " with statically quantized activations")
    return weights


def _packed(source: Tensors, name: str, bits: int) -> _Code | None:
    """Codes of `bits` in int32 words along a row, the first in the lowest bits, each with half its range added. Zero
    points of rows and groups are packed so down the rows."""
    if not name.endswith("weight_packed"):
        return None
    stem = name.removesuffix("_packed")
    scale, sides, point, order = (f"{stem}_{part}" for part in ("scale", "shape", "zero_point", "g_idx"))
    _all_there(source, [name, scale, sides])
    held = [part for part in (point, order) if part in source]
    told = source[sides].tolist() if source.shape(sides) == (2,) else source.shape(sides)
    rows, columns = shape = _shape(told, source.origin(sides))
    each = 32 // bits
    if source.shape(name) != (rows, math.ceil(columns / each)):
        raise _misfit(source.origin(name), shape)
    spread = _spread(source, scale, shape, (), order if order in held else "")
    scales = source.shape(scale)
    whole = math.prod(scales) == 1  # one zero point of the tensor is not packed
    if point in held and source.shape(point) != (scales if whole else (math.ceil(rows / each), *scales[1:])):
        raise _misfit(source.origin(point), shape)

    def get() -> Tensor:
        codes = _unpacked(_codes(source, name, 4), bits)[:, :columns].float()
        if point in held:
            zeros = _codes(source, point, 1 if whole else 4)
            if not whole:
                zeros = _unpacked(zeros.reshape(math.ceil(rows / each), -1).t(), bits)[:, :rows].t()
            codes -= spread(zeros.reshape(scales).float())
        return codes * spread(_numbers(source, scale))

    return _Code([name, scale, sides, *held], shape, get)


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 [n, words] -> the codes in them [n, words * 32 / bits], negative ones below half of the range."""
    codes = words.unsqueeze(-1) >> torch.arange(0, 32, bits, dtype=torch.int32)
    return (codes & (1 << bits) - 1).flatten(1) - (1 << bits - 1)


def _bitsandbytes(source: Tensors, name: str) -> _Code | None:
    stem = name.removesuffix("weight")
    if not name.endswith("weight"):
        return None
    if f"{stem}SCB" in source:
        return _eight_bits(source, name, f"{stem}SCB", f"{stem}weight_format")
    states = [f"{name}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
    return next((_four_bits(source, name, state) for state in states if state in source), None)


def _eight_bits(source: Tensors, name: str, scale: str, order: str) -> _Code:
    """LLM.int8: rows times their largest value over 127."""
    shape = source.shape(name)
    if len(shape) != 2 or source.shape(scale) not in ((shape[0],), (shape[0], 1)):
        raise _misfit(source.origin(scale), shape)
    held = [part for part in (order,) if part in source]

    def get() -> Tensor:
        if held and source[order].any():  # 0 is "row"; others are tiles of one kind of GPU
            raise BadInput(f"{source.origin(order)} says that rows are in the order of a GPU; save the checkpoint anew")
        return _codes(source, name, 1).float() * (_numbers(source, scale).reshape(-1, 1) / 127)

    return _Code([name, scale, *held], shape, get)


def _four_bits(source: Tensors, name: str, state: str) -> _Code:
    """nf4 and fp4: two codes a byte, the first in the high half, a table of 16 values and a scale for each block. The
    bytes may be stored as larger numbers (`bnb_4bit_quant_storage`)."""
    origin = source.origin(state)
    parts = [name, state, f"{name}.absmax", f"{name}.quant_map"]
    nested = f"{name}.nested_absmax" in source
    parts += [f"{name}.nested_absmax", f"{name}.nested_quant_map"] if nested else []
    _all_there(source, parts)
    if math.prod(source.shape(state)) > _MOST_STATE:
        raise BadInput(f"{origin} is too large for settings; copy the checkpoint again")
    try:
        told = json.loads(bytes(source[state].tolist()))
        shape, block = _shape(told["shape"], origin), int(told["blocksize"])
        inner, offset = int(told.get("nested_blocksize", 1)), float(told.get("nested_offset", 0.0))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise BadInput(f"{origin} is damaged ({error!r}); copy the checkpoint again") from None
    count = math.prod(shape)
    blocks = math.ceil(count / block) if 0 < block <= 1 << 20 else 0
    sizes = {parts[2]: blocks, parts[3]: 16}
    if nested:
        sizes |= {parts[4]: math.ceil(blocks / inner) if 0 < inner <= 1 << 20 else 0, parts[5]: 256}
    for part, size in sizes.items():
        if math.prod(source.shape(part)) != size or not size:
            raise _misfit(source.origin(part), shape)
    stored = (count + 1) // 2
    if math.prod(source.shape(name)) not in [stored // size for size in (1, 2, 4) if stored % size == 0]:
        raise _misfit(source.origin(name), shape)

    def get() -> Tensor:
        packed = source[name].contiguous().flatten().view(torch.uint8)
        if packed.numel() != stored:
            raise _misfit(source.origin(name), shape)
        if nested:
            coarse = _numbers(source, parts[4]).flatten().repeat_interleave(inner)[:blocks]
            fine = _codes(source, parts[2], 1).flatten().view(torch.uint8).long()
            scales = _numbers(source, parts[5]).flatten()[fine] * coarse + offset
        else:
            scales = _numbers(source, parts[2]).flatten()  # [blocks]
        codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:count]  # [count]
        values = _numbers(source, parts[3]).flatten()[codes.long()]
        return (values * scales.repeat_interleave(block)[:count]).reshape(shape)

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
        raise BadInput(f"{origin} gives a weight the shape {sides!r:.80}; copy the checkpoint again")
    return tuple(sides)
