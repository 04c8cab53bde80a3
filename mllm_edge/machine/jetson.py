"""Facts about a Jetson, from the files of its system (L4T)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# L4T release -> JetPack, for systems without the package `nvidia-jetpack`, which states it.
JETPACK = {
    "35.4.1": "5.1.2",
    "36.2": "6.0 DP",
    "36.3": "6.0",
    "36.4": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "38.2": "7.0",
    "38.4": "7.1",
    "39.2": "7.2",
}
# Compute capability by chip.
CAPABILITIES = {"tegra264": "sm_110", "tegra234": "sm_87", "tegra194": "sm_72"}


@dataclass(frozen=True)
class Jetson:
    """A board: its model, the release of its system, JetPack ("" if unknown), the power mode with its number
    ("15W (0)", "" if unknown), and the GPU's compute capability."""

    model: str
    l4t: str
    jetpack: str
    power_mode: str
    capability: str


def find(root: Path = Path("/")) -> Jetson | None:
    """The board that this system runs on; None on other machines.

    Args:
        root: root of the system's files.
    """
    model = read(root / "proc/device-tree/model").strip("\0\n ")
    released = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", read(root / "etc/nv_tegra_release"))
    if "Jetson" not in model and not released:
        return None
    chips = read(root / "proc/device-tree/compatible")
    l4t = f"{released[1]}.{released[2]}" if released else ""
    return Jetson(
        model=model or "unknown Jetson",
        l4t=l4t,
        jetpack=_jetpack(root, l4t),
        power_mode=_power_mode(root),
        capability=next((sm for chip, sm in CAPABILITIES.items() if chip in chips), ""),
    )


def _jetpack(root: Path, l4t: str) -> str:
    installed = re.search(
        r"^Package: nvidia-jetpack\n(?:.+\n)*?Version: ([\w.]+)", read(root / "var/lib/dpkg/status"), re.MULTILINE
    )
    if installed:
        return installed[1]
    known = l4t.removesuffix(".0")
    return JETPACK.get(known, "")


def _power_mode(root: Path) -> str:
    """The mode last set by nvpmodel, with its name from nvpmodel's table."""
    mode = re.search(r"pmode:(\d+)", read(root / "var/lib/nvpmodel/status"))
    if not mode:
        return ""
    number = int(mode[1])
    named = re.search(rf"<\s*POWER_MODEL\s+ID={number}\s+NAME=(\S+)\s*>", read(root / "etc/nvpmodel.conf"))
    return f"{named[1]} ({number})" if named else str(number)


def read(path: Path) -> str:
    """A small file's text, "" if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
