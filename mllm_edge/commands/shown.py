"""What commands show of systems, bundles, engines, parity and answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_edge.bundle.sources import Pixels, Source, States, Task, Text
from mllm_edge.tables import pairs, size, table

if TYPE_CHECKING:
    from rich.table import Table

    from mllm_edge.bundle.manifest import Manifest, Parity, TensorSpec
    from mllm_edge.export.tensorrt.build import Built
    from mllm_edge.models.info import SystemInfo
    from mllm_edge.runtime import Answer


def system_table(systems: Sequence[SystemInfo]) -> Table:
    """The registry."""
    made = table("", "system", "answers", "stages", "configs", "base checkpoints", "licenses")
    for info in systems:
        made.add_row(
            f"{info.name}\n{info.title}",
            ", ".join(info.tasks),
            "\n".join(info.stages),
            "\n".join(f"{name}: {what}" for name, what in info.configs.items()),
            "\n".join(info.base_checkpoints),
            "\n".join(f"{name}: {licence}" for name, licence in info.licences.items()),
        )
    return made


def bundle_tables(folder: Path, manifest: Manifest) -> list[Table]:
    """All that `bundle.json` says."""
    prompt = manifest.prompt
    about = {
        "system": f"{manifest.system}, config {manifest.config}",
        "target": manifest.target,
        "tasks": ", ".join(manifest.tasks),
        "made": f"{manifest.created} by mllm-edge {manifest.tool_version}",
        "weights": ", ".join(f"{key} {_short(value)}" for key, value in manifest.source.items()),
        "licenses": "; ".join(f"{key}: {value}" for key, value in manifest.licences.items()),
        "size": size(sum(entry.bytes for entry in manifest.files())),
        "context": f"{manifest.language_model.context} positions",
        "prompt": f"{prompt.name}: {prompt.first.replace('{system}', prompt.system)!r}",
        "stops at": ", ".join(map(repr, prompt.stop)),
    }
    for slot in prompt.slots:
        about[f"{slot.placeholder} takes"] = f"{slot.of}, as {' and '.join(slot.tensors)}"
    for source in manifest.sources:
        about[f"source {getattr(source, 'name', getattr(source, 'field', ''))}"] = _source(source)
    if manifest.answers:
        about["answers with"] = ", ".join(["text", *(entry.kind for entry in manifest.answers)])
    files = table(
        "stages", "stage", "engine", "precision", "inputs", "outputs", "size", "sha256", "parity", right=("size",)
    )
    checked = {row.name: "passed" if row.passed else "FAILED" for row in manifest.parity}
    for stage in manifest.stages:
        weight = stage.bytes + sum(entry.bytes for entry in stage.data_files)
        files.add_row(
            stage.name,
            stage.engine,
            stage.precision,
            _specs(stage.inputs),
            _specs(stage.outputs),
            size(weight),
            stage.sha256[:12],
            checked.get(stage.name, "not verified"),
        )
    lm = manifest.language_model
    files.add_row(
        lm.name,
        lm.engine,
        lm.precision,
        f"embeddings [T,{lm.width}]",
        f"logits [{lm.vocabulary}]",
        size(lm.bytes),
        lm.sha256[:12],
        checked.get(lm.name, "not verified"),
    )
    for entry in manifest.extra_files:
        files.add_row(entry.file, "", "", "", "", size(entry.bytes), entry.sha256[:12], "")
    shown = [pairs(str(folder), about), files, *([_engines(manifest)] if manifest.target == "trt" else [])]
    return [*shown, parity_table(manifest.parity)] if manifest.parity else shown


def engine_table(built: Sequence[Built]) -> Table:
    """What `mllm-edge build` did."""
    numbers = ("size", "built in", "cosine to its graph")
    made = table("engines", "stage", "engine", *numbers, right=numbers)
    for one in built:
        took = f"{one.seconds:.1f} s" if one.seconds else "was there"
        cosine = "not compared here" if one.cosine is None else f"{one.cosine:.6f}"
        made.add_row(one.stage, one.file, size(one.bytes), took, cosine)
    return made


def parity_table(rows: Sequence[Parity]) -> Table:
    """Measured against PyTorch, with what is allowed; rows of TensorRT engines are against their graphs."""
    engines = any(" on sm_" in row.name for row in rows)
    title = "parity with PyTorch" + ("; on a GPU, of an engine with its graph" if engines else "")
    made = table(title, "stage", "result", "measured", "tolerance")
    for row in rows:
        made.add_row(
            row.name,
            "passed" if row.passed else "FAILED",
            ", ".join(f"{key} {value:.4g}" for key, value in row.measured.items()),
            ", ".join(f"{key} {value:g}" for key, value in row.tolerance.items()) or "none",
        )
    return made


def timing_table(answer: Answer) -> Table:
    """What an answer cost; parts that took no time are left out."""
    timings = {name: ms for name, ms in answer.timings.items() if ms > 0}
    made = table("", *timings, "peak memory", right=(*timings, "peak memory"))
    peak = answer.memory["peak_rss"]
    made.add_row(*(f"{ms:.1f} ms" for ms in timings.values()), "" if peak is None else f"{peak:.0f} MB")
    return made


def _engines(manifest: Manifest) -> Table:
    """TensorRT's engines: what they are for, or that the device has yet to build its own."""
    made = table("TensorRT engines", "stage", "GPUs", "built by", "size", right=("size",))
    for stage in manifest.engine_stages():
        for engine in stage.engines:
            gpus, by = ", ".join(engine.capabilities), f"{engine.package} {engine.version}"
            made.add_row(stage.name, gpus, by, size(engine.bytes))
        if not stage.engines:
            made.add_row(stage.name, "to build", "on the device: mllm-edge build", "")
    if manifest.build.devices:
        made.add_row("all", ", ".join(manifest.build.devices), "the board itself: mllm-edge build", "")
    return made


def _source(source: Source) -> str:
    """A source in a few words."""
    if isinstance(source, Pixels):
        return f"pixels, {source.size} x {source.size}, {source.fit}, {source.resample}"
    if isinstance(source, States):
        return f"hidden states {'before' if source.at == 'before' else 'at'} {', '.join(source.tokens)}"
    if isinstance(source, Task):
        return f"task: {', '.join(source.values)}"
    if isinstance(source, Text):
        return f"the question in {source.length} tokens of {source.tokenizer}"
    return source.kind


def _specs(specs: Sequence[TensorSpec]) -> str:
    return "\n".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in specs)


def _short(value: str) -> str:
    is_hash = len(value) == 64 and set(value) <= set("0123456789abcdef")
    return value[:12] if is_hash else value
