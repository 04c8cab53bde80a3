"""Pictures that a diffusion model makes from an answer's states."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from PIL import Image

from mllm_edge.bundle.answers import PicturesAnswer
from mllm_edge.errors import BadInput
from mllm_edge.runtime.answer import Picture
from mllm_edge.runtime.answers.decision import chances, is_retrieved
from mllm_edge.runtime.answers.phrases import groups
from mllm_edge.runtime.decoding.sampling import check_seed
from mllm_edge.runtime.diffusion.guidance import guided
from mllm_edge.runtime.diffusion.schedules import Table, run, table_of
from mllm_edge.runtime.engines.interface import Array, Floats
from mllm_edge.runtime.turn import Drawing, Need, Turn

MOST_DRAWN = 64  # pictures for one that is wanted


def settled(entry: PicturesAnswer, drawing: Drawing) -> tuple[Table, list[float]]:
    """The schedule and the guidance scales that a user's wishes come to.

    Raises:
        BadInput: a schedule that is not known or cannot take so many steps, not as many guidance scales as conditions,
            a seed outside 64 bits, a number of pictures outside its range, or no steps between previews.
    """
    scales = list(entry.guidance if drawing.guidance is None else drawing.guidance)
    if len(scales) != len(entry.drops):
        raise BadInput(f"{len(scales)} guidance scale(s) for {len(entry.drops)} condition(s); give one for each")
    if not all(map(math.isfinite, scales)):
        raise BadInput(f"the guidance scales {scales} are not all numbers; give numbers")
    check_seed(drawing.seed)
    if not 1 <= drawing.count <= MOST_DRAWN:
        raise BadInput(f"{drawing.count} pictures cannot be drawn for one; give 1 to {MOST_DRAWN}")
    if drawing.preview and drawing.every < 1:
        raise BadInput(f"there is no preview every {drawing.every} steps; give 1 or more")
    name = drawing.schedule or entry.schedule
    steps = entry.steps if drawing.steps is None else drawing.steps
    spacing = entry.spacing if name == entry.schedule else ""
    return table_of(name, entry.betas, entry.train_steps, steps, spacing), scales


def pictures(turn: Turn, entry: PicturesAnswer, need: Need) -> Iterator[Picture]:
    """A picture for each group of states, drawn from one stream of noise of the turn's seed: numpy's PCG64, whose
    numbers are the same on every machine. None where the entry's `decision` is to retrieve and there is an index.

    Several are drawn one after the other, and come in the order of their cosines with the query of their group (Koh et
    al. 2023); where the bundle cannot compare them, as they were drawn.

    Raises:
        BadInput: see `settled`.
    """
    drawing = turn.drawing
    table, scales = settled(entry, drawing)
    random, number = np.random.Generator(np.random.PCG64(drawing.seed)), 0
    for place in groups(turn, entry.states):
        decided = chances(need, entry.decision)
        if drawing.index is not None and is_retrieved(decided):
            continue
        drawn = list[Picture]()
        for _ in range(drawing.count):
            number += 1
            image = _drawn(turn, entry, need, table, scales, random, number)
            drawn.append(Picture((place.start, place.end), turn.question, "generated", image, decided=decided))
        yield from _ranked(drawn, turn, entry, need)


def _drawn(
    turn: Turn,
    entry: PicturesAnswer,
    need: Need,
    table: Table,
    scales: list[float],
    random: np.random.Generator,
    number: int,
) -> Image.Image:
    """The next picture of a turn, its `number`th."""
    drawing, calls = turn.drawing, len(table.timesteps)
    start, name, before = time.perf_counter(), f"drawing picture {number}", dict(turn.values)
    if drawing.report:
        drawing.report(name, 1, 1, None)
    for step, (latent, clean) in enumerate(_latents(turn, entry, need, table, scales, random), 1):
        if step == calls:
            image = _decoded(turn, entry, need, latent)
            break
        if drawing.report:
            drawing.report(name, 1, 1, None, step / calls)
        if drawing.preview and step % drawing.every == 0:
            drawing.preview(_decoded(turn, entry, need, clean))
    turn.values.clear()
    turn.values |= before
    seconds = time.perf_counter() - start
    turn.add_time("pictures", 1000 * seconds)
    if drawing.report:
        drawing.report(name, 1, 1, seconds)
    return image


def _ranked(drawn: list[Picture], turn: Turn, entry: PicturesAnswer, need: Need) -> list[Picture]:
    """Several pictures of a group with their cosines, the nearest first, equals as they were drawn; the cosine of a
    vector without direction is 0."""
    if len(drawn) == 1:
        return drawn
    ranking = turn.ranking
    if ranking is None or ranking.states != entry.states:
        warnings.warn(
            "this bundle cannot compare pictures with what is asked; they stand in the order of drawing",
            RuntimeWarning,
            stacklevel=2,
        )
        return drawn
    query = _unit(np.asarray(need(ranking.query)).reshape(-1))
    found = [replace(part, score=float(_unit(ranking.embed(part.image)) @ query)) for part in drawn]
    return sorted(found, key=lambda part: part.score or 0.0, reverse=True)  # stable, also in reverse


def _unit(vector: Floats) -> Floats:
    """[d] of length 1; zeros where it has no direction."""
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return (vector / length).astype(np.float32) if 0 < length < np.inf else np.zeros_like(vector)


def _latents(
    turn: Turn, entry: PicturesAnswer, need: Need, table: Table, scales: list[float], random: np.random.Generator
) -> Iterator[tuple[Floats, Floats]]:
    """The latent after each step, and how it looks without noise, float32 of the entry's shape."""
    calls = _calls(turn, entry, need)

    def predict(latent: Floats, timestep: float) -> Floats:
        turn.values[entry.timestep] = np.array([timestep], np.float32)
        branches: list[Floats] = []
        for rows, given in calls:
            turn.values |= {**given, entry.latent: np.repeat(latent, rows, axis=0)}
            branches += np.split(np.asarray(need(entry.noise)), rows)  # [1,C,h,w] each
        return guided(branches, scales)

    def noise() -> Floats:
        return random.standard_normal(entry.shape, np.float32)

    return run(table, noise(), predict, noise)


