"""A toy that retrieves: eight forced tokens whose states make a query, and an eye that makes vectors of pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import toy_marks
from PIL import Image
from torch import Tensor, nn
from toy_marks import WIDTH
from toys import PIXELS, SIZE, noise_picture, seeded

from mllm_edge.bundle.answers import RetrievedAnswer
from mllm_edge.bundle.manifest import TensorSpec
from mllm_edge.models.plan import Checkpoint, ExportPlan, StageExport
from mllm_edge.runtime.preprocess import preprocess

QUERY, SCALE = 5, 2.0


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8 * WIDTH, QUERY)

    def forward(self, marks: Tensor) -> Tensor:
        return self.line(marks.flatten()[None])  # [8,W] -> [1,d]


class Eye(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3 * SIZE * SIZE, QUERY)

    def forward(self, toy_pixels: Tensor) -> Tensor:
        return self.line(toy_pixels.flatten(1))  # [n,3,S,S] -> [n,d]


HEAD, EYE = seeded(Head, 31), seeded(Eye, 32)


def plan(checkpoint: Checkpoint, pictures: int | str = "pictures", seed: int = 32) -> ExportPlan:
    """`pictures`: how many the eye sees at once; of another `seed` it is another eye."""
    marks = TensorSpec("marks", "float32", [8, WIDTH])
    seen = TensorSpec("toy_pixels", "float32", [pictures, 3, SIZE, SIZE])
    stages = [
        StageExport("head", HEAD, [marks], [TensorSpec("query", "float32", [1, QUERY])], ("fp32",)),
        StageExport("eye", seeded(Eye, seed), [seen], [TensorSpec("seen", "float32", [pictures, QUERY])], ("fp32",)),
    ]
    answers = [RetrievedAnswer("marks", "query", SCALE, picture="seen")]
    return toy_marks.plan(checkpoint, stages=stages, answers=answers)


def photographs(folder: Path, count: int, first: int = 0) -> Path:
    """Small pictures of noise, every third of them in a folder below."""
    for number in range(first, first + count):
        place = folder / "below" if number % 3 == 0 else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise_picture(number)).save(place / f"{number}.png")
    return folder


@torch.no_grad()
def seen(files: list[Path]) -> np.ndarray:
    """By hand: what the eye makes of pictures, float32 [n,d] of length 1."""
    pixels = torch.from_numpy(np.concatenate([preprocess(Image.open(file), PIXELS) for file in files]))
    return nn.functional.normalize(EYE()(pixels), dim=-1).numpy()


@torch.no_grad()
def asked(states: Tensor) -> np.ndarray:
    """By hand: what eight states [8,W] look for, float32 [d] of length 1."""
    return nn.functional.normalize(HEAD()(states), dim=-1)[0].numpy()
