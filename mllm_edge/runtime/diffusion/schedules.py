"""Diffusion schedules as tables: a step is linear in the latent, a latent that was kept, the prediction, the three
before, and noise. A scheduler is a function that returns its table, and one loop runs them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mllm_edge.runtime.engines.interface import Floats


@dataclass(frozen=True)
class Table:
    """What happens at each of n steps.

    Attributes:
        start: deviation of the first latent.
        timesteps: [n], for the model.
        scales: [n], what the latent is multiplied with before the model reads it.
        weights: [n,7], of the latent, the kept latent, this prediction, the three before (the last one first), and
            fresh noise.
        keeps: [n], whether the latent is kept before the step.
        remembers: [n], whether the prediction counts among those before.
    """

    start: float
    timesteps: np.ndarray
    scales: np.ndarray
    weights: np.ndarray
    keeps: np.ndarray
    remembers: np.ndarray


def ddim(betas: Sequence[float], train_steps: int, steps: int) -> Table:
    """DDIM without noise (Song et al. 2021, equation 12), timesteps "leading" with an offset of 1, as Stable Diffusion
    1.5 has them."""
    kept = _kept(betas, train_steps)
    stride = train_steps // steps
    timesteps = np.arange(steps)[::-1] * stride + 1
    before = timesteps - stride
    a = kept[timesteps]
    b = np.where(before >= 0, kept[np.maximum(before, 0)], kept[0])  # diffusers' set_alpha_to_one=False
    latent, now = np.sqrt(b / a), np.sqrt(1 - b) - np.sqrt(b * (1 - a) / a)
    return _one_step(1.0, timesteps.astype(np.float64), np.ones(steps), latent, now, np.zeros(steps))


def euler(betas: Sequence[float], train_steps: int, steps: int) -> Table:
    """Euler's method on the probability flow (Karras et al. 2022, algorithm 2 without churn), timesteps "leading" with
    an offset of 1."""
    timesteps, sigmas = _sigmas(betas, train_steps, steps)
    here, after = sigmas[:-1], sigmas[1:]
    start = float(np.sqrt(sigmas[0] ** 2 + 1))
    return _one_step(start, timesteps, (here**2 + 1) ** -0.5, np.ones(steps), after - here, np.zeros(steps))


def euler_ancestral(betas: Sequence[float], train_steps: int, steps: int) -> Table:
    """Euler's method with fresh noise at each step (k-diffusion `sample_euler_ancestral`), timesteps as `euler`."""
    timesteps, sigmas = _sigmas(betas, train_steps, steps)
    here, after = sigmas[:-1], sigmas[1:]
    up = np.sqrt(after**2 * (here**2 - after**2) / here**2)
    down = np.sqrt(after**2 - up**2)
    start = float(np.sqrt(sigmas[0] ** 2 + 1))
    return _one_step(start, timesteps, (here**2 + 1) ** -0.5, np.ones(steps), down - here, up)


SCHEDULES: dict[str, Callable[[Sequence[float], int, int], Table]] = {
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
}


def run(table: Table, noise: Floats, predict: Callable[[Floats, float], Floats], fresh: Callable[[], Floats]) -> Floats:
    """The latent at the end of a schedule.

    Args:
        table: the schedule.
        noise: of deviation 1, any shape.
        predict: the noise in a latent at a timestep.
        fresh: more noise of that shape, where the schedule adds some.
    """
    latent, kept, before = noise * np.float32(table.start), np.zeros_like(noise), [np.zeros_like(noise)] * 3
    for step, weights in enumerate(table.weights.astype(np.float32)):
        found = predict(latent * np.float32(table.scales[step]), float(table.timesteps[step]))
        kept = latent if table.keeps[step] else kept
        parts = [latent, kept, found, *before, fresh() if weights[6] else kept]
        latent = sum(
            (weight * part for weight, part in zip(weights, parts, strict=True) if weight), np.zeros_like(noise)
        )
        before = [found, *before[:2]] if table.remembers[step] else before
    return latent


def _one_step(
    start: float, timesteps: np.ndarray, scales: np.ndarray, latent: np.ndarray, now: np.ndarray, fresh: np.ndarray
) -> Table:
    """A table whose steps look at nothing before them."""
    weights = np.zeros((len(timesteps), 7))
    weights[:, 0], weights[:, 2], weights[:, 6] = latent, now, fresh
    return Table(start, timesteps, scales, weights, np.zeros(len(timesteps), bool), np.ones(len(timesteps), bool))


def _kept(betas: Sequence[float], train_steps: int) -> np.ndarray:
    """The share of the picture's variance that is left after each training step, [train_steps]."""
    return np.cumprod(1 - np.linspace(betas[0] ** 0.5, betas[1] ** 0.5, train_steps) ** 2)


def _sigmas(betas: Sequence[float], train_steps: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps [n] and deviations of the noise over the picture's [n+1], the last one 0."""
    kept = _kept(betas, train_steps)
    timesteps = (np.arange(steps) * (train_steps // steps)).round()[::-1].astype(np.float64) + 1
    sigmas = np.interp(timesteps, np.arange(train_steps), np.sqrt((1 - kept) / kept))
    return timesteps, np.append(sigmas, 0.0)
