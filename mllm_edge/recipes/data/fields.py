"""Checked access to parsed JSON. Every error is one line: where, what is wrong, what to do."""

import reprlib
from typing import Any, TypeVar

from mllm_edge.errors import BadInput

Value = TypeVar("Value")

LARGEST = 1e7  # pixels; keeps sums and quotients of coordinates finite
_TYPE_NAMES = {str: "a text", list: "a list", dict: "an object", int: "a whole number"}


def field(kind: type[Value], entry: dict[str, Any], key: str, where: str) -> Value:
    """An entry's value of type `kind`. Raises BadInput when it is missing or of another type."""
    if key not in entry:
        raise refusal(where, f'there is no "{key}"', "add it")
    return typed(kind, entry[key], where, f'"{key}"')


def typed(kind: type[Value], value: object, where: str, name: str) -> Value:
    """The value itself. Raises BadInput when it is of another type."""
    # bool is a subclass of int, but true is not a number of pixels.
    if not isinstance(value, kind) or isinstance(value, bool):
        raise refusal(where, f"{name} is {reprlib.repr(value)}", f"make it {_TYPE_NAMES[kind]}")
    return value


def number(value: object, where: str, name: str) -> float:
    """A finite number of pixels. Raises BadInput for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST:
        return float(value)
    raise refusal(where, f"{name} has {reprlib.repr(value)}", "use finite numbers of pixels")


def refusal(where: str, wrong: str, remedy: str) -> BadInput:
    """The error to raise."""
    return BadInput(f"{where}: {wrong}; {remedy}")
