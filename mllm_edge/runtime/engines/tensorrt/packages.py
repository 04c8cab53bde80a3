"""TensorRT's packages: differences between TensorRT 10, TensorRT 11 and TensorRT-RTX, and which engine runs here."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_edge.bundle.manifest import BuiltEngine, StageEntry
from mllm_edge.bundle.read import graph_of
from mllm_edge.errors import MissingPackage, MllmEdgeError
from mllm_edge.machine import jetson


@dataclass(frozen=True)
class Package:
    """A package that builds and runs engines.

    Attributes:
        name: its name for pip.
        module: its import name.
        extra: our extra that installs it.
        ahead: builds for absent GPUs, by compute capability; the others build for the local GPU.
        timing_cache: measures kernels during a build and can save the times.
    """

    name: str
    module: str
    extra: str
    ahead: bool
    timing_cache: bool

    @property
    def installed(self) -> bool:
        """Whether it can be imported."""
        return importlib.util.find_spec(self.module) is not None

    def load(self) -> Any:
        """The module.

        Raises:
            MissingPackage: includes the command that installs it.
            MllmEdgeError: it is installed and does not load.
        """
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name != self.module:
                raise MllmEdgeError(f"{self.name} does not load ({error}); install it again") from None
            raise MissingPackage(self.name, self.extra) from None
        except (ImportError, OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise MllmEdgeError(f"{self.name} is installed but does not load ({reason}); install it again") from None

    @property
    def version(self) -> str:
        """Version of the installed package."""
        return str(self.load().__version__)

    def network_flags(self) -> int:
        """Flags for a strongly typed network: one in TensorRT 10, none in TensorRT 11, which has no other kind."""
        flag = getattr(self.load().NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return 0 if flag is None else 1 << int(flag)


RTX = Package("tensorrt-rtx", "tensorrt_rtx", "rtx", ahead=True, timing_cache=False)
TENSORRT = Package("tensorrt", "tensorrt", "trt", ahead=False, timing_cache=True)
PACKAGES = (TENSORRT, RTX)  # in order of preference if both are installed


def bindings() -> str:
    """The pip requirement for CUDA's runtime: JetPack 6 has the driver of CUDA 12."""
    board = jetson.find()
    return "cuda-bindings>=12.6" + (",<13" if board and board.l4t.startswith("36.") else "")


def find(stage: StageEntry, capability: str, axes: Mapping[str, Sequence[int]]) -> BuiltEngine | str:
    """The engine of a stage that runs on a GPU with the packages that are installed, or why there is none."""
    here, broken = usable()
    if not here:
        return broken or "no TensorRT is installed: pip install 'mllm-edge[rtx]' on a PC, JetPack's own on a Jetson"
    reasons = []
    rank = {name: number for number, name in enumerate(here)}
    for engine in sorted(stage.engines, key=lambda engine: rank.get(engine.package, len(rank))):
        if reason := _misfit(engine, stage, capability, axes, here):
            reasons.append(reason)
        else:
            return engine
    return reasons[-1] if reasons else "it is not built yet"


def usable() -> tuple[dict[str, str], str]:
    """Versions of the packages that load, in order of preference, and the problem of one that does not."""
    versions, broken = {}, ""
    for package in PACKAGES:
        if package.installed:
            try:
                versions[package.name] = package.version
            except MllmEdgeError as error:
                broken = str(error)
    return versions, broken


def _misfit(
    engine: BuiltEngine, stage: StageEntry, capability: str, axes: Mapping[str, Sequence[int]], here: dict[str, str]
) -> str:
    """Why an engine cannot run here; "" if it can."""
    if capability not in engine.capabilities:
        return f"its engine is for {', '.join(engine.capabilities)}, this GPU is {capability}"
    if here.get(engine.package) != engine.version:
        installed = ", ".join(f"{name} {version}" for name, version in here.items())
        return f"its engine was built by {engine.package} {engine.version}, installed here is {installed}"
    if (engine.graph, engine.axes) != (graph_of(stage), axes_of(stage, axes)):
        return "its engine was built from another graph"
    return ""


def free_axes(stage: StageEntry) -> list[str]:
    """The named axes of a stage's inputs, whose lengths may vary."""
    return list(dict.fromkeys(size for spec in stage.inputs for size in spec.shape if isinstance(size, str)))


def axes_of(stage: StageEntry, axes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Least, usual and greatest length of a stage's own axes."""
    return {axis: list(axes[axis]) for axis in free_axes(stage)}


def package_named(name: str) -> Package:
    """The package that a manifest names. `find` only returns engines of known packages."""
    return next(package for package in PACKAGES if package.name == name)
