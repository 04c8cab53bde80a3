"""TensorRT engines from a stage's ONNX file, strongly typed: precision is set by the graph, not by builder flags.

TensorRT-RTX builds ahead of time, on any x86 machine and without a GPU, for named compute capabilities; TensorRT builds
for the local GPU. `runtime/engines/tensorrt/packages.py` has their differences. No PyTorch is needed here, since boards
build too.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge.bundle.answers import AnswerEntry, PicturesAnswer
from mllm_edge.bundle.manifest import BuildSettings, TensorSpec
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.machine.devices import Device, get
from mllm_edge.runtime.engines.parts_language_model import BATCH
from mllm_edge.runtime.engines.tensorrt.engine import logger
from mllm_edge.runtime.engines.tensorrt.packages import RTX, Package
from mllm_edge.runtime.engines.tensorrt.stage import shape
from mllm_edge.runtime.wiring import Wired

AXIS = (1, 4, 16)  # least, usual and greatest length of an axis that varies
BEAMS = 5  # sequences that a language model's decoder is built for at least
USUAL = ("sm_86", "sm_89", "sm_120")  # GeForce RTX 30, 40 and 50


@dataclasses.dataclass(frozen=True)
class Work:
    """One engine to build.

    Attributes:
        onnx: the graph; external data is found beside it.
        inputs: the graph's expected inputs. Variable axes get a profile.
        outputs: the expected outputs.
        capabilities: of the target GPUs, such as "sm_89"; empty for the local GPU.
    """

    onnx: Path
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    capabilities: Sequence[str] = ()


def ahead(devices: Sequence[str]) -> list[str]:
    """The compute capabilities in `--device`, for which engines are built here.

    Raises:
        BadInput: an unknown name, a CPU, or a capability that TensorRT-RTX does not build for.
        MissingPackage: an engine is asked for and TensorRT-RTX is not installed.
    """
    wanted = {device.capability for device in map(_named, devices) if not device.board}
    known = _known() if wanted else set()
    for name in sorted(wanted - known):
        raise BadInput(f"TensorRT-RTX builds no engines for {name}; use {', '.join(sorted(known))}, or a device's name")
    return sorted(wanted, key=lambda name: int(name[3:]))


def is_board(name: str) -> bool:
    """Whether a `--device` builds its own engines. Raises BadInput for a name that is unknown or a CPU's."""
    return _named(name).board


def _named(name: str) -> Device:
    """The device of that name; of a compute capability nothing else is known."""
    device = Device(name, name, 0, 0, 0, 0, {}, name) if name.startswith("sm_") else get(name, also=USUAL)
    if not device.capability:
        raise BadInput(f"{name} has no GPU for TensorRT engines; export it with --target cpu")
    return device


def _known() -> set[str]:
    return {f"sm_{name[2:]}" for name in dir(RTX.load().ComputeCapability) if name.startswith("SM")}


def usual_devices(here: str) -> list[str]:
    """Default capabilities to build for (announced to the user): this machine's GPU, or common ones.

    Args:
        here: this machine's compute capability, "" without a GPU.
    """
    devices = [here] if here in _known() else list(USUAL)
    warnings.warn(
        f"engines are built for {', '.join(devices)}; name other GPUs, or a board such as orin-nano, with --device",
        RuntimeWarning,
        stacklevel=2,
    )
    return devices


def settings(devices: Sequence[str]) -> BuildSettings:
    """Settings for the boards among `--device`, under the names that were given; the smallest one decides."""
    boards = [name for name in devices if is_board(name)]
    limits = [limit for name in boards if (limit := get(name).scratch_mb)]
    return BuildSettings(boards, workspace_mb=min(limits, default=0))


def stage_axes(stages: Sequence[Wired], answers: Sequence[AnswerEntry]) -> dict[str, list[int]]:
    """Least, usual and greatest lengths of the named axes of stages. The branches of a generated picture's guidance are
    always all there."""
    named = {size for stage in stages for spec in stage.inputs for size in spec.shape if isinstance(size, str)}
    axes = {axis: list(AXIS) for axis in sorted(named)}
    for entry in answers:
        if isinstance(entry, PicturesAnswer):
            unet = next(stage for stage in stages if stage.name == entry.unet)
            batch = next(spec.shape[0] for spec in unet.inputs if spec.name == entry.latent)
            if isinstance(batch, str):
                axes[batch] = [len(entry.drops) + 1] * 3
    return axes


def language_model_axes(context: int, beams: int) -> dict[str, list[int]]:
    """Least, usual and greatest lengths of the axes of a language model's parts (`parts_language_model.py`)."""
    usual = min(128, context)
    return {
        "sequences": [1, 1, max(BEAMS, beams)],
        "tokens": [1, 1, BATCH],
        "rows": [2, usual, context],
        "positions": [1, usual, context],
        "capacity": [1, usual, context + 1],
    }


