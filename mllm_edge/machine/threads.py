"""How many threads a stage should use: the physical cores that this process may run on."""

from __future__ import annotations

import math
import os
from pathlib import Path

_SYSTEM = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Physical cores, within the process's CPU affinity and its container's CPU quota; at least 1.

    Matrix products saturate a core's vector units, so a core's second hardware thread gains nothing.
    """
    cores = len(_physical_cores(_allowed_cpus()))
    quota = _cgroup_quota()
    return max(1, min(cores, math.ceil(quota)) if quota else cores)


def most_threads() -> int:
    """Threads that may be asked for: more than cores, for those who measure, but not so many that the machine hangs."""
    return max(16, 4 * (os.cpu_count() or 1))


def _allowed_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _physical_cores(cpus: list[int]) -> set[str]:
    """One name per core: the list of hardware threads that share it, or the CPU's number if unknown."""
    names = (_read(_SYSTEM / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu) for cpu in cpus)
    return set(names)


def _cgroup_quota() -> float | None:
    """CPU quota of the container, in CPUs, from cgroup v2 or v1; None without a limit."""
    limit = _read(_CGROUP / "cpu.max").split()  # v2: "max 100000" or "150000 100000"
    if not limit:
        v1 = _CGROUP / "cpu"
        limit = [_read(v1 / "cpu.cfs_quota_us"), _read(v1 / "cpu.cfs_period_us")]
    if len(limit) != 2 or not all(value.isdecimal() for value in limit) or int(limit[1]) == 0:
        return None
    return int(limit[0]) / int(limit[1])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
