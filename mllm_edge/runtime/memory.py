"""Which parts of a bundle may be in memory at the same time, so that the peak stays under a budget."""

from __future__ import annotations

from dataclasses import dataclass

from mllm_edge.bundle.manifest import LanguageModelEntry, Manifest, StageEntry
from mllm_edge.errors import BadInput
from mllm_edge.machine.facts import resident_memory
from mllm_edge.quants import KV_TYPES
from mllm_edge.runtime.engines.interface import Options
from mllm_edge.runtime.wiring import needed_for, prompt_tensors

INLINE = 200_000_000  # bytes; lighter stages are one file, of which two further copies exist while it is loaded
SCRATCH = 150_000_000  # llama.cpp's compute buffers and the logits, and beside it for each value of a hidden state:
SCRATCH_PER_WIDTH = 60_000  # 512 positions at once, and about 30 buffers of fp32
PICTURES = 100_000_000  # pictures and their cached tensors
MARGIN = 1.10  # measured at 7 B with masks: peaks of 0.97 of this with everything loaded, 0.81 with parts unloaded


@dataclass(frozen=True)
class MemoryPlan:
    """Whether stages stay in memory after use, and whether the language model stays while other answers are made.

    `peak` is the most bytes that this is expected to take.
    """

    keep_stages: bool
    keep_language_model: bool
    peak: int

    def __str__(self) -> str:
        kept = "everything stays in memory" if self.keep_stages else "stages are unloaded after use"
        if not self.keep_language_model:
            kept += ", and the language model while masks and pictures are made"
        return f"{kept}; at most about {budget_text(self.peak)}"


def plan_memory(manifest: Manifest, options: Options, budget: int | None) -> MemoryPlan:
    """The fastest way to stay under a budget in bytes of resident memory; without one everything stays.

    Raises:
        BadInput: even with one part in memory at a time it would not do; says what the parts take.
    """
    resident = resident_memory()
    base = int((PICTURES if resident is None else resident) * MARGIN) + PICTURES
    language_model = language_model_bytes(manifest.language_model, options)
    stages = {entry.name: stage_bytes(entry) for entry in manifest.stages}
    largest = max(stages.values(), default=0)
    busy = max((entry.activation_bytes for entry in manifest.stages), default=0)
    kept = sum(stages.values()) - sum(entry.activation_bytes for entry in manifest.stages) + busy
    # What the prompt is made of runs while the language model is there: it tokenizes first.
    early = needed_for(prompt_tensors(manifest.prompt, manifest.sources), manifest.stages)
    beside = language_model + max((stages[name] for name in early), default=0)
    least = max(beside, largest)
    ways = [
        MemoryPlan(True, True, base + int((language_model + kept) * MARGIN)),
        MemoryPlan(False, True, base + int((language_model + largest) * MARGIN)),
        MemoryPlan(False, False, base + int(least * MARGIN)),
    ]
    for way in ways:
        if budget is None or way.peak <= budget:
            return way
    parts = {**stages, manifest.language_model.name: language_model}
    heaviest = sorted(parts, key=lambda name: -parts[name])[:2]
    raise BadInput(
        f"this bundle cannot stay under {budget_text(budget or 0)}: it takes {budget_text(ways[-1].peak)} at least ("
        + " and ".join(f"{name} {budget_text(parts[name])}" for name in heaviest)
        + f", the process {budget_text(base)}); export it smaller (--quant, --precision) or lower --context"
    )


def stage_bytes(entry: StageEntry) -> int:
    """Memory of a stage at work: its weights and the most that its graph holds between nodes."""
    weights = entry.bytes + sum(file.bytes for file in entry.data_files)
    return (weights if weights > INLINE else 3 * weights) + entry.activation_bytes


def language_model_bytes(entry: LanguageModelEntry, options: Options) -> int:
    """Memory of the language model with its whole context in use."""
    number = KV_TYPES["f32" if entry.engine == "onnx" else options.kv_type]  # of ONNX Runtime's caches
    cache = entry.kv_bytes_per_token / 2 * number * options.context
    return int(entry.bytes + cache) + SCRATCH + SCRATCH_PER_WIDTH * entry.width


def budget_text(size: float) -> str:
    """Bytes as people write them: 6.0G, 512M."""
    return f"{size / 2**30:.1f}G" if size >= 2**30 else f"{size / 2**20:.0f}M"


def parse_size(text: str) -> int:
    """Bytes of "6G", "512M" or a plain number of bytes (powers of 1024, as in a cgroup's limit).

    Raises:
        BadInput: it is neither.
    """
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        size = float(number) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[unit]
    except (KeyError, ValueError):
        raise BadInput(f"{text!r} is no amount of memory; write it as 6G or 512M") from None
    if not 0 < size < 2**60:
        raise BadInput(f"{text!r} is no amount of memory; write it as 6G or 512M")
    return int(size)
