"""The three streams of a process: of any encoding, closed or broken, none of them costs a command its work."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from typing import Any, TextIO

from mllm_edge.errors import BadInput

MOST_INPUT = 1 << 20  # characters that are read of a prompt; no model takes as many

# What a terminal would obey, or hide text by: control characters but new line and tab, and marks of direction.
_HIDDEN = (*range(32), *range(127, 160), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_ESCAPES = {code: repr(chr(code))[1:-1] for code in _HIDDEN if chr(code) not in "\n\t"}


def escaped(text: str) -> str:
    r"""Text from anywhere as a terminal may show it: ESC becomes \x1b."""
    return text.translate(_ESCAPES)


class Prints(io.TextIOBase):
    """Where the prints of libraries go: to `stream`, as a terminal may show them."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(escaped(text))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True


class _Lossy(io.FileIO):
    """A stream beside the result: what cannot be written there is dropped, and the work goes on."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def open_streams() -> bool:
    """Make the process's streams usable; returns whether stdout was open.

    Bytes of stdin that are no text become U+FFFD, characters that an output's encoding lacks escapes. A closed stream
    becomes the null device: its number would else go to the next file that is opened, and messages into that file.
    """
    was_open = sys.stdout is not None
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest free number
            setattr(sys, name, open(null, "r+" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        raw = io.BufferedWriter(_Lossy(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(raw, sys.stderr.encoding, "backslashreplace", line_buffering=True)
    return was_open


def drop_stdout() -> None:
    """What is still buffered cannot be written; Python would try once more at its end, with a traceback."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def document_text(document: Any, stream: TextIO) -> str:
    """A document as JSON that the stream's encoding holds and a terminal may show."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    with contextlib.suppress(UnicodeEncodeError):
        text.encode(stream.encoding or "utf-8")
        if escaped(text) == text:
            return text
    return json.dumps(document, indent=2).replace("\x7f", "\\u007f")


def read_all() -> str:
    """All of stdin."""
    return _bounded(lambda: sys.stdin.read(MOST_INPUT + 1))


def read_line() -> str:
    """The next line of stdin; empty at its end."""
    return _bounded(lambda: sys.stdin.readline(MOST_INPUT + 1))


def _bounded(read: Any) -> str:
    try:
        text: str = read()
    except (OSError, UnicodeError) as error:
        raise BadInput(f"stdin cannot be read ({error}); pipe text in") from None
    if len(text) > MOST_INPUT:
        raise BadInput(f"stdin has over {MOST_INPUT} characters at once; pipe less in")
    return text
