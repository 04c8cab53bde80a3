"""Power while a bundle runs: a Jetson's INA sensors or NVIDIA's driver (NVML), sampled in a thread."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INA3221, INA238 = "sys/bus/i2c/drivers/ina3221", "sys/bus/i2c/drivers/ina238"
# Rails of an INA3221 that feed a whole module, alone or summed: Orin Nano and NX; AGX Orin.
WHOLE = (("VDD_IN",), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"))
SECONDS = 0.05  # between readings


@dataclass(frozen=True)
class Sensor:
    """A power sensor: what it measures, and a function that reads watts."""

    name: str
    watts: Callable[[], float]


def sensor(root: Path = Path("/"), gpu: bool = True) -> Sensor | None:
    """The best sensor of this machine: a module's input, the sum of its rails, or the GPU's own; None without any.

    Args:
        root: root of the system's files.
        gpu: whether the bundle uses a GPU.
    """
    return _ina238(root) or _ina3221(root) or (_nvml() if gpu else None)


class Meter:
    """Integrates a sensor's watts in a thread; a context manager around the work.

    Attributes:
        joules: used since the start; NaN if the sensor failed meanwhile.
    """

    def __init__(self, sensor: Sensor):
        self.joules = 0.0
        self._sensor = sensor
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._measure, name="power", daemon=True)

    def _measure(self) -> None:
        try:
            self._integrate()
        except (OSError, ValueError):  # raised by hwmon's files on a bus error
            self.joules = float("nan")

    def _integrate(self) -> None:
        before, watts = time.perf_counter(), self._sensor.watts()
        while True:
            stopped = self._stop.wait(SECONDS)
            now, reading = time.perf_counter(), self._sensor.watts()
            self.joules += (now - before) * (watts + reading) / 2
            before, watts = now, reading
            if stopped:
                return

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _ina238(root: Path) -> Sensor | None:
    """The input of Thor's module, in microwatts."""
    file = next(iter(sorted((root / INA238).glob("*/hwmon/hwmon*/power1_input"))), None)
    return Sensor("VIN", lambda: int(file.read_text(encoding="ascii")) / 1e6) if file else None


def _ina3221(root: Path) -> Sensor | None:
    """Power from millivolts and milliamperes of each labelled channel, as in hwmon."""
    rails: dict[str, tuple[Path, Path]] = {}
    for label in sorted((root / INA3221).glob("*/hwmon/hwmon*/in*_label")):
        channel = label.name.removeprefix("in").removesuffix("_label")
        volts, amperes = label.with_name(f"in{channel}_input"), label.with_name(f"curr{channel}_input")
        if volts.is_file() and amperes.is_file():
            rails[label.read_text(encoding="ascii").strip()] = volts, amperes
    # If no rails are known to feed everything: all connected ones that are not sums of others.
    unknown = [name for name in rails if "sum" not in name.lower() and name != "NC"]
    chosen = next((list(names) for names in WHOLE if rails.keys() >= set(names)), unknown)
    if not chosen:
        return None
    return Sensor(" + ".join(chosen), lambda: sum(_watts(*rails[name]) for name in chosen))


def _watts(volts: Path, amperes: Path) -> float:
    return int(volts.read_text(encoding="ascii")) * int(amperes.read_text(encoding="ascii")) / 1e6


def _nvml() -> Sensor | None:
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        nvml.nvmlDeviceGetPowerUsage(handle)
    except Exception:  # noqa: BLE001  no package, no driver, no sensor: NVML creates its errors at run time
        return None
    return Sensor("GPU (NVML)", lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000)
