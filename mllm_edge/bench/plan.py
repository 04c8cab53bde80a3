"""Before anything is downloaded: does a model fit a machine, and how fast can it be there.

Everything follows from counted shapes (`models/counts.py`). Times are a roofline's: the larger of operations over the
machine's rate and bytes over its bandwidth; what is expected is that limit over the part of it that engines reach on
such machines.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from mllm_edge.bench.result import Result
from mllm_edge.errors import BadInput, look_up
from mllm_edge.machine.devices import Device
from mllm_edge.models.counts import Counts, LanguageModelCounts, StageCounts, counts, kv_bytes_per_token
from mllm_edge.quants import CACHES, ENGINES, KV_TYPES, ONNX_QUANTS, PRECISIONS, QUANTS, SMALL
from mllm_edge.runtime.memory import MARGIN

TEXT = 64  # tokens of text around the picture
WORK_GB = 0.3  # Python, the engines' code and working memory
LEAST_CONTEXT = 512  # a smaller context is not proposed
SIZES = {name: kind.bytes_per_weight for name, kind in {**QUANTS, **ONNX_QUANTS}.items()}


@dataclass(frozen=True)
class Settings:
    """What a user may choose; an empty quantization or type of the KV cache is the usual small one."""

    precision: str
    quant: str
    context: int
    kv_type: str


@dataclass(frozen=True)
class Part:
    """A stage, the prefill of a picture and its question, or the decoding of one token.

    `measured_ms` is what a benchmark on the same machine gave, None without one. `lazy` stages run for some answers
    only, after the first token or before a question about a region.
    """

    name: str
    gflop: float
    bytes: int
    limit_ms: float
    expected_ms: float
    measured_ms: float | None = None
    lazy: bool = False


@dataclass(frozen=True)
class Plan:
    """The answer: memory in 10^9 bytes, times in milliseconds, and the first change that makes it fit."""

    system: str
    config: str
    device: Device
    settings: Settings
    prompt_tokens: int
    files_gb: dict[str, float]
    load_gb: float
    full_context_gb: float
    free_gb: float
    fits: bool
    advice: str
    parts: list[Part]

    @property
    def first_token_ms(self) -> tuple[float, float]:
        """Limit and expectation of the time to the first token of a picture and a question."""
        before = [part for part in self.parts if part.name != "decode" and not part.lazy]
        return sum(part.limit_ms for part in before), sum(part.expected_ms for part in before)


def settings(precision: str, quant: str, context: int, kv_type: str) -> Settings:
    """Settings from words.

    Raises:
        BadInput: names the choices.
    """
    look_up("precision", precision, PRECISIONS)
    look_up("quantization", quant or "f16", SIZES)
    look_up("KV cache type", kv_type or "f16", KV_TYPES)
    return Settings(precision, quant, context, kv_type)


def plan(system: str, config: str, chosen: Settings, device: Device, measured: Result | None = None) -> Plan:
    """Plan a system's config for a device.

    Args:
        system: a name of the registry.
        config: one of its configs.
        chosen: precision of the stages, quantization, context (0: the model's own), type of the KV cache.
        device: where it shall run.
        measured: a benchmark of the same on that device, to see how far the expectation is off.

    Raises:
        BadInput: an unknown name, a context past the model's, a quantization that its engines do not know, or a
            measurement of something else.
    """
    counted = counts(system, config)
    stages, dims = counted.stages, counted.language_model
    chosen = _complete(chosen, counted)
    if not 1 <= chosen.context <= dims.context:
        raise BadInput(f"{config} has a context of {dims.context}, not {chosen.context}; lower --context")
    if measured and (measured.system, measured.config) != (system, config):
        raise BadInput(
            f"the measurement is of {measured.system} {measured.config}, not of {system} {config}; give one of the same"
        )
    free = device.memory_gb - device.reserved_gb
    files = _files(stages, dims, chosen)
    full = _full(files, dims, chosen)
    early = {stage.name for stage in stages if stage.early}
    tokens = measured.prompt_tokens if measured else counted.picture_tokens + TEXT
    return Plan(
        system=system,
        config=config,
        device=device,
        settings=chosen,
        prompt_tokens=tokens,
        files_gb={name: round(size / 1e9, 6) for name, size in files.items()},
        load_gb=round(sum(files.values()) / 1e9 + WORK_GB, 3),
        full_context_gb=round(full, 3),
        free_gb=round(free, 3),
        fits=full <= free,
        advice="" if full <= free else _advice(stages, dims, chosen, free),
        parts=[
            replace(part, lazy=part.name in files and part.name not in early)
            for part in _parts(stages, files, dims, chosen, tokens, device, measured)
        ],
    )


def _complete(chosen: Settings, counted: Counts) -> Settings:
    """The settings with the usual ones in place of empty ones."""
    quant = chosen.quant or SMALL[counted.engines[0]]
    engine = _engine(quant)
    if engine not in counted.engines:
        known = ", ".join(name for one in counted.engines for name in ENGINES[one])
        raise BadInput(f"{quant} is of another engine than this language model's; use one of {known}")
    kv_type = chosen.kv_type or CACHES[engine]
    if engine == "onnx" and kv_type != CACHES[engine]:
        raise BadInput(f"ONNX Runtime's KV cache is {CACHES[engine]}, not {kv_type}; leave --kv-type out")
    return replace(chosen, quant=quant, kv_type=kv_type, context=chosen.context or counted.language_model.context)


def _engine(quant: str) -> str:
    return next(name for name, quants in ENGINES.items() if quant in quants)


def _files(stages: list[StageCounts], dims: LanguageModelCounts, settings: Settings) -> dict[str, int]:
    sizes = {}
    for stage in stages:
        precision = settings.precision if settings.precision in stage.precisions else stage.precisions[-1]
        sizes[stage.name] = int(stage.weights * PRECISIONS[precision].bytes_per_weight)
    return {**sizes, "language_model": int(dims.weights * SIZES[settings.quant])}


def _full(files: dict[str, int], dims: LanguageModelCounts, settings: Settings) -> float:
    """GB with the whole context in use."""
    cache = settings.context * _kv_bytes(dims, settings)
    return (sum(files.values()) + cache) / 1e9 + WORK_GB


def _kv_bytes(dims: LanguageModelCounts, settings: Settings) -> int:
    return kv_bytes_per_token(dims, KV_TYPES[settings.kv_type])


def _advice(stages: list[StageCounts], dims: LanguageModelCounts, settings: Settings, free: float) -> str:
    """The first change that fits, from the cheapest to the dearest in quality."""
    engine = _engine(settings.quant)
    quants = list(ENGINES[engine])  # from the largest to the smallest
    smaller, least = quants[quants.index(settings.quant) + 1 :], quants[-1]
    lean = replace(settings, kv_type="q8_0" if engine == "gguf" else settings.kv_type)
    tried = [lean, *(replace(lean, quant=quant) for quant in smaller)]
    tried += [replace(lean, quant=least, precision="int8")]
    context = settings.context // 2
    while context >= LEAST_CONTEXT:
        tried.append(replace(lean, quant=least, precision="int8", context=context))
        context //= 2
    for other in tried:
        if _full(_files(stages, dims, other), dims, other) <= free:
            return f"it fits with {_changed(settings, other).strip()}"
    for other in [settings, *tried]:
        if _in_turn(stages, dims, other) <= free:
            changed = f"with {_changed(settings, other)}" if other != settings else ""
            return f"{changed}its parts fit in turn, which is slower: run it with --memory-budget {free:.1f}G"
    return "nothing makes it fit; take a smaller config"


def _changed(old: Settings, new: Settings) -> str:
    """The options that make one of the other, each with a space after it."""
    before, after = asdict(old), asdict(new)
    return "".join(f"--{name.replace('_', '-')} {after[name]} " for name in after if after[name] != before[name])


def _in_turn(stages: list[StageCounts], dims: LanguageModelCounts, settings: Settings) -> float:
    """GB with the whole context in use where parts are loaded for each use (`runtime/memory.py`, its last way)."""
    files = _files(stages, dims, settings)
    language_model = files["language_model"] + settings.context * _kv_bytes(dims, settings)
    beside = language_model + max((files[stage.name] for stage in stages if stage.early), default=0)
    return max(beside, *files.values()) * MARGIN / 1e9 + WORK_GB


def _parts(
    stages: list[StageCounts],
    files: dict[str, int],
    dims: LanguageModelCounts,
    settings: Settings,
    tokens: int,
    device: Device,
    measured: Result | None,
) -> list[Part]:
    size = SIZES[settings.quant]
    read, first = int(dims.product_weights * size), int(dims.prompt_weights * size)
    cache = tokens * _kv_bytes(dims, settings)
    attention = 2 * tokens**2 * dims.attention_width * dims.layers  # scores and values, half of them masked
    costs: dict[str, tuple[float, int]] = {stage.name: (stage.flops, files[stage.name]) for stage in stages}
    costs["prefill"] = 2.0 * dims.prompt_weights * tokens + attention, first
    costs["decode"] = 2.0 * dims.product_weights, read + cache
    seen: dict[str, Any] = {}
    if measured:
        seen = {name: spread.median for name, spread in measured.stages_ms.items()}
        seen["decode"] = 1000 / measured.decode_tokens_per_s.median
    parts = []
    for name, (flops, size) in costs.items():
        limit = 1000 * max(flops / (device.tflops * 1e12), size / (device.memory_gb_per_s * 1e9))
        expected = limit / device.reach.get(name, device.reach["stage"])
        parts.append(Part(name, round(flops / 1e9, 3), size, round(limit, 3), round(expected, 3), seen.get(name)))
    return parts
