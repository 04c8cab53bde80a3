import os
from pathlib import Path

import pytest

from mllm_edge.machine import threads


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four CPUs on two cores, no container limit."""
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        folder = tmp_path / "cpus" / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    (tmp_path / "cgroup").mkdir()
    monkeypatch.setattr(threads, "_SYSTEM", tmp_path / "cpus")
    monkeypatch.setattr(threads, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    return tmp_path / "cgroup"


def test_hardware_threads_of_a_core_count_once(machine: Path) -> None:
    assert threads.usable_cores() == 2


def test_affinity_is_obeyed(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    assert threads.usable_cores() == 1


def test_without_topology_every_cpu_is_a_core(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_SYSTEM", machine / "nowhere")
    assert threads.usable_cores() == 4


@pytest.mark.parametrize(
    ("limit", "cores"), [("max 100000", 2), ("100000 100000", 1), ("150000 100000", 2), ("1000 100000", 1)]
)
def test_cgroup_v2_quota(machine: Path, limit: str, cores: int) -> None:
    (machine / "cpu.max").write_text(limit)
    assert threads.usable_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 2), ("100000", 1)])
def test_cgroup_v1_quota(machine: Path, quota: str, cores: int) -> None:
    (machine / "cpu").mkdir()
    (machine / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (machine / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert threads.usable_cores() == cores
