"""Which engine runs what: one line a backend. Its libraries are imported when it is first used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_edge.bundle.check import locate
from mllm_edge.bundle.manifest import LanguageModelEntry, StageEntry
from mllm_edge.runtime.engines.interface import LanguageModel, Options, Stage

if TYPE_CHECKING:
    from mllm_edge.runtime.engines.parts_language_model import Decoder


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


def _parts(folder: Path, entry: LanguageModelEntry, options: Options) -> LanguageModel:
    from mllm_edge.runtime.engines.parts_language_model import PartsLanguageModel

    def stage(part: StageEntry) -> Stage:
        beside = options.device is not None and part.engine == "onnx"  # of engines: a table, read on the host
        how = dataclasses.replace(options, target="cpu") if beside else options
        return STAGE_ENGINES[part.engine](locate(folder, part.file), part, how)

    def decoder(part: StageEntry) -> Decoder:
        if part.engine == "tensorrt" and options.device is not None:
            return options.device.decoder(folder, part)
        from mllm_edge.runtime.engines.ort import OnnxStage
        from mllm_edge.runtime.engines.ort_decoder import OrtDecoder

        return OrtDecoder(OnnxStage(locate(folder, part.file), part, options))

    return PartsLanguageModel(entry, options, stage, decoder)


STAGE_ENGINES: dict[str, Callable[[Path, StageEntry, Options], Stage]] = {
    "onnx": _onnx,
    "tensorrt": _tensorrt,
}
LANGUAGE_MODEL_ENGINES: dict[str, Callable[[Path, LanguageModelEntry, Options], LanguageModel]] = {
    "gguf": _gguf,
    "onnx": _parts,
}