def _calls(turn: Turn, entry: PicturesAnswer, need: Need) -> list[tuple[int, dict[str, Array]]]:
    """What the UNet reads beside latent and timestep, made once for all steps: in one call for all branches where its
    latent has a named axis for them, else in a call for each.

    Returns:
        The number of branches in each call, and arrays by name.

    Raises:
        BadInput: an input without that axis differs between branches.
    """
    shapes = {spec.name: spec.shape for spec in turn.inputs[entry.unet]}
    conditions = [name for name in shapes if name not in (entry.latent, entry.timestep)]
    dropped = {name: need(other) for name, other in entry.drops}
    before, branches = dict(turn.values), list[dict[str, Array]]()
    for name in [None, *dropped]:
        turn.values |= {} if name is None else {name: dropped[name]}
        # On the host, as a stage's output on a GPU lasts until it runs for the next branch.
        branches.append({condition: np.asarray(need(condition)) for condition in conditions})
    turn.values.clear()
    turn.values |= before
    axis = shapes[entry.latent][0]
    if not isinstance(axis, str):
        return [(1, branch) for branch in branches]
    together: dict[str, Array] = {}
    for name in conditions:
        arrays = [branch[name] for branch in branches]
        if shapes[name][0] == axis:
            together[name] = np.concatenate(arrays)  # a row for each branch
        elif all(np.array_equal(arrays[0], array) for array in arrays[1:]):
            together[name] = arrays[0]  # one for all
        else:
            raise BadInput(f"{entry.unet} reads one {name} for all {axis}, which differ in it; export the bundle again")
    return [(len(branches), together)]


def _decoded(turn: Turn, entry: PicturesAnswer, need: Need, latent: Floats) -> Image.Image:
    """A latent as a picture."""
    turn.values[entry.decoded] = (latent / np.float32(entry.latent_scale)).astype(np.float32)
    pixels = np.asarray(need(entry.pixels))[0]  # [3,h,w] in -1..1
    levels = np.clip((pixels / 2 + 0.5) * 255, 0, 255).round().astype(np.uint8)
    return Image.fromarray(levels.transpose(1, 2, 0))  # [h,w,3]
