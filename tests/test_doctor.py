"""`doctor`, on made-up machines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from mllm_edge import cli, doctor
from mllm_edge.machine import facts, jetson
from mllm_edge.runtime.engines.llama import probe

X86 = """processor\t: 0
model name\t: Imaginary CPU 9000
flags\t\t: fpu sse2 avx2 f16c avx512f amx_tile rdtscp
"""
MEMORY = """MemTotal:       16000000 kB
MemAvailable:    8000000 kB
SwapTotal:       2000000 kB
SwapFree:        1000000 kB
HugePages_Total:       0
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose files stand for the system's: an x86 CPU, 16 GB, no GPU."""
    (tmp_path / "cpuinfo").write_text(X86)
    (tmp_path / "meminfo").write_text(MEMORY)
    (tmp_path / "bin").mkdir()
    for name, file in [
        ("CPUINFO", "cpuinfo"),
        ("MEMINFO", "meminfo"),
        ("ROOT", ""),
    ]:
        monkeypatch.setattr(facts, name, tmp_path / file)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def lacks(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    real = facts.version
    monkeypatch.setattr(facts, "version", lambda package: None if package in names else real(package))


def test_machine(machine: Path) -> None:
    found = doctor.examine()
    assert found.cpu == "Imaginary CPU 9000"
    assert found.features == ["avx2", "f16c", "avx512f", "amx_tile"]
    assert found.memory == {"total": 16384, "available": 8192, "swap": 2048, "free_swap": 1024}
    assert found.gpus == []
    assert found.jetson is None
    assert found.cores >= 1


def test_jetson_is_an_arm_machine_with_a_release(machine: Path) -> None:
    (machine / "cpuinfo").write_text("processor : 0\nFeatures : fp asimd aes asimddp\nModel : a board\n")
    write_board(machine, ORIN_NANO)
    found = doctor.examine()
    assert found.features == ["asimd", "asimddp"]
    assert found.jetson is not None and found.jetson.jetpack == "6.2"
    shown = "".join(str(cell) for table in doctor.tables(found) for column in table.columns for cell in column.cells)
    assert re.search(r"power mode MAXN_SUPER \(2\), [\d.]+ .B free for CPU and GPU together", shown)
    offload = [advice.run for advice in found.advice if "GGML_CUDA" in advice.run]
    assert all("-DCMAKE_CUDA_ARCHITECTURES=87" in line for line in offload)
    assert bool(offload) == (not found.engines.llama_gpu_offload)


# The files of boards, in the form that L4T writes them.
ORIN_NANO = {
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, "
    "DATE: Wed Jan  8 01:49:37 UTC 2025\n# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n",
    "var/lib/nvpmodel/status": "pmode:0002\n",
    "etc/nvpmodel.conf": "< PARAM TYPE=FILE NAME=CPU_ONLINE >\nCORE_0 /sys/devices/system/cpu/cpu0/online\n"
    "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=1 NAME=25W >\n"
    "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n< PM_CONFIG DEFAULT=1 >\n",
    "var/lib/dpkg/status": "Package: nvidia-container\nStatus: install ok installed\nVersion: 6.1+b1\n\n"
    "Package: nvidia-jetpack\nStatus: install ok installed\nPriority: standard\nVersion: 6.2+b77\n",
}
AGX_ORIN = {
    "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0",
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic, EABI: aarch64\n",
    "var/lib/nvpmodel/status": "pmode:0000\n",
}
THOR = {
    "proc/device-tree/compatible": "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0",
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64\n",
}


def write_board(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "l4t", "jetpack", "mode", "capability"),
    [
        (ORIN_NANO, "36.4.3", "6.2", "MAXN_SUPER (2)", "sm_87"),
        (AGX_ORIN, "36.4.0", "6.1", "0", "sm_87"),
        (THOR, "38.2.0", "7.0", "", "sm_110"),
    ],
    ids=["Orin Nano", "AGX Orin", "Thor"],
)
def test_boards(files: dict[str, str], l4t: str, jetpack: str, mode: str, capability: str, tmp_path: Path) -> None:
    write_board(tmp_path, files)
    board = jetson.find(tmp_path)
    assert board == jetson.Jetson(files["proc/device-tree/model"].strip("\0"), l4t, jetpack, mode, capability)


