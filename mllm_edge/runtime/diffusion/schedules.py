"""Diffusion schedules as tables: a step is linear in the latent, a latent that was kept, the prediction, the three
before, and noise. A scheduler is a function that returns its table, and one loop runs them all.

Each equals diffusers' scheduler of that name step by step, with predictions of noise and the settings of Stable
Diffusion 1.5, for every number of steps that it can take; a test holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mllm_edge.errors import BadInput, look_up
from mllm_edge.runtime.engines.interface import Floats

OFFSET = 1  # of the timesteps of spacing "leading", as Stable Diffusion has it
SPACINGS = ("leading", "linspace")


@dataclass(frozen=True)
class Table:
    """What happens at each of n calls of the model.

    Attributes:
        start: deviation of the first latent.
        timesteps: [n], for the model.
        scales: [n], what the latent is multiplied with before the model reads it.
        weights: [n,7], of the latent, the kept latent, this prediction, the three before (the last one first), and
            fresh noise.
        keeps: [n], whether the latent before the step is the kept one from then on.
        remembers: [n], whether the prediction counts among those before.
        clean: [n,2], of the latent and this prediction in the latent without noise, as it looks at that step.
    """

    start: float
    timesteps: np.ndarray
    scales: np.ndarray
    weights: np.ndarray
    keeps: np.ndarray
    remembers: np.ndarray
    clean: np.ndarray


def ddim(kept: np.ndarray, steps: int, spacing: str) -> Table:
    """DDIM without noise (Song et al. 2021, equation 12)."""
    timesteps = _whole(_spaced(len(kept), steps, spacing), len(kept), steps)
    a, b = kept[timesteps], _shares(kept, timesteps - len(kept) // steps)
    weights = _weights(latent=np.sqrt(b / a), now=np.sqrt(1 - b) - np.sqrt(b * (1 - a) / a))
    return _table(1.0, timesteps, np.ones(steps), weights, np.sqrt((1 - a) / a), np.sqrt(a))


def pndm(kept: np.ndarray, steps: int, spacing: str) -> Table:
    """Linear multistep on the manifold (Liu et al. 2022, equations 9 and 11) without Runge-Kutta steps: the second call
    repeats the first step with the mean of both predictions, so that n steps, n > 1, are n + 1 calls."""
    spaced, gap = _whole(_spaced(len(kept), steps, spacing), len(kept), steps), len(kept) // steps
    timesteps = np.concatenate([spaced[:2], spaced[1:]])
    here, repeats = timesteps.copy(), np.arange(len(timesteps)) == 1
    here[repeats] += gap
    a, b = kept[here], _shares(kept, here - gap)
    latent, moved = np.sqrt(b / a), (a - b) / (a * np.sqrt(1 - b) + np.sqrt(a * (1 - a) * b))
    mixed = np.tile(np.array([55, -59, 37, -9]) / 24, (len(timesteps), 1))  # Adams-Bashforth, as far as there are some
    first = np.array([[12, 0, 0, 0], [6, 6, 0, 0], [18, -6, 0, 0], [23, -16, 5, 0]]) / 12
    mixed[:4] = first[: len(timesteps)]
    weights = _weights(latent=np.where(repeats, 0, latent), kept=np.where(repeats, latent, 0), now=moved)
    weights[:, 2:6] = moved[:, None] * mixed
    share = kept[timesteps]
    return _table(
        1.0, timesteps, np.ones(len(timesteps)), weights, np.sqrt((1 - share) / share), np.sqrt(share), ~repeats
    )


def euler(kept: np.ndarray, steps: int, spacing: str) -> Table:
    """Euler's method on the probability flow (Karras et al. 2022, algorithm 2 without churn)."""
    return _karras(kept, steps, spacing, lambda here, after: (after, np.zeros(steps)))


