"""Does this machine's llama.cpp crash with AMX?

Built by GCC 12, llama.cpp's AMX kernels crash in `decode` of a quantized model: the compiler believes that
`_tile_loadconfig` reads 8 of its 64 bytes and drops the stores to the rest. So before the first quantized model is
loaded on such a CPU, a child process tries it. After a crash the model is loaded without repacked weights
(`use_extra_bufts = False`): slower, but it runs. On ARM, where repacking is what makes it fast, it is never disabled.

On x86 CPUs without AMX K-quants are not repacked: llama.cpp's tiled products of the plain format take two thirds of the
time of the repacked ones there (docs/performance.md), and the file stays memory-mapped.

A model that crashes without repacked weights, too, is damaged and says nothing of AMX (`sound.py` tries that before).

    python -m mllm_edge.runtime.engines.llama.probe MODEL.gguf [plain]      the child's command
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_edge.machine import facts
from mllm_edge.quants import PLAIN, QUANTS

REBUILD = (
    'CXXFLAGS="-fno-tree-dse -fno-dse" pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python '
    "llama-cpp-python"
)
TIMEOUT_S = 600
CRASHES = {signal.SIGSEGV, signal.SIGILL, signal.SIGABRT, *({signal.SIGBUS} if hasattr(signal, "SIGBUS") else ())}


@dataclass(frozen=True)
class Verdict:
    """The AMX state of this machine, for `doctor`.

    Attributes:
        amx: the CPU has AMX tiles.
        crashed: by precision tried with this build, whether it crashed.
        rebuild: the command that installs a build without the crash.
    """

    amx: bool
    crashed: dict[str, bool]
    rebuild: str = REBUILD


def is_x86() -> bool:
    """Whether this is a 64-bit x86 CPU."""
    return platform.machine().lower() in ("x86_64", "amd64")


def has_amx() -> bool:
    """Whether this is an x86 CPU with AMX tiles that the system lets programs use."""
    return is_x86() and "amx_tile" in facts.features()


def verdict() -> Verdict:
    """Results of earlier probes of the installed llama.cpp; runs nothing."""
    if not has_amx():
        return Verdict(False, {})
    prefix = build_key() + "/"
    tried = {key.removeprefix(prefix): crashed for key, crashed in _read_cache().items() if key.startswith(prefix)}
    return Verdict(True, {key: crashed for key, crashed in tried.items() if "/" not in key})


def use_extra_buffers(path: Path, precision: str) -> bool:
    """Whether to load the model with repacked weights; on a CPU with AMX this probes once per build and precision.

    Args:
        path: the GGUF file.
        precision: its quantization, as in the manifest.
    """
    quant = QUANTS.get(precision.lower())  # None in bundles that others made
    if precision.lower() in PLAIN:
        return True
    if not has_amx():
        return not (is_x86() and quant and quant.k)
    key = f"{build_key()}/{precision}"
    crashed = known(key)
    if crashed is None:
        crashed = _probe(path)
        if crashed is not None:
            remember(key, crashed)
    if crashed is False:
        return True
    found = "crashes" if crashed else "could not be tried"
    warnings.warn(
        f"llama.cpp's AMX code {found} on {precision} models, so it runs without; for full speed rebuild it: {REBUILD}",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def command(path: Path) -> list[str]:
    """The child process that loads the model with default settings and decodes a few tokens."""
    return [sys.executable, "-m", "mllm_edge.runtime.engines.llama.probe", str(path)]


def plain_command(path: Path) -> list[str]:
    """The same without repacked weights, and so without AMX: what crashes here is the file's fault."""
    return [*command(path), "plain"]


def _probe(path: Path) -> bool | None:
    """True after a crash, False when it ran, None when the child failed in another way (memory, time)."""
    try:
        code = try_in_child(command(path), TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None
    if code == 0:
        return False
    return True if code is not None and -code in CRASHES else None


def try_in_child(command: list[str], timeout: float) -> int | None:
    """A child's exit code, negative for a signal; None when it could not start. Raises TimeoutExpired."""
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    try:
        return subprocess.run(command, capture_output=True, env=environment, timeout=timeout, check=False).returncode
    except OSError:
        return None


def known(key: str) -> bool | None:
    """An earlier verdict: whether it crashed."""
    return _read_cache().get(key)


def known_under(prefix: str) -> dict[str, bool]:
    """Earlier verdicts whose keys begin so, by the rest of the key."""
    return {key.removeprefix(prefix): crashed for key, crashed in _read_cache().items() if key.startswith(prefix)}


def remember(key: str, crashed: bool) -> None:
    """Keep a verdict for later processes."""
    _write_cache({**_read_cache(), key: crashed})


def build_key() -> str:
    """Identifies the installed build: version, size and time of llama.cpp's libraries."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return "none"
    folder = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(spec.origin).parent / "lib")
    states = [file.stat() for file in sorted(folder.glob("*")) if file.is_file()]
    size, changed = sum(state.st_size for state in states), max((state.st_mtime_ns for state in states), default=0)
    return f"{importlib.metadata.version('llama-cpp-python')}-{size}-{changed}"


def _cache_file() -> Path:
    return facts.cache_folder() / "amx.json"


def _read_cache() -> dict[str, bool]:
    try:
        cache: Any = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = cache.items() if isinstance(cache, dict) else ()
    return {str(key): value for key, value in entries if isinstance(value, bool)}


def _write_cache(cache: dict[str, bool]) -> None:
    """Keep the verdicts; with a read-only home the next load just probes again."""
    file = _cache_file()
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(cache, indent=2), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        warnings.warn(f"the AMX verdict cannot be kept in {file} ({error.strerror})", RuntimeWarning, stacklevel=2)


def _try_decode(path: str, plain: bool) -> int:
    """Load with default settings, tokenize, decode a batch and a single token. Returns 0 on success."""
    from mllm_edge.runtime.engines.llama.library import library

    llama = library()
    loading = llama.llama_model_default_params()
    loading.use_extra_bufts = not plain
    model = llama.llama_model_load_from_file(os.fsencode(path), loading)
    if not model:
        return 1
    if not _tokenize(llama, llama.llama_model_get_vocab(model)):
        return 1
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = 64
    context = llama.llama_init_from_model(model, settings)
    if not context:
        return 1
    most = min(32, llama.llama_model_n_ctx_train(model) - 1)  # a learned position has no next one
    for tokens in ([1] * most, [1]):
        ids = (llama.llama_token * len(tokens))(*tokens)  # the batch holds only a pointer to it
        if llama.llama_decode(context, llama.llama_batch_get_one(ids, len(tokens))) != 0:
            return 1
    return 0


def _tokenize(llama: Any, vocab: Any) -> bool:
    """Split a text into tokens, also into bytes, and give every token's text."""
    text, ids, piece = (
        "Hello  \n\u00e9\U0001f600".encode(),
        (llama.llama_token * 64)(),
        ctypes.create_string_buffer(256),
    )
    if llama.llama_tokenize(vocab, text, len(text), ids, 64, True, True) <= 0:
        return False
    for token in range(llama.llama_vocab_n_tokens(vocab)):
        llama.llama_token_to_piece(vocab, token, piece, 256, 0, True)
    return True


if __name__ == "__main__":
    sys.exit(_try_decode(sys.argv[1], plain=sys.argv[2:] == ["plain"]))
