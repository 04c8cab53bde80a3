"""`mllm-edge build`: engines for the stages of a bundle that lack one, on the device that will run them or ahead."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mllm_edge.bundle.check import locate
from mllm_edge.bundle.manifest import BuildSettings, BuiltEngine, Manifest, Parity, StageEntry
from mllm_edge.bundle.read import check_file, file_entry, graph_of, read_manifest, write_manifest
from mllm_edge.errors import BadInput, MissingPackage, MllmEdgeError
from mllm_edge.export.tensorrt.check import EngineCheck, with_rows
from mllm_edge.export.tensorrt.engine import Work, ahead, build, is_board, replaced
from mllm_edge.export.workplace import disk_full_explained
from mllm_edge.runtime.engines.onnx_graph import check_graph_file
from mllm_edge.runtime.engines.tensorrt.packages import RTX, Package, axes_of, package_named, usable
from mllm_edge.runtime.engines.tensorrt.stage import Device

if TYPE_CHECKING:
    from mllm_edge.progress import Report

ENGINE = ".engine"


@dataclasses.dataclass(frozen=True)
class Built:
    """What became of a stage: its engine, the seconds that building it took (0 where it was there), and its cosine to
    its graph (None where it was there, or its GPU is not here to run it)."""

    stage: str
    file: str
    bytes: int
    seconds: float
    cosine: float | None = None


def build_bundle(
    folder: Path, devices: Sequence[str] = (), force: bool = False, report: Report = lambda *_: None
) -> list[Built]:
    """Build what is missing. An engine enters the manifest when it is complete and, where its GPU is here, was compared
    with its graph.

    An engine that is there is kept where its file is whole and its graph, package, version, GPU and profile are those
    that are wanted. One that was built for this GPU by another version is replaced.

    Args:
        folder: a bundle of target trt.
        devices: what to build for with TensorRT-RTX, as for `ahead`; by default the GPU of this machine.
        force: build what is there, too.
        report: called for each stage.

    Raises:
        BadInput: no bundle of target trt, or a device that cannot be built for here.
        MissingPackage: no TensorRT is installed.
        OutOfTolerance: an engine does not give what its graph gives; it is thrown away.
        MllmEdgeError: there is no GPU, the disk is full, or a stage cannot be built.
    """
    manifest = read_manifest(folder, engines=False)
    if manifest.target != "trt":
        raise BadInput(f"{folder} was made for {manifest.target}, which needs no engines; export it with --target trt")
    package, capabilities, device = _goal(folder, manifest, devices)
    with contextlib.ExitStack() as opened:
        if device:
            opened.callback(device.close)
        compare = EngineCheck(folder, manifest, device) if device else None
        done = []
        stages = manifest.engine_stages()
        for number, stage in enumerate(stages, 1):
            progress = _part_report(report, stage.name, number, len(stages))
            report(stage.name, number, len(stages), None)
            started = time.monotonic()
            present = {one: None if force else _present(folder, stage, one, package, manifest) for one in capabilities}
            missing = [one for one, engine in present.items() if engine is None]
            row = None
            if missing:
                engine = make_engine(folder, stage, missing, package, manifest.build, progress)
                try:
                    row = compare(stage, engine) if compare else None
                    manifest = _with_engine(manifest, folder, stage, engine, row)
                except BaseException:
                    locate(folder, engine.file).unlink(missing_ok=True)
                    raise
            else:
                engine = cast(BuiltEngine, present[capabilities[0]])
            seconds = time.monotonic() - started
            took, cosine = round(seconds, 3) if missing else 0.0, row.measured["cosine"] if row else None
            done.append(Built(stage.name, engine.file, engine.bytes, took, cosine))
            report(stage.name, number, len(stages), seconds)
        return done


def _goal(folder: Path, manifest: Manifest, devices: Sequence[str]) -> tuple[Package, list[str], Device | None]:
    """What builds, for which GPUs, and the one that is here."""
    if boards := [name for name in devices if is_board(name)]:
        raise BadInput(f"engines for {boards[0]} are built on the board; run there: mllm-edge build {folder}")
    if devices:
        return RTX, ahead(devices), None
    package, device = _installed(), Device(manifest)
    return package, ahead([device.capability]) if package.ahead else [device.capability], device


def make_engine(
    folder: Path,
    stage: StageEntry,
    capabilities: Sequence[str],
    package: Package,
    how: BuildSettings,
    progress: Callable[[float], None] = lambda _: None,
) -> BuiltEngine:
    """Build a stage's engine beside its graph, in one step.

    Raises:
        BadInput: the graph reads files that are not its own, or unfolds without bound.
        MllmEdgeError: see `tensorrt.build`.
    """
    check_graph_file(folder / stage.file, stage)
    named = capabilities if package.ahead else []  # the GPU at hand needs no naming
    work = Work(folder / stage.file, stage.inputs, stage.outputs, named)
    file = f"{Path(stage.file).stem}.{'-'.join(capabilities)}.{package.name}-{package.version}{ENGINE}"
    with disk_full_explained(folder):
        replaced(folder / file, build(work, package, how, folder / how.timing_cache, progress))
    return BuiltEngine(
        **dataclasses.asdict(file_entry(folder, file)),
        package=package.name,
        version=package.version,
        capabilities=list(capabilities),
        graph=graph_of(stage),
        axes=axes_of(stage, how.axes),
    )


def _installed() -> Package:
    versions, broken = usable()
    if versions:
        return package_named(next(iter(versions)))
    raise MllmEdgeError(broken) if broken else MissingPackage(RTX.name, RTX.extra)


def _present(
    folder: Path, stage: StageEntry, capability: str, package: Package, manifest: Manifest
) -> BuiltEngine | None:
    """The engine that is there already and whole."""
    wanted = (package.name, package.version, graph_of(stage), axes_of(stage, manifest.build.axes))
    for engine in stage.engines:
        if (engine.package, engine.version, engine.graph, engine.axes) == wanted:
            with contextlib.suppress(BadInput):
                check_file(engine, folder)
                if capability in engine.capabilities:
                    return engine
    return None


def _with_engine(
    manifest: Manifest, folder: Path, stage: StageEntry, made: BuiltEngine, row: Parity | None
) -> Manifest:
    """The manifest, written, with a new engine instead of those that it replaces, whose files go."""
    replaces = [e for e in stage.engines if e.package == made.package and set(e.capabilities) <= set(made.capabilities)]
    kept = [engine for engine in stage.engines if engine not in replaces]
    engines = [*kept, made]

    def with_engines(entries: list[StageEntry]) -> list[StageEntry]:
        return [dataclasses.replace(one, engines=engines) if one.file == stage.file else one for one in entries]

    language_model = dataclasses.replace(manifest.language_model, parts=with_engines(manifest.language_model.parts))
    parity = with_rows(manifest.parity, [row]) if row else manifest.parity
    manifest = dataclasses.replace(
        manifest, stages=with_engines(manifest.stages), language_model=language_model, parity=parity
    )
    write_manifest(manifest, folder)
    for engine in replaces:
        if engine.file != made.file:
            locate(folder, engine.file).unlink(missing_ok=True)
    return manifest


def _part_report(report: Report, stage: str, number: int, total: int) -> Callable[[float], None]:
    return lambda part: report(stage, number, total, None, part)
