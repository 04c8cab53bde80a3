"""Parsed JSON to dataclasses: every type is checked, and errors name what does not fit."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable
from typing import Any

from mllm_edge.errors import BadInput

LARGEST = 1 << 62  # what numpy and the engines can hold


class UnknownKind(BadInput):
    """A record of a kind that this version does not have, perhaps a newer one's."""


def typed(kind: Any, value: Any, where: str) -> Any:
    """Convert parsed JSON to the annotated type. Raises BadInput naming the place that does not fit."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise BadInput(f"{where} must be an object; export the bundle again")
        hints = typing.get_type_hints(kind)
        known = {f.name: f for f in dataclasses.fields(kind)}
        missing = [n for n, f in known.items() if n not in value and not _has_default(f)]
        if missing:
            raise BadInput(f"{where} lacks {', '.join(missing)}; export the bundle again")
        return kind(**{n: typed(hints[n], value[n], f"{where}: {n}") for n in known if n in value})  # type: ignore[operator]
    if origin is list:
        if not isinstance(value, list):
            raise BadInput(f"{where} must be a list; export the bundle again")
        return [typed(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise BadInput(f"{where} must be an object; export the bundle again")
        return {key: typed(args[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if origin is typing.Literal:
        if value not in args:
            raise BadInput(f"{where} is {value!r}, not {args[0]!r}; export the bundle again")
        return value
    if origin is types.UnionType and (records := [arg for arg in args if dataclasses.is_dataclass(arg)]):
        return None if value is None and type(None) in args else _one_of(records, value, where)
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise BadInput(f"{where} is too large a number; export the bundle again")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    allowed: Iterable[type] = args if origin is types.UnionType else (kind,)
    if type(value) not in tuple(allowed):
        raise BadInput(f"{where} has the wrong type ({type(value).__name__}); export the bundle again")
    return value


def _has_default(f: dataclasses.Field[Any]) -> bool:
    return f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING


def _one_of(records: list[Any], value: Any, where: str) -> Any:
    """The dataclass whose `kind` the value has; where there is only one, that."""
    if len(records) == 1:
        return typed(records[0], value, where)
    kinds = {typing.get_args(typing.get_type_hints(record)["kind"])[0]: record for record in records}
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise UnknownKind(f"{where} is of kind {kind!r}; this version knows {', '.join(kinds)}")
    return typed(kinds[kind], value, where)
