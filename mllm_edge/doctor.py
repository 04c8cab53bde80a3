"""What this machine has and lacks: for people who wonder why something does not run, or not fast."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_edge.errors import MissingPackage
from mllm_edge.machine import facts, jetson
from mllm_edge.machine.threads import usable_cores
from mllm_edge.runtime.engines.llama import probe
from mllm_edge.runtime.engines.llama.library import library
from mllm_edge.runtime.engines.tensorrt.packages import bindings, usable
from mllm_edge.version import __version__

if TYPE_CHECKING:
    from rich.table import Table

    from mllm_edge.machine.jetson import Jetson

EXTRAS = ("runtime", "export", "train", "eval")  # `cuda` and `bench` are advised where they would help
OPTIONAL = ("onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-bindings", "nvidia-ml-py", "mllm-edge")
FOLDER = "pip install '.[runtime]'"  # in a checkout
RTX_LINE = "pip install 'mllm-edge[rtx]'"
INSTEAD = {"onnxruntime": "onnxruntime-gpu"}
# What importing an engine whose libraries are missing or damaged raises.
BROKEN = (ImportError, OSError, RuntimeError)


@dataclass(frozen=True)
class Advice:
    """Something that is missing, and the line that installs it."""

    what: str
    run: str


@dataclass(frozen=True)
class Engines:
    """What the installed engines can do; None and empty where an engine is not installed or does not load."""

    onnxruntime_providers: list[str] = field(default_factory=list)
    llama_gpu_offload: bool | None = None
    llama_system_info: str = ""
    amx: str = ""


@dataclass(frozen=True)
class Findings:
    """All that `doctor` says. Memory and disk are in MB (10^6 bytes); the version of a missing package is None."""

    mllm_edge: str
    python: str
    system: str
    cpu: str
    cores: int
    features: list[str]
    memory: dict[str, float]
    disk_free: float
    gpus: list[facts.Gpu]
    jetson: Jetson | None
    packages: dict[str, str | None]
    engines: Engines
    advice: list[Advice]

    def to_json(self) -> dict[str, Any]:
        """The document that `mllm-edge doctor --json` prints."""
        return asdict(self)


def examine() -> Findings:
    """Look at the machine and at what is installed. Loads the engines, no model and no PyTorch."""
    wanted = extras()
    unknown = [] if any(wanted.values()) else [Advice("mllm-edge runs from a folder and is not installed", FOLDER)]
    packages = {name: facts.version(name) for names in wanted.values() for name in names}
    packages |= {name: found for name in OPTIONAL if (found := facts.version(name))}
    engines, broken = _engines()
    gpus, board = facts.gpus(), jetson.find(facts.ROOT)
    advice = [*unknown, *_missing(wanted), *broken, *_faster(engines, facts.capability(gpus, board), board)]
    return Findings(
        mllm_edge=__version__,
        python=f"{platform.python_version()} at {sys.executable}",
        system=platform.platform(),
        cpu=facts.cpu_name(),
        cores=usable_cores(),
        features=facts.features(),
        memory=facts.memory(),
        disk_free=round(shutil.disk_usage(Path.cwd()).free / 1e6),
        gpus=gpus,
        jetson=board,
        packages=dict(sorted(packages.items(), key=lambda item: item[0].lower())),
        engines=engines,
        advice=advice,
    )


def extras() -> dict[str, list[str]]:
    """The packages of each extra in `EXTRAS`, as the installed package's own metadata lists them."""
    found: dict[str, list[str]] = {extra: [] for extra in EXTRAS}
    try:
        required = importlib.metadata.requires("mllm-edge") or []
    except importlib.metadata.PackageNotFoundError:  # used from a source folder that was not installed
        return found
    for line in required:
        name, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if name and extra and extra[1] in found and name[0] != "mllm-edge":
            found[extra[1]].append(name[0])
    return found


def tables(findings: Findings) -> list[Table]:
    """For people."""
    from mllm_edge.tables import pairs, size, table

    engines = findings.engines
    memory = ", ".join(f"{name.replace('_', ' ')} {size(1e6 * value)}" for name, value in findings.memory.items())
    gpus = [
        f"{g.name}, {g.memory}, driver {g.driver}, compute capability {g.compute_capability}" for g in findings.gpus
    ]
    machine = {
        "mllm-edge": findings.mllm_edge,
        "Python": findings.python,
        "system": findings.system,
        "CPU": f"{findings.cpu}; {findings.cores} physical cores usable",
        "CPU features": " ".join(findings.features) or "none that the engines use",
        "memory": memory or "not told by this system",
        "free disk": size(1e6 * findings.disk_free),
        "GPU": "\n".join(gpus) or "none found",
        "Jetson": _board(findings.jetson, findings.memory) if findings.jetson else "no",
    }
    offload = {None: "not loaded: no bundle of GGUF runs", True: "can use a GPU", False: "CPU only"}
    running = {
        "ONNX Runtime": ", ".join(engines.onnxruntime_providers) or "not loaded: no bundle runs",
        "llama.cpp": "; ".join(filter(None, (offload[engines.llama_gpu_offload], engines.llama_system_info))),
        "AMX": engines.amx or "known when llama.cpp is there",
    }
    versions = {name: version or "not installed" for name, version in findings.packages.items()}
    advice = table("what to install", "what", "run")
    for item in findings.advice:
        advice.add_row(item.what, item.run)
    if not findings.advice:
        advice.add_row("nothing is missing", "")
    return [pairs("machine", machine), pairs("engines", running), pairs("packages", versions), advice]


