"""Which engine runs what: one line a backend. Its libraries are imported when it is first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_edge.bundle.manifest import LanguageModelEntry, StageEntry
from mllm_edge.errors import MllmEdgeError
from mllm_edge.runtime.engines.interface import LanguageModel, Options, Stage


def _onnx(path: Path, entry: StageEntry, options: Options) -> Stage:
    from mllm_edge.runtime.engines.ort import OnnxStage

    return OnnxStage(path, entry, options)


def _tensorrt(path: Path, entry: StageEntry, options: Options) -> Stage:
    if options.device is None:  # the user chose to run the graph by ONNX Runtime
        return _onnx(path, entry, options)
    return options.device.open(path.parent, entry)


def _gguf(path: Path, entry: LanguageModelEntry, options: Options) -> LanguageModel:
    from mllm_edge.runtime.engines.llama.model import LlamaLanguageModel

    return LlamaLanguageModel(path, entry, options)


STAGE_ENGINES: dict[str, Callable[[Path, StageEntry, Options], Stage]] = {
    "onnx": _onnx,
    "tensorrt": _tensorrt,
}
LANGUAGE_MODEL_ENGINES: dict[str, Callable[[Path, LanguageModelEntry, Options], LanguageModel]] = {"gguf": _gguf}


def check_engines(stages: Sequence[StageEntry], language_model: LanguageModelEntry) -> None:
    """Check that every part of a bundle has an engine here, before any is loaded.

    Raises:
        MllmEdgeError: names the file and its engine.
    """
    tables: list[tuple[StageEntry | LanguageModelEntry, Mapping[str, Any]]] = [(s, STAGE_ENGINES) for s in stages]
    for entry, table in [*tables, (language_model, LANGUAGE_MODEL_ENGINES)]:
        if entry.engine not in table:
            known = ", ".join(table)
            raise MllmEdgeError(
                f"{entry.file} needs engine {entry.engine}, which this version cannot run (it has {known}); "
                "export the bundle with --target cpu or cuda"
            )
