"""Machines that people plan for: what they have at 100 % of their data sheets, and what engines reach of it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from mllm_edge.errors import BadInput

THIS = "this"


@dataclass(frozen=True)
class Device:
    """A machine's memory (10^9 bytes), its rates, and the part of them that our engines are expected to reach.

    `reserved_gb` is what the operating system and the GPU's libraries take. `tflops` is dense fp16 on a GPU and fp32 on
    a CPU. `reach` has a share for stages, `prefill` and `decode`.
    """

    name: str
    title: str
    memory_gb: float
    reserved_gb: float
    memory_gb_per_s: float
    tflops: float
    reach: dict[str, float]


# llama.cpp reads 39 to 41 % of a Jetson's bandwidth, a ViT-B/16 in TensorRT takes 33 % of its products (docs/plan.md
# names the sources); the prefill's share is assumed to be the stages'.
_GPU = {"stage": 0.33, "prefill": 0.33, "decode": 0.40}
# As `mllm-edge bench` measured CPUs (docs/benchmarks.md).
CPU = {"stage": 0.60, "prefill": 0.50, "decode": 0.70}

# Bandwidths from data sheets; fp16 = sparse INT8 TOPS / 4, the GPU's part alone, +- 10 %.
DEVICES = {
    device.name: device
    for device in (
        Device("orin-nano", "Jetson Orin Nano 8GB", 8, 2.2, 68, 10, _GPU),
        Device("orin-nano-super", "Jetson Orin Nano 8GB, Super mode", 8, 2.2, 102, 17, _GPU),
        Device("agx-orin", "Jetson AGX Orin 64GB", 64, 2.2, 204.8, 42.5, _GPU),
        Device("thor", "Jetson AGX Thor T5000", 128, 2.2, 273, 259, _GPU),
        Device("rtx-4060-laptop", "GeForce RTX 4060 Laptop", 8, 1.0, 256, 45, _GPU),
    )
}


def get(name: str) -> Device:
    """The device called `name`; "this" is this machine's CPU, measured now.

    Raises:
        BadInput: an unknown name; it names the nearest ones.
    """
    if name == THIS:
        return _this()
    if name in DEVICES:
        return DEVICES[name]
    near = difflib.get_close_matches(name, [THIS, *DEVICES], n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"use {THIS}, {', '.join(DEVICES)}"
    raise BadInput(f"there is no device {name!r}; {hint}")


def _this() -> Device:
    from mllm_edge.bench.limits import measure_limits
    from mllm_edge.machine.facts import cpu_name, memory

    limits, found = measure_limits(), memory()
    total, free = found.get("total", 0) / 1000, found.get("available", 0) / 1000
    return Device(THIS, cpu_name(), total, round(total - free, 3), limits.memory_gb_per_s, limits.matmul_tflops, CPU)
