"""`doctor`, on made-up machines."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from mllm_edge import cli, doctor
from mllm_edge.runtime import probe

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
        ("DEVICE_TREE", "model"),
        ("TEGRA_RELEASE", "l4t"),
    ]:
        monkeypatch.setattr(doctor, name, tmp_path / file)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def lacks(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda package: None if package in names else real(package))


def test_machine(machine: Path) -> None:
    found = doctor.examine()
    assert found.cpu == "Imaginary CPU 9000"
    assert found.features == ["avx2", "f16c", "avx512f", "amx_tile"]
    assert found.memory == {"total": 16384, "available": 8192, "swap": 2048, "free_swap": 1024}
    assert found.gpus == []
    assert found.jetson == ""
    assert found.cores >= 1


def test_jetson_is_an_arm_machine_with_a_release(machine: Path) -> None:
    (machine / "cpuinfo").write_text("processor : 0\nFeatures : fp asimd aes asimddp\nModel : a board\n")
    (machine / "model").write_bytes(b"NVIDIA Jetson Orin Nano\0")
    (machine / "l4t").write_text("# R36 (release), REVISION: 4.0\n# more\n")
    found = doctor.examine()
    assert found.features == ["asimd", "asimddp"]
    assert found.jetson == "NVIDIA Jetson Orin Nano, R36 (release), REVISION: 4.0"


def nvidia_smi(machine: Path, script: str) -> None:
    program = machine / "bin" / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_a_gpu_that_engines_cannot_use_brings_advice(machine: Path) -> None:
    nvidia_smi(machine, "echo 'Imaginary RTX, 8192 MiB, 590.1, 8.9'")
    found = doctor.examine()
    assert found.gpus == [doctor.Gpu("Imaginary RTX", "8192 MiB", "590.1", "8.9")]
    lines = [advice.run for advice in found.advice]
    can_offload, providers = found.engines.llama_gpu_offload, found.engines.onnxruntime_providers
    assert any("GGML_CUDA" in line for line in lines) == (not can_offload)
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
