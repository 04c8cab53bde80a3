"""Loads llama.cpp once, without logging and with the settings it needs before it starts."""

from __future__ import annotations

import atexit
import collections
import ctypes
import functools
import importlib
import logging
import os
from types import ModuleType
from typing import Any

from mllm_edge.errors import MissingPackage

logger = logging.getLogger("mllm_edge.llama")
recent_errors: collections.deque[str] = collections.deque(maxlen=4)
_ERROR = 4
_callbacks: list[Any] = []  # llama.cpp keeps the pointer, so Python must keep the object


@functools.cache
def library() -> ModuleType:
    """The low-level binding, `llama_cpp.llama_cpp`.

    OpenMP's threads wait passively unless the user sets otherwise: spinning ones starve small machines.

    Raises:
        MissingPackage: llama-cpp-python is not installed.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        llama = importlib.import_module("llama_cpp.llama_cpp")
    except ModuleNotFoundError:
        raise MissingPackage("llama-cpp-python", "runtime") from None
    callback = llama.llama_log_callback(_log)
    _callbacks.append(callback)
    llama.llama_log_set(callback, None)
    atexit.register(llama.llama_log_set, llama.llama_log_callback(), None)  # no callbacks after Python's shutdown
    llama.llama_backend_init()
    return llama


def _log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    line = text.decode("utf-8", "replace").rstrip()
    if level == _ERROR and line:
        recent_errors.append(line)
    logger.debug("%s", line)
