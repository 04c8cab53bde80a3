"""The errors that users see. Each carries one line: what is wrong; what to do."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


class MllmEdgeError(Exception):
    """Something failed. The command line prints the message alone and exits with `exit_code`."""

    exit_code = 1


class BadInput(MllmEdgeError):
    """The user's input (file, option, bundle, prompt) is not usable."""

    exit_code = 2


class OutOfTolerance(MllmEdgeError):
    """A measured value, of parity or of speed, is outside what is allowed."""


class MissingPackage(MllmEdgeError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str):
        super().__init__(f"{package} is not installed; run: pip install 'mllm-edge[{extra}]'")


def look_up(what: str, name: str, table: Mapping[str, Entry]) -> Entry:
    """The entry of that name. Raises BadInput, which lists the names, where there is none."""
    if name not in table:
        raise BadInput(f"unknown {what} {name!r}; use one of {', '.join(table)}")
    return table[name]


def no_such(what: str, name: str, known: Iterable[str], otherwise: str, most: int = 1) -> BadInput:
    """The error of an unknown name: it names the nearest known ones, or says what to do where none is near."""
    near = " or ".join(map(repr, difflib.get_close_matches(name, known, n=most)))
    return BadInput(f"there is no {what} {name!r}; {f'did you mean {near}?' if near else otherwise}")


def first_line(error: BaseException) -> str:
    """Of a library's message; the error's type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
