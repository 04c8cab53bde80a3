"""Schedules and guidance against diffusers, step by step, and by laws that need no reference."""

from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_edge.errors import BadInput
from mllm_edge.runtime.diffusion.guidance import guided
from mllm_edge.runtime.diffusion.schedules import SCHEDULES, SPACINGS, Table, run, table_of

BETAS, TRAINED = [0.00085, 0.012], 1000
# Stable Diffusion 1.5's scheduler_config.json
CONFIG = {
    "num_train_timesteps": TRAINED,
    "beta_start": BETAS[0],
    "beta_end": BETAS[1],
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
THEIRS: dict[str, Any] = {
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "dpm_solver": diffusers.DPMSolverMultistepScheduler,
}
# What diffusers itself cannot do: an index beyond training, or infinite numbers.
REFUSED = {("ddim", "leading", 1000), ("pndm", "leading", 1000)}
REFUSED |= {("dpm_solver", "leading", 999), ("dpm_solver", "leading", 1000), ("dpm_solver", "linspace", 1000)}
SHAPE = (1, 2, 3, 4)


def predict(latent: np.ndarray, timestep: float) -> np.ndarray:
    """Nonlinear, and different at each step."""
    return np.tanh(latent * (1 + timestep / TRAINED)).astype(np.float32)


def noises(seed: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(seed)
    while True:
        yield random.standard_normal(SHAPE, np.float32)


def theirs(name: str, spacing: str, steps: int) -> Any:
    given = {"timestep_spacing": spacing} if spacing else {}
    scheduler = THEIRS[name].from_config(CONFIG, **given)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 20, 50, 333, 501, 999, 1000])
@pytest.mark.parametrize("spacing", ["", *SPACINGS])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_is_that_of_diffusers(name: str, spacing: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if (name, spacing or SCHEDULES[name].spacing, steps) in REFUSED:
        with pytest.raises(BadInput, match=f"this schedule cannot take {steps} steps of 1000; give fewer"):
            table_of(name, BETAS, TRAINED, steps, spacing)
        return
    table, scheduler = table_of(name, BETAS, TRAINED, steps, spacing), theirs(name, spacing, steps)
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps.numpy(), rtol=1e-6)
    ours, fresh = noises(7), noises(7)
    if name == "euler_ancestral":
        module = "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor"
        monkeypatch.setattr(module, lambda *_, **__: torch.from_numpy(next(fresh)))
    seen: list[np.ndarray] = []

    def watched(latent: np.ndarray, timestep: float) -> np.ndarray:
        seen.append(latent)
        return predict(latent, timestep)

    latents = run(table, next(ours), watched, lambda: next(ours))
    latent = torch.from_numpy(next(fresh)) * float(scheduler.init_noise_sigma)
    # diffusers computes its tables in float32, whose rounding adds up
    limit = 2e-5 if steps <= 50 else 2e-3
    for timestep, (here, _) in zip(scheduler.timesteps, latents, strict=True):
        scaled = scheduler.scale_model_input(latent, timestep)
        np.testing.assert_allclose(seen[-1], scaled.numpy(), rtol=limit, atol=limit)
        found = torch.from_numpy(predict(scaled.numpy(), float(timestep)))
        latent = scheduler.step(found, timestep, latent).prev_sample
        np.testing.assert_allclose(here, latent.numpy(), rtol=limit, atol=limit * float(latent.abs().max()))


