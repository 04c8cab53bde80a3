"""Schedules and guidance against diffusers, step by step."""

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from mllm_edge.runtime.diffusion.guidance import guided
from mllm_edge.runtime.diffusion.schedules import SCHEDULES, run

BETAS, TRAINED = [0.00085, 0.012], 1000
COMMON = {
    "num_train_timesteps": TRAINED,
    "beta_start": BETAS[0],
    "beta_end": BETAS[1],
    "beta_schedule": "scaled_linear",
}
THEIRS: dict[str, Callable[[], Any]] = {
    "ddim": lambda: diffusers.DDIMScheduler(**COMMON, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**COMMON, steps_offset=1, timestep_spacing="leading"),
    "euler_ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(
        **COMMON, steps_offset=1, timestep_spacing="leading"
    ),
}


def predict(latent: np.ndarray, timestep: float) -> np.ndarray:
    """Nonlinear, and different at each step."""
    return np.tanh(latent * (1 + timestep / TRAINED)).astype(np.float32)


@pytest.mark.parametrize("steps", [4, 20, 50])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_is_that_of_diffusers(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(7)
    first = random.standard_normal((1, 4, 8, 8)).astype(np.float32)
    fresh = [random.standard_normal((1, 4, 8, 8)).astype(np.float32) for _ in range(steps)]
    theirs = THEIRS[name]()
    theirs.set_timesteps(steps)
    table = SCHEDULES[name](BETAS, TRAINED, steps)
    np.testing.assert_allclose(table.timesteps, theirs.timesteps.numpy())

    seen: list[np.ndarray] = []
    noise = iter(fresh)

    def watched(latent: np.ndarray, timestep: float) -> np.ndarray:
        seen.append(latent)
        return predict(latent, timestep)

    last = run(table, first, watched, lambda: next(noise))

    given = iter(fresh)
    if name == "euler_ancestral":
        module = "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor"
        monkeypatch.setattr(module, lambda *_, **__: torch.from_numpy(next(given)))
    latent = torch.from_numpy(first) * float(theirs.init_noise_sigma)
    for step, timestep in enumerate(theirs.timesteps):
        scaled = theirs.scale_model_input(latent, timestep)
        np.testing.assert_allclose(seen[step], scaled.numpy(), rtol=2e-5, atol=2e-5)
        latent = theirs.step(torch.from_numpy(predict(scaled.numpy(), float(timestep))), timestep, latent).prev_sample
    np.testing.assert_allclose(last, latent.numpy(), rtol=2e-5, atol=2e-5)


def test_guidance_over_two_conditions_is_that_of_the_paper() -> None:
    full, text_less, none = (np.full((1, 2), value, np.float32) for value in (5.0, 3.0, 2.0))
    # InstructPix2Pix, equation 3: none + s_image (text_less - none) + s_text (full - text_less)
    expected = 2.0 + 1.5 * (3.0 - 2.0) + 7.5 * (5.0 - 3.0)
    np.testing.assert_allclose(guided([full, text_less, none], [7.5, 1.5]), expected)
    np.testing.assert_allclose(guided([full], []), 5.0)