def build(
    work: Work,
    package: Package,
    how: BuildSettings,
    timing_cache: Path | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> bytes:
    """Build and serialize an engine.

    Args:
        work: what to build.
        package: the package that builds it.
        how: profile and scratch memory.
        timing_cache: a file of measured kernel times, extended by this build's, if the package supports it.
        progress: called with the share that is done.

    Raises:
        MllmEdgeError: the parser refuses a node (named), the network does not match the specs, or the build fails (with
            TensorRT's own reason).
        MissingPackage: the package is not installed.
    """
    trt = package.load()
    reasons: list[str] = []
    log = logger(trt, reasons)
    builder = trt.Builder(log)
    network = builder.create_network(package.network_flags())
    parser = trt.OnnxParser(network, log)
    stage = work.onnx.stem
    if not parser.parse_from_file(str(work.onnx)):
        raise MllmEdgeError(f"{stage}: TensorRT cannot read {_refused(parser)}; export it with --target cuda")
    _check("takes", stage, trt, [network.get_input(i) for i in range(network.num_inputs)], work.inputs)
    _check("gives", stage, trt, [network.get_output(i) for i in range(network.num_outputs)], work.outputs)
    config = builder.create_builder_config()
    if work.capabilities:
        config.num_compute_capabilities = len(work.capabilities)
        for index, name in enumerate(work.capabilities):
            sm = getattr(trt.ComputeCapability, f"SM{name.removeprefix('sm_')}")
            if not config.set_compute_capability(sm, index):
                raise MllmEdgeError(f"{package.name} {package.version} does not build for {name}; leave it out")
    if how.workspace_mb:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, how.workspace_mb * 10**6)
    _add_profile(builder, config, work.inputs, how.axes)
    failures: list[BaseException] = []
    config.progress_monitor = _monitor(trt, progress, failures)
    timed = bool(timing_cache and package.timing_cache and _use_times(config, timing_cache))
    engine = builder.build_serialized_network(network, config)
    if failures:  # mostly Ctrl-C: TensorRT's binding does not propagate exceptions
        raise failures[0]
    if engine is None:
        reason = reasons[-1] if reasons else "no reason given"
        raise MllmEdgeError(f"{stage}: TensorRT could not build it ({reason}); see --debug")
    if timing_cache and timed and (cache := config.get_timing_cache()) is not None:
        replaced(timing_cache, bytes(cache.serialize()))
    return bytes(engine)


def _use_times(config: Any, file: Path) -> bool:
    """Use a file's kernel times in the builder; those of another TensorRT version or GPU are refused and remeasured."""
    for known in (file.read_bytes() if file.is_file() else b"", b""):
        cache = config.create_timing_cache(known)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return True
    return False


def replaced(path: Path, content: bytes) -> None:
    """Write a file atomically: the old content stays until the new one is complete."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _monitor(trt: Any, progress: Callable[[float], None], failures: list[BaseException]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports the outermost phase; TensorRT nests others in it. An exception in the callback ends the build."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.outer = ""

        def phase_start(self, name: str, parent: str | None, count: int) -> None:
            self.steps[name] = count
            if parent is None:
                self.outer = name

        def step_complete(self, name: str, step: int) -> bool:
            try:
                if name == self.outer and self.steps.get(name) and not failures:
                    progress(min(1.0, (step + 1) / self.steps[name]))
            except BaseException as error:  # noqa: BLE001  raised again after the build
                failures.append(error)
            return not failures

        def phase_finish(self, name: str) -> None:
            self.steps.pop(name, None)

    return Monitor()


def _refused(parser: Any) -> str:
    """The first node that the parser refuses, and the reason."""
    error = parser.get_error(0)
    where = error.node_name() or f"node {error.node()}"
    return f"{where} ({error.node_operator() or 'operator'}: {' '.join(error.desc().split())})"


def _check(verb: str, stage: str, trt: Any, tensors: Sequence[Any], specs: Sequence[TensorSpec]) -> None:
    found = [(t.name, np.dtype(trt.nptype(t.dtype)).name, [None if d < 0 else d for d in t.shape]) for t in tensors]
    wanted = [(s.name, s.dtype, [None if isinstance(d, str) else d for d in s.shape]) for s in specs]
    if found != wanted:
        raise MllmEdgeError(f"{stage}: TensorRT's network {verb} {found}, the manifest says {wanted}; report this")


def _add_profile(builder: Any, config: Any, inputs: Sequence[TensorSpec], axes: Mapping[str, Sequence[int]]) -> None:
    varying = [spec for spec in inputs if any(isinstance(size, str) for size in spec.shape)]
    if not varying:
        return
    profile = builder.create_optimization_profile()
    for spec in varying:
        shapes = [shape(spec, {axis: lengths[place] for axis, lengths in axes.items()}) for place in range(3)]
        profile.set_shape(spec.name, *shapes)  # least, usual, most
    if config.add_optimization_profile(profile) < 0:
        raise MllmEdgeError(f"TensorRT refuses the profile {dict(axes)} of {varying[0].name}; export the bundle again")
