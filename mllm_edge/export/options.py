"""Options of an export, checked against each other before anything is read."""

from __future__ import annotations

from collections.abc import Sequence

from mllm_edge.errors import BadInput, look_up
from mllm_edge.export.tensorrt.engine import usual_devices
from mllm_edge.machine.facts import gpu_capability
from mllm_edge.models.plan import LanguageModelExport
from mllm_edge.quants import ENGINES, PRECISIONS, USUAL
from mllm_edge.targets import BUNDLES


def check_options(target: str, precision: str | None) -> str:
    """The precision of the stages, by default the target's. Raises BadInput for an unknown target or precision."""
    usual = look_up("target", target, BUNDLES).precision
    precision = usual if precision is None else precision
    look_up("precision", precision, PRECISIONS)
    return precision


def check_language_model(
    lm: LanguageModelExport, llm: str | None, quant: str | None, system: str, target: str
) -> tuple[str, str]:
    """The engine of the language model and its quantization. Raises BadInput where they do not go together."""
    engine = llm or ("gguf" if lm.kind == "causal" else "onnx")
    known = look_up("engine of language models", engine, ENGINES)
    if engine == "gguf" and lm.kind != "causal":
        raise BadInput(f"{system}'s language model is an encoder-decoder, which runs on ONNX Runtime; leave out --llm")
    if engine == "onnx" and not lm.parts:
        raise BadInput(f"{system}'s language model runs on llama.cpp alone; leave out --llm")
    quant = quant or ("fp16" if engine == "onnx" and target == "trt" else USUAL[engine])
    others = [name for name, quants in ENGINES.items() if quant in quants and name != engine]
    if others and quant not in known:
        raise BadInput(f"{quant} is for --llm {others[0]}; for {engine} there are {', '.join(known)}")
    look_up("quantization", quant, known)
    return engine, quant


def check_devices(target: str, devices: Sequence[str]) -> Sequence[str]:
    """What a bundle of target trt is for; nothing for the others."""
    if target != "trt":
        if devices:
            raise BadInput(f"--device goes with --target trt; leave it out for target {target}")
        return []
    return devices or usual_devices(gpu_capability())
