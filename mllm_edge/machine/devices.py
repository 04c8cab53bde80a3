"""The machines that people plan, export and build for, by name: what their data sheets say, and what engines reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mllm_edge.errors import no_such

THIS = "this"


@dataclass(frozen=True)
class Device:
    """A machine's memory (10^9 bytes), its rates, and the part of them that our engines are expected to reach.

    Attributes:
        reserved_gb: what the operating system and the GPU's libraries take.
        memory_gb_per_s: 10^9 bytes a second.
        tflops: dense fp16 on a GPU, fp32 on a CPU.
        reach: the share for `stage`, `prefill` and `decode`.
        capability: of its GPU, "sm_87"; "" for a CPU.
        aliases: other names.
        board: it builds its own TensorRT engines; for the others TensorRT-RTX builds ahead.
        scratch_mb: how much memory a kernel may take while a board builds; 0 is TensorRT's own choice, all that is
            free, which on a small board would have the system kill the build.
    """

    name: str
    title: str
    memory_gb: float
    reserved_gb: float
    memory_gb_per_s: float
    tflops: float
    reach: dict[str, float]
    capability: str = ""
    aliases: tuple[str, ...] = ()
    board: bool = False
    scratch_mb: int = 0


# llama.cpp reads 39 to 41 % of a Jetson's bandwidth, a ViT-B/16 in TensorRT takes 33 % of its products (docs/plan.md
# names the sources); the prefill's share is assumed to be the stages'.
_GPU = {"stage": 0.33, "prefill": 0.33, "decode": 0.40}
# As `mllm-edge bench` measured CPUs (docs/benchmarks.md).
CPU = {"stage": 0.60, "prefill": 0.50, "decode": 0.70}


def _board(
    name: str, title: str, memory: float, rate: float, tflops: float, capability: str, scratch: int, *aliases: str
) -> Device:
    return Device(name, title, memory, 2.2, rate, tflops, _GPU, capability, aliases, True, scratch)


# Bandwidths from data sheets; fp16 = sparse INT8 TOPS / 4 of the GPU alone, or sparse FP4 / 8 (docs/plan.md).
DEVICES = {
    device.name: device
    for device in (
        _board("orin-nano", "Jetson Orin Nano 8GB", 8, 68, 10, "sm_87", 1024),
        _board("orin-nano-super", "Jetson Orin Nano 8GB, Super mode", 8, 102, 17, "sm_87", 1024),
        _board("orin-nx", "Jetson Orin NX 16GB", 16, 102.4, 15, "sm_87", 2048),
        _board("agx-orin", "Jetson AGX Orin 64GB", 64, 204.8, 42.5, "sm_87", 4096, "orin"),
        _board("thor-t4000", "Jetson T4000", 64, 273, 150, "sm_110", 0, "t4000"),
        _board("thor", "Jetson AGX Thor T5000", 128, 273, 259, "sm_110", 0, "agx-thor", "thor-t5000", "t5000"),
        _board("dgx-spark", "DGX Spark (GB10)", 128, 273, 125, "sm_121", 0, "spark", "gb10"),
        Device("rtx-4060-laptop", "GeForce RTX 4060 Laptop", 8, 1.0, 256, 45, _GPU, "sm_89", ("rtx-4060-mobile",)),
        Device("raspberry-pi-5", "Raspberry Pi 5 8GB", 8, 1.0, 17.1, 0.15, CPU, aliases=("pi-5", "pi5", "rpi5")),
    )
}
_NAMES = {name: device for device in DEVICES.values() for name in (device.name, *device.aliases)}


def get(name: str, also: Sequence[str] = ()) -> Device:
    """The device called `name`.

    Args:
        name: its own or another of its names.
        also: what the caller takes beside devices.

    Raises:
        BadInput: an unknown name; it lists the nearest ones.
    """
    if name in _NAMES:
        return _NAMES[name]
    raise no_such("device", name, [*also, *_NAMES], f"use {', '.join([*also, *DEVICES])}", most=3)