def test_other_boards_are_no_jetson(tmp_path: Path) -> None:
    write_board(tmp_path, {"proc/device-tree/model": "Raspberry Pi 5 Model B\0"})
    assert jetson.find(tmp_path) is None


def nvidia_smi(machine: Path, script: str) -> None:
    program = machine / "bin" / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_a_gpu_that_engines_cannot_use_brings_advice(machine: Path) -> None:
    nvidia_smi(machine, "echo 'Imaginary RTX, 8192 MiB, 590.1, 8.9'")
    found = doctor.examine()
    assert found.gpus == [facts.Gpu("Imaginary RTX", "8192 MiB", "590.1", "8.9")]
    assert facts.gpu_name() == "Imaginary RTX"
    lines = [advice.run for advice in found.advice]
    can_offload, providers = found.engines.llama_gpu_offload, found.engines.onnxruntime_providers
    assert any("CUDA_ARCHITECTURES=89" in line for line in lines) == (not can_offload)
    assert any(line.endswith("onnxruntime-gpu") for line in lines) == ("CUDAExecutionProvider" not in providers)


def test_a_driver_that_fails_is_no_gpu(machine: Path) -> None:
    nvidia_smi(machine, "echo broken; exit 9")
    assert doctor.examine().gpus == []


def test_extras_are_those_of_the_package() -> None:
    extras = doctor.extras()
    assert {"onnxruntime", "llama-cpp-python"} <= set(extras["runtime"])
    assert {"torch", "transformers", "onnx", "gguf"} <= set(extras["export"])
    assert "peft" in extras["train"]
    assert "mllm-edge" not in extras["export"]


def test_missing_packages_come_with_their_lines(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacks(monkeypatch, "torch", "llama-cpp-python")
    advice = {item.what: item.run for item in doctor.examine().advice}
    assert advice["runtime needs llama-cpp-python"].endswith("pip install 'mllm-edge[runtime]'")
    assert advice["export needs torch"] == "pip install 'mllm-edge[export]'"
    assert advice["train needs torch"] == "pip install 'mllm-edge[train]'"
    assert advice["llama.cpp is compiled, and there is no C++ compiler"] == "apt install g++"


def test_nothing_is_advised_where_all_is_there(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "has_amx", lambda: False)
    found = doctor.examine()
    assert found.advice == []
    assert found.engines.llama_gpu_offload is not None
    assert "CPUExecutionProvider" in found.engines.onnxruntime_providers
    assert found.engines.amx == "this CPU has none"


def test_amx_that_crashes_is_told_with_the_cure(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "verdict", lambda: probe.Verdict(True, {"q8_0": True, "q4_k_m": False}))
    found = doctor.examine()
    assert found.engines.amx == "crashes on q8_0, works on q4_k_m"
    assert [advice.run for advice in found.advice] == [probe.REBUILD]


def test_an_engine_that_does_not_load_is_told(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged() -> SimpleNamespace:
        raise RuntimeError("libllama.so:\n  no such file")

    monkeypatch.setattr(doctor, "library", damaged)
    found = doctor.examine()
    assert found.engines.llama_gpu_offload is None
    assert found.advice[0].what == "llama-cpp-python is installed but does not load (libllama.so: no such file)"
    assert found.advice[0].run == probe.REBUILD
    assert "-fno-tree-dse -fno-dse" in probe.REBUILD


def test_command_prints_tables_or_one_document(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "Imaginary CPU 9000" in shown
    assert "16.38 GB" in shown
    assert cli.main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["cpu"] == "Imaginary CPU 9000"
    assert document["packages"]["numpy" if "numpy" in document["packages"] else "torch"]