def known(table: Table, picture: np.ndarray, betas: list[float], trained: int, seed: int) -> list[tuple[Any, Any]]:
    """All latents where each prediction is the noise that is in the latent, beside this picture."""
    kept = np.cumprod(1 - np.linspace(betas[0] ** 0.5, betas[1] ** 0.5, trained) ** 2)
    sigmas, random = np.sqrt((1 - kept) / kept), noises(seed)

    def noise(latent: np.ndarray, timestep: float) -> np.ndarray:
        share = 1 / (np.interp(timestep, np.arange(trained), sigmas) ** 2 + 1)
        return ((latent - share**0.5 * picture) / (1 - share) ** 0.5).astype(np.float32)

    return list(run(table, next(random), noise, lambda: next(random)))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.integers(2, 1500),
    st.floats(0.01, 0.98),
    st.floats(1e-4, 2e-3),
    st.floats(4e-3, 2e-2),
)
def test_who_knows_the_picture_draws_it(name: str, trained: int, part: float, first: float, last: float) -> None:
    """Whatever noise was there, a perfect prediction leads to the picture, and each step sees it."""
    steps = max(1, min(int(part * trained), 60))
    if name == "dpm_solver" and steps > trained - 2:
        return
    picture = np.random.default_rng(1).standard_normal(SHAPE)
    table = table_of(name, [first, last], trained, steps, "leading")
    latents = known(table, picture, [first, last], trained, 5)
    if name != "pndm":  # whose second call reads a latent of the first step's end
        for _, clean in latents:
            np.testing.assert_allclose(clean, picture, atol=2e-3)
    # What remains is the noise of training's first step, of the size that was found in the first latent.
    share = np.cumprod(1 - np.linspace(first**0.5, last**0.5, trained) ** 2)[int(table.timesteps[0])]
    found = (next(noises(5)) - share**0.5 * picture) / (1 - share) ** 0.5
    left = first**0.5 * np.abs(found).max() + first * np.abs(picture).max() if name in ("ddim", "pndm") else 0.0
    assert np.abs(latents[-1][0] - picture).max() <= left + 2e-3


# How many of the largest numbers of steps a schedule cannot take.
FEWER = {("ddim", "leading"): 1, ("pndm", "leading"): 1, ("dpm_solver", "leading"): 2, ("dpm_solver", "linspace"): 1}


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(SCHEDULES)), st.sampled_from(SPACINGS), st.integers(3, 1200), st.integers(1, 1200))
def test_every_number_of_steps_is_a_table_or_one_line(name: str, spacing: str, trained: int, steps: int) -> None:
    top = trained + 1 - FEWER.get((name, spacing), 0)
    if steps >= top:
        with pytest.raises(BadInput, match=f"give 1 to {trained}$|give fewer$"):
            table_of(name, BETAS, trained, steps, spacing)
        return
    table = table_of(name, BETAS, trained, steps, spacing)
    calls = steps + (name == "pndm" and steps > 1)
    assert len(table.timesteps) == len(table.keeps) == len(table.remembers) == len(table.scales) == calls
    assert table.weights.shape == (calls, 7) and table.clean.shape == (calls, 2)
    assert np.isfinite(table.weights).all() and np.isfinite(table.clean).all()


@pytest.mark.parametrize("steps", [0, -1, 1001, 10**9])
def test_numbers_of_steps_beyond_training_are_refused(steps: int) -> None:
    with pytest.raises(BadInput, match=f"{steps} steps draw nothing; give 1 to 1000"):
        table_of("pndm", BETAS, TRAINED, steps)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(BadInput, match="unknown schedule 'heun'; use one of ddim, pndm"):
        table_of("heun", BETAS, TRAINED, 4)
    with pytest.raises(BadInput, match="unknown spacing 'trailing'; use one of leading, linspace"):
        table_of("ddim", BETAS, TRAINED, 4, "trailing")


def test_fifty_steps_of_pndm_are_fifty_one_calls() -> None:
    table = table_of("pndm", BETAS, TRAINED, 50)
    assert table.timesteps.tolist() == [981, 961, 961, *range(941, 0, -20)]
    assert table.keeps.tolist() == [True] + [False] * 50
    assert table.remembers.tolist() == [True, False] + [True] * 49
    assert not table.weights[1, 0] and table.weights[1, 2] == table.weights[1, 3]


def test_guidance_over_two_conditions_is_that_of_the_paper() -> None:
    full, text_less, none = (np.full((1, 2), value, np.float32) for value in (5.0, 3.0, 2.0))
    # InstructPix2Pix, equation 3: none + s_image (text_less - none) + s_text (full - text_less)
    expected = 2.0 + 1.5 * (3.0 - 2.0) + 7.5 * (5.0 - 3.0)
    np.testing.assert_allclose(guided([full, text_less, none], [7.5, 1.5]), expected)
    np.testing.assert_allclose(guided([full], []), 5.0)
