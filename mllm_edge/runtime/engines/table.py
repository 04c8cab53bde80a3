"""Which engine runs what: one line a backend. Its libraries are imported when it is first used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mllm_edge.bundle.manifest import LanguageModelEntry, StageEntry
from mllm_edge.runtime.engines.interface import LanguageModel, Options, Stage


def _onnx(path: Path, entry: StageEntry, options: Options) -> Stage:
    from mllm_edge.runtime.engines.ort import OnnxStage

    return OnnxStage(path, entry, options)


def _tensorrt(path: Path, entry: StageEntry, options: Options) -> Stage:
    if options.device is None:  # the user chose to run the graph by ONNX Runtime
        return _onnx(path, entry, options)
    return options.device.open(path.parent, entry)


def _gguf(folder: Path, entry: LanguageModelEntry, options: Options) -> LanguageModel:
    from mllm_edge.runtime.engines.llama.model import LlamaLanguageModel

    return LlamaLanguageModel(folder, entry, options)


def _onnx_language_model(folder: Path, entry: LanguageModelEntry, options: Options) -> LanguageModel:
    from mllm_edge.runtime.engines.ort_language_model import OrtLanguageModel

    return OrtLanguageModel(folder, entry, options)


STAGE_ENGINES: dict[str, Callable[[Path, StageEntry, Options], Stage]] = {
    "onnx": _onnx,
    "tensorrt": _tensorrt,
}
LANGUAGE_MODEL_ENGINES: dict[str, Callable[[Path, LanguageModelEntry, Options], LanguageModel]] = {
    "gguf": _gguf,
    "onnx": _onnx_language_model,
}