def euler_ancestral(kept: np.ndarray, steps: int, spacing: str) -> Table:
    """Euler's method with fresh noise at each step (k-diffusion `sample_euler_ancestral`)."""

    def split(here: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        up = np.sqrt(after**2 * (here**2 - after**2) / here**2)
        return np.sqrt(after**2 - up**2), up

    return _karras(kept, steps, spacing, split)


def dpm_solver(kept: np.ndarray, steps: int, spacing: str) -> Table:
    """DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095, algorithm 2), whose first and last steps are of first order.

    It extrapolates the picture without noise, which is linear in a latent and its prediction: those of the step before
    are the kept latent and the last prediction.
    """
    timesteps = _spaced(len(kept), steps + 1, spacing)[:-1].round().astype(int)
    here = np.minimum(timesteps, len(kept) - 1)
    if np.any(np.diff(here) >= 0):
        raise _too_many(len(kept), steps)
    noise = np.sqrt((1 - kept) / kept)[here]  # over the picture's, falling
    after, alpha = np.append(noise[1:], 0.0), (noise**2 + 1) ** -0.5
    alpha_after = (after**2 + 1) ** -0.5
    grown = alpha_after * (1 - after / noise)
    lengths = np.log(noise[:-1] / after[:-1])  # in half the logarithm of the ratio of picture to noise
    bent = np.zeros(steps)
    bent[1:-1] = lengths[1:] / lengths[:-1] / 2
    weights = _weights(
        latent=after * alpha_after / (noise * alpha) + grown * (1 + bent) / alpha,
        kept=-grown * bent / np.roll(alpha, 1),
        now=-grown * (1 + bent) * noise,
    )
    weights[:, 3] = grown * bent * np.roll(noise, 1)
    return _table(1.0, timesteps, np.ones(steps), weights, noise, alpha)


class Schedule(NamedTuple):
    """A scheduler: its table from the shares of variance [train_steps] that are left of the picture, a number of steps
    and a spacing; and its usual spacing, which is diffusers'."""

    table: Callable[[np.ndarray, int, str], Table]
    spacing: str


SCHEDULES = {
    "ddim": Schedule(ddim, "leading"),
    "pndm": Schedule(pndm, "leading"),
    "euler": Schedule(euler, "linspace"),
    "euler_ancestral": Schedule(euler_ancestral, "linspace"),
    "dpm_solver": Schedule(dpm_solver, "linspace"),
}


def table_of(name: str, betas: Sequence[float], train_steps: int, steps: int, spacing: str = "") -> Table:
    """The table of a schedule.

    Args:
        name: one of `SCHEDULES`.
        betas: the variances of the first and last step of training; the square roots of the others lie linearly between
            theirs ("scaled_linear").
        train_steps: of training.
        steps: of this schedule, 1 to `train_steps`.
        spacing: of the timesteps: "leading" (multiples of `train_steps // steps`, and 1 more) or "linspace" (from the
            last to the first); "" is the schedule's usual one.

    Raises:
        BadInput: an unknown name, or a number of steps that this schedule cannot take.
    """
    schedule = look_up("schedule", name, SCHEDULES)
    spacing = spacing or schedule.spacing
    look_up("spacing", spacing, dict.fromkeys(SPACINGS))
    if not 1 <= steps <= train_steps:
        raise BadInput(f"{steps} steps draw nothing; give 1 to {train_steps}")
    return schedule.table(shares(betas, train_steps), steps, spacing)


def shares(betas: Sequence[float], train_steps: int) -> np.ndarray:
    """What is left of the picture's variance at each step of training ("scaled_linear"): float64 [train_steps]."""
    kept: np.ndarray = np.cumprod(1 - np.linspace(betas[0] ** 0.5, betas[1] ** 0.5, train_steps) ** 2)
    return kept


def run(
    table: Table, noise: Floats, predict: Callable[[Floats, float], Floats], fresh: Callable[[], Floats]
) -> Iterator[tuple[Floats, Floats]]:
    """The latent after each call of the model, and the latent without noise as it looks at that step.

    Args:
        table: the schedule.
        noise: of deviation 1, any shape.
        predict: the noise in a latent at a timestep.
        fresh: more noise of that shape, where the schedule adds some.
    """
    latent, kept, before = noise * np.float32(table.start), np.zeros_like(noise), [np.zeros_like(noise)] * 3
    noisy = table.weights[:, 6].any()  # then each step draws, as the others do, also one that does not use it
    for step, weights in enumerate(table.weights.astype(np.float32)):
        found = predict(latent * np.float32(table.scales[step]), float(table.timesteps[step]))
        parts = [latent, kept, found, *before, fresh() if noisy else kept]
        clean = np.float32(table.clean[step, 0]) * latent + np.float32(table.clean[step, 1]) * found
        kept = latent if table.keeps[step] else kept
        latent = sum(
            (weight * part for weight, part in zip(weights, parts, strict=True) if weight), np.zeros_like(noise)
        )
        before = [found, *before[:2]] if table.remembers[step] else before
        yield latent, clean


def _karras(
    kept: np.ndarray,
    steps: int,
    spacing: str,
    split: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> Table:
    """A table over latents whose picture is not made smaller: `split` gives the noise that a step goes to and the noise
    that it adds, from those before and after it."""
    timesteps = _spaced(len(kept), steps, spacing)
    here = np.interp(timesteps, np.arange(len(kept)), np.sqrt((1 - kept) / kept))
    down, up = split(here, np.append(here[1:], 0.0))
    start = here[0] if spacing == "linspace" else np.sqrt(here[0] ** 2 + 1)
    weights = _weights(latent=np.ones(steps), now=down - here, fresh=up)
    return _table(float(start), timesteps, (here**2 + 1) ** -0.5, weights, here, np.ones(steps))


def _table(
    start: float,
    timesteps: np.ndarray,
    scales: np.ndarray,
    weights: np.ndarray,
    noise: np.ndarray,
    picture: np.ndarray,
    remembers: np.ndarray | None = None,
) -> Table:
    """A table, where `noise` is over the picture's deviation and `picture` is what the picture is multiplied with."""
    calls = len(timesteps)
    # Whatever reads the kept latent reads that of the call before.
    keeps = np.append(weights[1:, 1] != 0, False)
    clean = np.stack([1 / picture, -noise], axis=1)
    remembers = np.ones(calls, bool) if remembers is None else remembers
    return Table(start, timesteps.astype(np.float64), scales, weights, keeps, remembers, clean)


def _weights(
    latent: np.ndarray, now: np.ndarray, kept: np.ndarray | float = 0.0, fresh: np.ndarray | float = 0.0
) -> np.ndarray:
    found = np.zeros((len(latent), 7))
    found[:, 0], found[:, 1], found[:, 2], found[:, 6] = latent, kept, now, fresh
    return found


def _spaced(train_steps: int, steps: int, spacing: str) -> np.ndarray:
    """Timesteps [n], falling."""
    if spacing == "linspace":
        return np.linspace(0, train_steps - 1, steps)[::-1]
    return np.arange(steps)[::-1] * (train_steps // steps) + float(OFFSET)


def _whole(timesteps: np.ndarray, train_steps: int, steps: int) -> np.ndarray:
    """As numbers of training steps. Raises BadInput where there is none of that number."""
    if timesteps[0] >= train_steps:
        raise _too_many(train_steps, steps)
    return timesteps.round().astype(int)


def _shares(kept: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    """What is left of the picture; before the first step as at the first (diffusers' set_alpha_to_one=False)."""
    return kept[np.maximum(timesteps, 0)]


def _too_many(train_steps: int, steps: int) -> BadInput:
    return BadInput(f"this schedule cannot take {steps} steps of {train_steps}; give fewer")
