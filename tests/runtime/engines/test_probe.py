import json
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from mllm_edge.machine import facts
from mllm_edge.runtime.engines.llama import probe

AMX = "flags\t\t: fpu sse2 avx512f amx_bf16 amx_tile amx_int8\n"
MODEL = Path("model.gguf")


class Child:
    """Stands for the probing process: counts its runs."""

    def __init__(self, code: str):
        self.code, self.runs = code, 0

    def __call__(self, path: Path) -> list[str]:
        self.runs += 1
        return [sys.executable, "-c", self.code]


def dies(number: int) -> Child:
    return Child(f"import os, signal; os.kill(os.getpid(), {number})")


@pytest.fixture
def amx_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{AMX}\n")
    monkeypatch.setattr(facts, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_a_crash_is_survived_remembered_and_told(amx_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = dies(signal.SIGSEGV)
    monkeypatch.setattr(probe, "command", child)
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="-fno-tree-dse -fno-dse"):
            assert probe.use_extra_buffers(MODEL, "q8_0") is False
    assert child.runs == 1
    assert probe.verdict() == probe.Verdict(True, {"q8_0": True})


def test_a_sound_build_keeps_its_speed(amx_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child("pass")
    monkeypatch.setattr(probe, "command", child)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert probe.use_extra_buffers(MODEL, "q4_k_m") and probe.use_extra_buffers(MODEL, "q4_k_m")
        assert probe.use_extra_buffers(MODEL, "q8_0")
    assert child.runs == 2  # once per precision
    assert probe.verdict().crashed == {"q4_k_m": False, "q8_0": False}


@pytest.mark.parametrize("child", [dies(signal.SIGKILL), Child("raise SystemExit(1)")])
def test_other_failures_are_careful_and_not_remembered(
    amx_machine: Path, monkeypatch: pytest.MonkeyPatch, child: Child
) -> None:
    monkeypatch.setattr(probe, "command", child)
    with pytest.warns(RuntimeWarning, match="could not be tried"):
        assert probe.use_extra_buffers(MODEL, "q8_0") is False
    assert probe.verdict() == probe.Verdict(True, {})


def test_another_build_is_probed_again(amx_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "command", dies(signal.SIGSEGV))
    with pytest.warns(RuntimeWarning):
        probe.use_extra_buffers(MODEL, "q8_0")
    monkeypatch.setattr(probe, "command", Child("pass"))
    lib = amx_machine / "rebuilt"
    lib.mkdir()
    (lib / "libggml-cpu.so").write_bytes(b"new")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(lib))
    assert probe.use_extra_buffers(MODEL, "q8_0")


@pytest.mark.parametrize("precision", ["f32", "f16", "F16"])
def test_plain_models_are_not_probed(amx_machine: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(probe, "command", dies(signal.SIGSEGV))
    assert probe.use_extra_buffers(MODEL, precision)


@pytest.mark.parametrize(("machine", "flags"), [("aarch64", AMX), ("x86_64", "flags\t: fpu avx2\n")])
def test_other_cpus_are_not_probed(
    amx_machine: Path, monkeypatch: pytest.MonkeyPatch, machine: str, flags: str
) -> None:
    (amx_machine / "cpuinfo").write_text(flags)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(probe, "command", dies(signal.SIGSEGV))
    assert probe.use_extra_buffers(MODEL, "q8_0")
    assert probe.verdict() == probe.Verdict(False, {})


@pytest.mark.parametrize(("machine", "repacked"), [("x86_64", False), ("aarch64", True)])
def test_k_quants_stay_as_they_are_on_x86_without_amx(
    amx_machine: Path, monkeypatch: pytest.MonkeyPatch, machine: str, repacked: bool
) -> None:
    (amx_machine / "cpuinfo").write_text("flags\t: fpu avx2\n")
    monkeypatch.setattr("platform.machine", lambda: machine)
    for precision in ("q4_k_m", "q5_k_m", "q6_k"):
        assert probe.use_extra_buffers(MODEL, precision) is repacked


@pytest.mark.parametrize("content", ["not json", "[1]", json.dumps({"x": "y"})])
def test_a_damaged_cache_is_ignored(amx_machine: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    (amx_machine / "cache" / "mllm-edge").mkdir(parents=True)
    (amx_machine / "cache" / "mllm-edge" / "amx.json").write_text(content)
    monkeypatch.setattr(probe, "command", Child("pass"))
    assert probe.use_extra_buffers(MODEL, "q8_0")


def test_the_real_child_decodes(tiny_bundle: Path) -> None:
    for name, code in (("language_model.gguf", 0), ("missing.gguf", 1)):
        done = subprocess.run(probe.command(tiny_bundle / name), capture_output=True, timeout=60, check=False)
        assert done.returncode == code, done.stderr
