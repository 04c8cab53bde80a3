"""Counts weights and operations of every config from shapes alone: `python -m mllm_edge.export.counting`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from mllm_edge import models
from mllm_edge.bundle.sources import Labels
from mllm_edge.export.cost import stage_flops, without_weights
from mllm_edge.models.counts import FILE, Counts, LanguageModelCounts, StageCounts
from mllm_edge.models.resolve import resolve
from mllm_edge.runtime.wiring import needed_for


def count(system: str, config: str) -> Counts:
    """What a config weighs and costs."""
    lowered = models.get(system).load_module().plan(without_weights(resolve(system, "random", config)))
    asked = [name for slot in lowered.prompt.slots if slot.of != "boxes" for name in slot.tensors]
    words = [source.tensor for source in lowered.sources if isinstance(source, Labels)]
    early = needed_for([*asked, *words], lowered.stages)
    stages = []
    for stage in lowered.stages:
        with torch.device("meta"):
            module = stage.module()
        weights = sum(parameter.numel() for parameter in module.parameters())
        flops = stage_flops(module, stage.inputs)
        stages.append(StageCounts(stage.name, weights, flops, list(stage.precisions), stage.name in early))
    dims = lowered.language_model.dims
    numbers = {field.name: int(getattr(dims, field.name)) for field in dataclasses.fields(LanguageModelCounts)}
    engines = ["gguf", "onnx"] if lowered.language_model.kind == "causal" else ["onnx"]
    return Counts(lowered.picture_tokens, stages, LanguageModelCounts(**numbers), engines)


def main() -> None:
    """Write the counts of every system beside its code."""
    for system in models.SYSTEMS:
        table = {config: dataclasses.asdict(count(system, config)) for config in models.get(system).configs}
        file = Path(models.__file__).parent / system / FILE
        file.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        print(file)


if __name__ == "__main__":
    main()
