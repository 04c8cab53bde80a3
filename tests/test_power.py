"""Power by a board's sensors, from files as hwmon has them."""

from __future__ import annotations

import math
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from mllm_edge.bench import power

HWMON = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"


def write(root: Path, rails: dict[str, tuple[int, int]]) -> None:
    folder = root / HWMON
    folder.mkdir(parents=True)
    for channel, (label, (millivolts, milliamperes)) in enumerate(rails.items(), 1):
        (folder / f"in{channel}_label").write_text(f"{label}\n")
        (folder / f"in{channel}_input").write_text(f"{millivolts}\n")
        (folder / f"curr{channel}_input").write_text(f"{milliamperes}\n")


def test_the_rail_of_the_whole_board(tmp_path: Path) -> None:
    write(tmp_path, {"VDD_IN": (5000, 1500), "VDD_CPU_GPU_CV": (5000, 400), "VDD_SOC": (5000, 300)})
    found = power.sensor(tmp_path)
    assert found is not None
    assert (found.name, found.watts()) == ("VDD_IN", 7.5)


def test_rails_are_summed_where_none_is_the_whole_boards(tmp_path: Path) -> None:
    rails = {"VDD_GPU_SOC": (19000, 500), "VDD_CPU_CV": (19000, 200), "VIN_SYS_5V0": (5000, 1000)}
    write(tmp_path, {**rails, "VDDQ_VDD2_1V8AO": (5000, 300)})  # the one before it feeds the last
    found = power.sensor(tmp_path)
    assert found is not None
    assert (found.name, found.watts()) == ("VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0", pytest.approx(18.3))


def test_rails_that_nobody_knows_are_summed(tmp_path: Path) -> None:
    write(tmp_path, {"A": (1000, 500), "NC": (1000, 9), "B": (2000, 200), "sum of shunt voltages": (1, 1)})
    found = power.sensor(tmp_path)
    assert found is not None and (found.name, found.watts()) == ("A + B", pytest.approx(0.9))


def test_the_input_of_thors_module(tmp_path: Path) -> None:
    folder = tmp_path / "sys/bus/i2c/drivers/ina238/2-0044/hwmon/hwmon3"
    folder.mkdir(parents=True)
    (folder / "power1_input").write_text("31250000\n")
    found = power.sensor(tmp_path)
    assert found is not None and (found.name, found.watts()) == ("VIN", 31.25)


def test_a_sensor_that_fails_gives_no_number() -> None:
    def watts() -> float:
        raise OSError("Remote I/O error")

    with power.Meter(power.Sensor("a rail", watts)) as meter:
        pass
    assert math.isnan(meter.joules)


def test_a_gpu_tells_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml: Any = types.ModuleType("pynvml")
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByIndex = lambda index: index
    nvml.nvmlDeviceGetPowerUsage = lambda handle: 61_500
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    found = power.sensor(tmp_path)
    assert found is not None and (found.name, found.watts()) == ("GPU (NVML)", 61.5)
    assert power.sensor(tmp_path, gpu=False) is None


def test_no_sensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert power.sensor(tmp_path) is None


@pytest.mark.alone
def test_joules_are_the_integral_of_watts() -> None:
    started = time.perf_counter()
    ramp = power.Sensor("ramp", lambda: 100 * (time.perf_counter() - started))
    with power.Meter(ramp) as meter:
        time.sleep(0.3)
    seconds = time.perf_counter() - started
    assert meter.joules == pytest.approx(50 * seconds**2, rel=0.05)


def test_work_shorter_than_a_reading_counts_too() -> None:
    with power.Meter(power.Sensor("ten", lambda: 10.0)) as meter:
        time.sleep(0.01)
    assert 0.05 < meter.joules < 5
