"""Power while a bundle works: a Jetson's INA sensors or NVIDIA's driver (NVML), read beside the work."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INA = "sys/bus/i2c/drivers/ina3221"
WHOLE = ("VDD_IN", "VIN_SYS_5V0", "VIN")  # rails that feed the whole board
SECONDS = 0.05  # between two readings


@dataclass(frozen=True)
class Sensor:
    """Something that tells watts: what it measures, and how it is read."""

    name: str
    watts: Callable[[], float]


def sensor(root: Path = Path("/")) -> Sensor | None:
    """The best sensor of this machine: a rail that feeds the whole board, the sum of a board's rails, or the GPU's own;
    None where there is none.

    Args:
        root: where the system's files are.
    """
    return _ina(root) or _nvml()


class Meter:
    """Integrates a sensor's watts in a thread; a context manager around the work.

    Attributes:
        joules: taken since the work began.
    """

    def __init__(self, sensor: Sensor):
        self.joules = 0.0
        self._sensor = sensor
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._measure, name="power", daemon=True)

    def _measure(self) -> None:
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


def _ina(root: Path) -> Sensor | None:
    """Millivolts and milliamperes of each labelled channel, as hwmon has them."""
    rails: dict[str, tuple[Path, Path]] = {}
    for label in sorted((root / INA).glob("*/hwmon/hwmon*/in*_label")):
        channel = label.name.removeprefix("in").removesuffix("_label")
        volts, amperes = label.with_name(f"in{channel}_input"), label.with_name(f"curr{channel}_input")
        if volts.is_file() and amperes.is_file():
            rails[label.read_text(encoding="ascii").strip()] = volts, amperes
    whole = next((name for name in WHOLE if name in rails), None)
    # Without a rail for all, those that are no sum of others.
    chosen = [whole] if whole else [name for name in rails if "sum" not in name.lower()]
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
    except Exception:  # noqa: BLE001  no package, no driver, a GPU without a sensor: its errors are made at run time
        return None
    return Sensor("GPU (NVML)", lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000)
