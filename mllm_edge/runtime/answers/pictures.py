"""Pictures that a diffusion model makes from an answer's states."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
from PIL import Image

from mllm_edge.bundle.answers import PicturesAnswer
from mllm_edge.errors import BadInput, look_up
from mllm_edge.runtime.answer import Picture
from mllm_edge.runtime.answers.phrases import groups
from mllm_edge.runtime.diffusion.guidance import guided
from mllm_edge.runtime.diffusion.schedules import SCHEDULES, Table, run
from mllm_edge.runtime.engines.interface import Floats
from mllm_edge.runtime.turn import Need, Turn


def pictures(turn: Turn, entry: PicturesAnswer, need: Need) -> Iterator[Picture]:
    """A picture for each group of states, drawn from noise of the turn's seed.

    Raises:
        BadInput: a schedule that is not known, or not as many guidance scales as conditions.
    """
    drawing = turn.drawing
    scales = list(entry.guidance if drawing.guidance is None else drawing.guidance)
    schedule = look_up("schedule", entry.schedule, SCHEDULES)
    if len(scales) != len(entry.drops):
        raise BadInput(f"{len(scales)} guidance scale(s) for {len(entry.drops)} condition(s); give one for each")
    if drawing.steps is not None and not 1 <= drawing.steps <= entry.train_steps:
        raise BadInput(f"{drawing.steps} steps draw nothing; give 1 to {entry.train_steps}")
    table = schedule(entry.betas, entry.train_steps, drawing.steps or entry.steps)
    random = np.random.default_rng(drawing.seed % 2**64)
    for place in groups(turn, entry.states):
        start = time.perf_counter()
        image = _drawn(turn, entry, need, table, scales, random)
        turn.add_time("pictures", 1000 * (time.perf_counter() - start))
        yield Picture((place.start, place.end), turn.question, "generated", image)


def _drawn(
    turn: Turn, entry: PicturesAnswer, need: Need, table: Table, scales: list[float], random: np.random.Generator
) -> Image.Image:
    conditions = {name: need(name) for name, _ in entry.drops}
    before = dict(turn.values)

    def predict(latent: Floats, timestep: float) -> Floats:
        branches = []
        for dropped in range(len(entry.drops) + 1):
            given = {**conditions, **{name: need(other) for name, other in entry.drops[:dropped]}}
            turn.values |= {**given, entry.latent: latent, entry.timestep: np.array([timestep], np.float32)}
            branches.append(np.asarray(need(entry.noise)))
        return guided(branches, scales)

    def noise() -> Floats:
        return random.standard_normal(entry.shape, np.float32)

    latent = run(table, noise(), predict, noise)
    turn.values[entry.decoded] = (latent / np.float32(entry.latent_scale)).astype(np.float32)
    pixels = np.asarray(need(entry.pixels))[0]  # [3,h,w] in -1..1
    turn.values.clear()
    turn.values |= before
    levels = np.clip((pixels / 2 + 0.5) * 255, 0, 255).round().astype(np.uint8)
    return Image.fromarray(levels.transpose(1, 2, 0))  # [h,w,3]
