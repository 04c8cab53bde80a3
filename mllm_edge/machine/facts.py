"""What this computer is: CPU, GPU, memory, installed packages, and where our cache lies."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_edge.machine import jetson

if TYPE_CHECKING:
    from mllm_edge.machine.jetson import Jetson

ROOT = Path("/")
CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")

# CPU flags that decide how fast the engines are: x86, then ARM
FEATURES = (
    *("avx2", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve"),
)


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as its driver describes it."""

    name: str
    memory: str
    driver: str
    compute_capability: str


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's model."""
    text = jetson.read(CPUINFO)
    named = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def gpu_capability() -> str:
    """The compute capability of this machine's GPU, "sm_89"; "" where there is none."""
    return capability(gpus(), jetson.find(ROOT))


def gpu_name() -> str:
    """The board or the NVIDIA GPU of this machine; "" where there is none."""
    board = jetson.find(ROOT)
    return board.model if board else next((gpu.name for gpu in gpus()), "")


def features() -> list[str]:
    """The CPU flags among `FEATURES` that this processor has."""
    listed = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", jetson.read(CPUINFO), re.MULTILINE)
    flags = set(listed[1].split()) if listed else set()
    return [feature for feature in FEATURES if feature in flags]


def capability(gpus: list[Gpu], board: Jetson | None) -> str:
    """The compute capability of this machine's GPU, "sm_89"; "" where there is none."""
    if board and board.capability:
        return board.capability
    return f"sm_{gpus[0].compute_capability.replace('.', '')}" if gpus else ""


def memory() -> dict[str, float]:
    """RAM and swap in MB, where the system says so (Linux)."""
    names = {"total": "MemTotal", "available": "MemAvailable", "swap": "SwapTotal", "free_swap": "SwapFree"}
    found = _meminfo()
    return {name: round(found[key] / 1e6) for name, key in names.items() if key in found}


def _meminfo() -> dict[str, int]:
    """The system's own table of memory, in bytes; empty where there is none."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", jetson.read(MEMINFO), re.MULTILINE)
    return {name: 1024 * int(size) for name, size in found}


def gpus() -> list[Gpu]:
    """NVIDIA's GPUs, as nvidia-smi lists them; none where it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []  # a driver that does not answer has no usable GPU
    lines = [[cell.strip() for cell in line.split(",")] for line in listing.splitlines()]
    return [Gpu(*cells) for cells in lines if len(cells) == 4]


def available_memory() -> int | None:
    """Bytes that the system can give without swapping; None where it does not say (not Linux)."""
    return _meminfo().get("MemAvailable")


def resident_memory() -> int | None:
    """Bytes of memory that this process holds now; None where the system does not say."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        import resource

        return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    if sys.platform == "darwin":
        import resource

        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return None


def peak_rss() -> float | None:
    """Highest resident memory of this process so far in MB; None where the system does not say."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, whose getrusage also counts what the parent had when it forked
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="ascii", errors="replace").splitlines())
        if "VmHWM" in fields:
            return round(int(fields["VmHWM"].split()[0]) * 1024 / 1e6, 1)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def busy_cores(seconds: float = 0.2) -> float | None:
    """Cores that other processes keep busy while this thread sleeps; None where the system does not say."""
    try:
        before = _busy_ticks()
        time.sleep(seconds)
        return (_busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds
    except (OSError, ValueError, IndexError):
        return None


def _busy_ticks() -> int:
    first, *_ = Path("/proc/stat").read_text(encoding="utf-8").splitlines()
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first.split()[1:9])  # proc(5)
    return user + nice + system + irq + softirq + steal


def cache_folder() -> Path:
    """Where mllm-edge keeps what can be made again: `$XDG_CACHE_HOME/mllm-edge`, by default `~/.cache/mllm-edge`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllm-edge"
