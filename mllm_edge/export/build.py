"""`mllm-edge build`: engines for the stages of a bundle that lack one, on the device that will run them or ahead."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_edge import bundle
from mllm_edge.bundle import BuildSettings, BuiltEngine, Manifest, StageEntry, file_entry, graph_of
from mllm_edge.errors import BadInput, MissingPackage, OutOfTolerance
from mllm_edge.export.engine_check import EngineCheck, with_rows
from mllm_edge.export.tensorrt import BOARDS, Work, ahead, build, replaced
from mllm_edge.export.workplace import disk_full_explained
from mllm_edge.runtime.tensorrt import Device
from mllm_edge.runtime.tensorrt_packages import PACKAGES, RTX, Package, has_free_axes

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


def build_bundle(folder: Path, devices: Sequence[str] = (), report: Report = lambda *_: None) -> list[Built]:
    """Build what is missing; each engine is in the manifest as soon as it is complete and, where its GPU is here, was
    compared with its graph.

    An engine that is there is kept where its graph, package, version, GPU and profile are those that are wanted. One
    that was built for this GPU by another version is replaced.

    Args:
        folder: a bundle of target trt.
        devices: compute capabilities to build for with TensorRT-RTX; by default the GPU of this machine.
        report: told of each stage.

    Raises:
        BadInput: no bundle of target trt, or a device that cannot be built for here.
        MissingPackage: no TensorRT is installed.
        OutOfTolerance: an engine does not give what its graph gives; it is taken out again.
        MllmEdgeError: there is no GPU, the disk is full, or a stage cannot be built.
    """
    manifest = bundle.read(folder)
    if manifest.target != "trt":
        raise BadInput(f"{folder} was made for {manifest.target}, which needs no engines; export it with --target trt")
    device: Device | None = None
    if devices:
        if boards := [name for name in devices if name in BOARDS]:
            raise BadInput(f"engines for {boards[0]} are built on the board; run there: mllm-edge build {folder}")
        package, capabilities = RTX, ahead(devices)
    else:
        package, device = _installed(), Device(manifest)
        capabilities = [device.capability]
    check = EngineCheck(folder, manifest, device) if device else None
    done = []
    for number, stage in enumerate(manifest.stages, 1):
        report(stage.name, number, len(manifest.stages), None)
        begun = time.monotonic()
        missing = [one for one in capabilities if not _present(stage, one, package, manifest.build)]
        if missing:
            tell = _part_teller(report, stage.name, number, len(manifest.stages))
            made = make_engine(folder, stage, missing, package, manifest.build, tell)
            manifest = _with_engine(manifest, folder, stage, made)
        row = None
        if check and missing:
            try:
                row = check(manifest.stage(stage.name))
            except OutOfTolerance:
                _write(dataclasses.replace(manifest, stages=_replaced(manifest, stage, [])), folder)
                raise
            manifest = _write(dataclasses.replace(manifest, parity=with_rows(manifest.parity, [row])), folder)
        stage = manifest.stage(stage.name)
        seconds = time.monotonic() - begun
        engine = next(e for e in stage.engines if capabilities[0] in e.capabilities and e.version == package.version)
        took, cosine = round(seconds, 3) if missing else 0.0, row.measured["cosine"] if row else None
        done.append(Built(stage.name, engine.file, engine.bytes, took, cosine))
        report(stage.name, number, len(manifest.stages), seconds)
    return done


def make_engine(
    folder: Path,
    stage: StageEntry,
    capabilities: Sequence[str],
    package: Package,
    how: BuildSettings,
    tell: Callable[[float], None] = lambda _: None,
) -> BuiltEngine:
    """Build a stage's engine beside its graph, in one step.

    Raises:
        MllmEdgeError: see `tensorrt.build`.
    """
    on_device = [] if package.ahead else capabilities  # the GPU at hand needs no naming
    work = Work(folder / stage.file, stage.inputs, stage.outputs, [c for c in capabilities if c not in on_device])
    file = f"{Path(stage.file).stem}.{'-'.join(capabilities)}.{package.name}-{package.version}{ENGINE}"
    with disk_full_explained(folder):
        replaced(folder / file, build(work, package, how, folder / how.timing_cache, tell))
    return BuiltEngine(
        **dataclasses.asdict(file_entry(folder, file)),
        package=package.name,
        version=package.version,
        capabilities=list(capabilities),
        graph=graph_of(stage),
        profile=how.profile if has_free_axes(stage) else [],
    )


def _installed() -> Package:
    for package in PACKAGES:
        if package.installed:
            return package
    raise MissingPackage(RTX.name, RTX.extra)


def _present(stage: StageEntry, capability: str, package: Package, how: BuildSettings) -> bool:
    profile = how.profile if has_free_axes(stage) else []
    wanted = (package.name, package.version, graph_of(stage), profile)
    return any(
        (engine.package, engine.version, engine.graph, engine.profile) == wanted and capability in engine.capabilities
        for engine in stage.engines
    )


def _with_engine(manifest: Manifest, folder: Path, stage: StageEntry, made: BuiltEngine) -> Manifest:
    """The manifest, written, with a new engine instead of those that it replaces, whose files go."""
    replaces = [e for e in stage.engines if e.package == made.package and set(e.capabilities) <= set(made.capabilities)]
    kept = [engine for engine in stage.engines if engine not in replaces]
    manifest = _write(dataclasses.replace(manifest, stages=_replaced(manifest, stage, [*kept, made])), folder)
    for engine in replaces:
        if engine.file != made.file:
            with contextlib.suppress(FileNotFoundError):
                bundle.locate(folder, engine.file).unlink()
    return manifest


def _replaced(manifest: Manifest, stage: StageEntry, engines: list[BuiltEngine]) -> list[StageEntry]:
    finished = dataclasses.replace(stage, engines=engines)
    return [finished if one.name == stage.name else one for one in manifest.stages]


def _write(manifest: Manifest, folder: Path) -> Manifest:
    bundle.write(manifest, folder)
    return manifest


def _part_teller(report: Report, stage: str, number: int, total: int) -> Callable[[float], None]:
    return lambda part: report(stage, number, total, None, part)
