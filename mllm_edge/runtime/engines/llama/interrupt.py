"""Ctrl-C while llama.cpp computes: a long prefill stops at the next operation instead of at its end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, ModuleType


@contextlib.contextmanager
def interruptible(llama: ModuleType, context: int) -> Iterator[None]:
    """Let Ctrl-C abort `llama_decode` on the CPU; the previous SIGINT handler then handles it.

    Python runs signal handlers only between bytecode instructions of the main thread, and so not while that is inside
    llama.cpp, which therefore gets an abort callback. In other threads this does nothing.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    pressed: list[tuple[int, FrameType | None]] = []
    callback = llama.ggml_abort_callback(lambda _: bool(pressed))
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append((number, frame)))
    try:
        llama.llama_set_abort_callback(context, callback, None)
        yield
    finally:
        llama.llama_set_abort_callback(context, llama.ggml_abort_callback(), None)
        signal.signal(signal.SIGINT, previous)
        if pressed:
            previous(*pressed[0])