def _missing(wanted: dict[str, list[str]]) -> list[Advice]:
    advice = []
    flags = (
        'CXXFLAGS="-fno-tree-dse -fno-dse" ' if (platform.system(), platform.machine()) == ("Linux", "x86_64") else ""
    )
    for extra, names in wanted.items():
        absent = [name for name in names if not facts.version(name) and not facts.version(INSTEAD.get(name, name))]
        if absent:
            compiles = flags if "llama-cpp-python" in absent else ""
            advice.append(Advice(f"{extra} needs {', '.join(absent)}", f"{compiles}pip install 'mllm-edge[{extra}]'"))
        if "llama-cpp-python" in absent and not shutil.which("c++"):
            advice.append(Advice("llama.cpp is compiled, and there is no C++ compiler", "apt install g++"))
    if facts.version("onnxruntime") and facts.version("onnxruntime-gpu"):
        line = "pip uninstall -y onnxruntime onnxruntime-gpu; pip install --no-cache-dir onnxruntime-gpu"
        advice.append(Advice("onnxruntime and onnxruntime-gpu overwrite each other", line))
    return advice


def _engines() -> tuple[Engines, list[Advice]]:
    """Load both engines and ask them; one that is installed and does not load becomes an advice."""
    broken: list[Advice] = []
    providers: list[str] = []
    offload, info = None, ""
    if package := next((name for name in ("onnxruntime", "onnxruntime-gpu") if facts.version(name)), None):
        try:
            providers = list(importlib.import_module("onnxruntime").get_available_providers())
        except BROKEN as error:
            broken.append(Advice(_does_not_load(package, error), f"pip install --force-reinstall {package}"))
    try:
        llama = library()
        offload, info = bool(llama.llama_supports_gpu_offload()), llama.llama_print_system_info().decode().strip()
    except MissingPackage:
        pass  # said already
    except BROKEN as error:
        broken.append(Advice(_does_not_load("llama-cpp-python", error), probe.REBUILD))
    return Engines(providers, offload, info, _amx() if offload is not None else ""), broken


def _does_not_load(package: str, error: Exception) -> str:
    return f"{package} is installed but does not load ({' '.join(str(error).split())})"


def _amx() -> str:
    verdict = probe.verdict()
    if not verdict.amx:
        return "this CPU has none"
    tried = [f"{'crashes' if crashed else 'works'} on {name}" for name, crashed in verdict.crashed.items()]
    return ", ".join(tried) or "not tried yet; the first load of a quantized model does"


def build_line(gpu: str) -> str:
    """The line that builds llama.cpp with CUDA for a GPU, "sm_87"."""
    _, _, plain = probe.REBUILD.partition('" ')  # its flags are for x86
    install = probe.REBUILD if platform.machine() == "x86_64" else plain
    compiler = "" if shutil.which("nvcc") else "CUDACXX=/usr/local/cuda/bin/nvcc "
    return f'{compiler}CMAKE_ARGS="-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES={gpu.removeprefix("sm_")}" {install}'


def _faster(engines: Engines, gpu: str, board: Jetson | None) -> list[Advice]:
    advice = []
    has_gpu = bool(gpu)
    if any(probe.verdict().crashed.values()):
        advice.append(Advice("llama.cpp's AMX code crashes, so it runs without", probe.REBUILD))
    # For a board the package index has no onnxruntime-gpu; its stages run by TensorRT.
    without = engines.onnxruntime_providers and "CUDAExecutionProvider" not in engines.onnxruntime_providers
    if has_gpu and not board and without:
        line = "pip uninstall -y onnxruntime; pip install onnxruntime-gpu"
        advice.append(Advice("there is a GPU, but ONNX Runtime was built without CUDA", line))
    if has_gpu and engines.llama_gpu_offload is False:
        advice.append(Advice("there is a GPU, but llama.cpp was built without CUDA", build_line(gpu)))
    if has_gpu:
        advice += _for_engines(board)
    return advice


def _for_engines(board: Jetson | None) -> list[Advice]:
    """What target trt lacks on a machine with a GPU."""
    versions, broken = usable()
    advice = []
    if not versions:
        line = "apt install python3-libnvinfer; use a venv with --system-site-packages" if board else RTX_LINE
        advice.append(Advice(broken or "there is a GPU, but no TensorRT for target trt", line))
    if not facts.version("cuda-bindings"):
        advice.append(Advice("target trt needs cuda-bindings", f"pip install '{bindings()}'"))
    return advice


def _board(board: Jetson, memory: dict[str, float]) -> str:
    """A Jetson for people; its CPU and GPU share one memory."""
    from mllm_edge.tables import size

    told = [board.model, f"L4T {board.l4t or 'unknown'}", f"JetPack {board.jetpack or 'unknown'}"]
    told.append(f"power mode {board.power_mode or 'unknown'}")
    if "available" in memory:
        told.append(f"{size(1e6 * memory['available'])} free for CPU and GPU together")
    return ", ".join(told)
