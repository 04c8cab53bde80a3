"""Fields of a config.json that change the computation: each is read, or equal to what is built, or refused by name."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mllm_edge.checkpoints.dequantize import not_plain, quantization
from mllm_edge.errors import BadInput

Fields = Mapping[str, Any]
MOST_LAYERS = 1000
_NEEDED = object()


def whole(config: Fields, key: str, where: Path, default: Any = _NEEDED, most: int = 1 << 24) -> int:
    """A count from a config, at most `most`; `default` where it is left out or null.

    Raises:
        BadInput: it is no positive whole number, or is needed and lacking.
    """
    value = config.get(key)
    if value is None and default is not _NEEDED:
        return int(default)
    if value is None:
        raise BadInput(f"{where} lacks {key}; copy the checkpoint's own config")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise BadInput(f"{where} has {key} {value!r}, which is no count from 1 to {most}; copy it again")
    return value


def real(config: Fields, key: str, where: Path, default: Any = _NEEDED) -> float:
    """A positive number from a config; `default` where it is left out or null. Raises BadInput as `whole` does."""
    value = config.get(key)
    if value is None and default is not _NEEDED:
        return float(default)
    if value is None:
        raise BadInput(f"{where} lacks {key}; copy the checkpoint's own config")
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
        raise BadInput(f"{where} has {key} {value!r}, which is no positive number; copy it again")
    return float(value)


def counts(config: Fields, key: str, where: Path, length: int = 0) -> tuple[int, ...]:
    """A list of counts; where `length` is given it has as many, and one number stands for all. Raises BadInput as
    `whole` does."""
    value = config.get(key)
    listed = value if isinstance(value, (list, tuple)) else [value] * max(1, length)
    if not 0 < len(listed) <= MOST_LAYERS or (length and len(listed) != length):
        raise BadInput(f"{where} has {len(listed)} numbers as {key}, not {length or 'one or more'}; copy it again")
    return tuple(whole({key: one}, key, where) for one in listed)


def names(config: Fields, key: str, where: Path, known: Collection[str], length: int) -> list[str]:
    """A list of `length` names out of those that are known. Raises BadInput that names another."""
    value = config.get(key)
    if not isinstance(value, (list, tuple)) or len(value) != length:
        raise BadInput(f"{where} has {key} {value!r}, which is no list of {length}; copy it again")
    for name in value:
        check_fixed({key: name}, {key: tuple(known)}, where)
    return list(value)


def flag(config: Fields, key: str, where: Path, default: bool = False) -> bool:
    """A truth value from a config. Raises BadInput where it is another thing."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise BadInput(f"{where} has {key} {value!r}, which is neither true nor false; copy it again")
    return value


def check_fixed(config: Fields, fixed: Mapping[str, tuple[Any, ...]], where: Path) -> None:
    """Refuse values other than those that are built.

    Args:
        config: the fields.
        fixed: a field and its possible values; a field that is left out is as if it had one of them.
        where: the file, for the message.

    Raises:
        BadInput: names the field, its value and the file.
    """
    for key, allowed in fixed.items():
        if key in config and config[key] not in allowed:
            supported = " or ".join(repr(value) for value in allowed if value is not None)
            only = f"{supported} is" if supported else "none is"
            raise BadInput(
                f"{where} has {key} {config[key]!r}, which is not supported ({only}); use another checkpoint"
            )


def refuse_quantized(config: Fields, where: Path) -> None:
    """Refuse weights that are codes where no reader turns them into numbers. Raises BadInput that names the format."""
    settings = quantization(config)
    if settings is not None:
        raise not_plain(settings, where)


def bounded(dims: Any, where: Path) -> None:
    """Check the numbers of our own layout's dims, before anything of their length is built.

    Raises:
        BadInput: one is larger than any model's.
    """
    for key, value in dims.items() if isinstance(dims, dict) else []:
        most = MOST_LAYERS if key == "layers" else 1 << 24
        count = isinstance(value, int) and not isinstance(value, bool) and key != "tap"  # that one counts from the end
        if isinstance(value, (int, float)) and not (1 if count else -most) <= value <= most:
            raise BadInput(f"{where} has {key} {value!r}, which no model has; train or copy it again")
        bounded(value, where)


def well_typed(dims: Any, where: Path) -> None:
    """Check that dims, a dataclass made from a file, have values of the declared types. Raises BadInput."""
    hints = typing.get_type_hints(type(dims))
    for field in dataclasses.fields(dims):
        value = getattr(dims, field.name)
        if dataclasses.is_dataclass(value):
            well_typed(value, where)
        elif not _is(value, hints[field.name]):
            raise BadInput(f"{where} has {field.name} {value!r}, of a wrong type; train or copy it again")


def _is(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType or origin is typing.Union:
        return any(_is(value, one) for one in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is(one, arguments[0]) for one in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)
