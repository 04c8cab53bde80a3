"""A toy system that draws: eight forced tokens, their own states, a denoiser with guidance in one batch, four steps of
DDIM.

Expectations come from transformers' decoder, diffusers' scheduler and a loop in PyTorch.
"""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import toy_marks
from PIL import Image
from torch import Tensor, nn
from toy_marks import WIDTH, first_mark, marked
from toys import noise_picture, register, seeded

import mllm_edge
from mllm_edge import cli
from mllm_edge.bundle.answers import PicturesAnswer
from mllm_edge.bundle.manifest import TensorSpec
from mllm_edge.bundle.read import read_manifest
from mllm_edge.errors import BadInput
from mllm_edge.export.export import export
from mllm_edge.models.plan import Checkpoint, ExportPlan, StageExport
from mllm_edge.runtime.turn import Drawing

CHANNELS, SIDE, STEPS, SCALE, CONDITION = 4, 8, 4, 7.5, 6
BETAS, TRAINED, LATENT_SCALE = (0.00085, 0.012), 1000, 0.18215
LATENT = TensorSpec("latent", "float32", ["branches", CHANNELS, SIDE, SIDE])
DECODED = TensorSpec("decoded", "float32", [1, CHANNELS, SIDE, SIDE])


class Mapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(WIDTH, CONDITION)

    def forward(self, marks: Tensor) -> Tensor:
        return self.line(marks)[None].tanh()  # [8,W] -> [1,8,C]


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.words = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.Linear(CONDITION, CHANNELS)

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        told = self.words(text.mean(1))[..., None, None]  # [1,4,1,1]
        return torch.tanh(self.conv(latent) + told + timestep[:, None, None, None] / TRAINED)


class Painter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(CHANNELS, 3, 2, 2)

    def forward(self, decoded: Tensor) -> Tensor:
        return torch.tanh(0.2 * self.up(decoded))  # [1,3,16,16]


MAPPER, DENOISER, PAINTER = seeded(Mapper, 21), seeded(Denoiser, 22), seeded(Painter, 23)
EMPTY = np.random.default_rng(24).standard_normal((1, 8, CONDITION)).astype(np.float32)


def plan(checkpoint: Checkpoint) -> ExportPlan:
    text = TensorSpec("text", "float32", [1, 8, CONDITION])
    stages = [
        StageExport("mapper", MAPPER, [TensorSpec("marks", "float32", [8, WIDTH])], [text], ("fp32",)),
        StageExport(
            "denoiser",
            DENOISER,
            [LATENT, TensorSpec("timestep", "float32", [1]), TensorSpec("text", "float32", ["branches", 8, CONDITION])],
            [TensorSpec("noise", "float32", LATENT.shape)],
        ),
        StageExport(
            "painter",
            PAINTER,
            [DECODED],
            [TensorSpec("pixels", "float32", [1, 3, 2 * SIDE, 2 * SIDE])],
        ),
    ]
    entry = PicturesAnswer(
        states="marks",
        unet="denoiser",
        vae="painter",
        latent="latent",
        timestep="timestep",
        noise="noise",
        decoded="decoded",
        pixels="pixels",
        latent_scale=LATENT_SCALE,
        shape=DECODED.shape,  # type: ignore[arg-type]
        betas=list(BETAS),
        train_steps=TRAINED,
        drops=[["text", "empty_text"]],
        guidance=[SCALE],
        schedule="ddim",
        steps=STEPS,
    )
    random = np.random.default_rng(25)
    latent = random.standard_normal(DECODED.shape).astype(np.float32)  # type: ignore[arg-type]
    examples = {"latent": latent, "decoded": latent, "timestep": np.array([401.0], np.float32)}
    return toy_marks.plan(
        checkpoint, stages=stages, answers=[entry], constants={"empty_text": lambda: EMPTY}, examples=examples
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return marked(tmp_path_factory.mktemp("marked"))


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        register(patch, toy_marks.dims(folder), plan)
        return export("toy", str(folder), quant="f32", out=tmp_path_factory.mktemp("pictures") / "toy.bundle")


@torch.no_grad()
def painted(states: Tensor, seed: int, steps: int = STEPS, scale: float = SCALE) -> list[np.ndarray]:
    """The picture of each eight states by diffusers' scheduler, uint8 [16,16,3], from one stream of noise."""
    random = np.random.default_rng(seed)
    return [_painted(group, random, steps, scale) for group in states.split(8)]


def _painted(states: Tensor, random: np.random.Generator, steps: int, scale: float) -> np.ndarray:
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=TRAINED,
        beta_start=BETAS[0],
        beta_end=BETAS[1],
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(steps)
    text, denoiser = MAPPER()(states), DENOISER()
    latent = torch.from_numpy(random.standard_normal(DECODED.shape, np.float32))
    for timestep in scheduler.timesteps:
        with_text, without = (
            denoiser(latent, timestep.reshape(1).float(), one) for one in (text, torch.from_numpy(EMPTY))
        )
        latent = scheduler.step(without + scale * (with_text - without), timestep, latent).prev_sample
    pixels = PAINTER()(latent / LATENT_SCALE)[0]
    return ((pixels / 2 + 0.5) * 255).clamp(0, 255).round().byte().permute(1, 2, 0).numpy()


def test_every_row_of_parity_passes(bundle: Path) -> None:
    rows = {row.name: row for row in read_manifest(bundle).parity}
    assert {"mapper", "denoiser", "painter", "language_model", "end_to_end", "pictures"} <= set(rows)
    assert all(row.passed for row in rows.values())
    assert rows["pictures"].measured["pictures"] > 0
    assert rows["pictures"].measured["mean_levels"] < 0.1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_picture_is_that_of_transformers_and_diffusers(bundle: Path, folder: Path, seed: int) -> None:
    picture = noise_picture(seed)
    tokens, states = toy_marks.answer(folder, "draw a dog", picture, 40)
    assert len(states) == (16 if seed == 1 else 8), "the toy must draw here"
    with mllm_edge.load(bundle, threads=1, kv_type="f32") as model:
        answer = model.generate("draw a dog", picture, drawing=Drawing(seed=seed))
        assert answer.tokens.ids == tokens
        few = model.generate("draw a dog", picture, drawing=Drawing(seed=seed, steps=2, guidance=[1.5]))
    assert equal([part.image for part in answer.images], painted(states, seed))
    assert equal([part.image for part in few.images], painted(states, seed, 2, 1.5))
    places = [part.span for part in answer.images]
    assert places == sorted(places) and places[-1][1] <= len(answer.text)
    assert answer.images[0].to_json() == {
        "span": list(places[0]),
        "label": "draw a dog",
        "origin": "generated",
        "width": 16,
        "height": 16,
    }


def equal(found: list[Image.Image], wanted: list[np.ndarray]) -> bool:
    """Within one level of 255, which rounding may turn."""
    pairs = zip(found, wanted, strict=True)
    return all(np.abs(np.asarray(a, int) - b.astype(int)).max() <= 1 for a, b in pairs)


def test_marks_come_in_whole_groups_and_never_alone(bundle: Path, folder: Path) -> None:
    start = first_mark(folder)
    with mllm_edge.load(bundle, threads=1) as model:
        whole = model.generate("draw a dog", noise_picture(0))
        place = whole.tokens.ids.index(start)
        assert whole.tokens.ids[place : place + 8] == list(range(start, start + 8))
        cut = model.generate("draw a dog", noise_picture(0), max_tokens=place + 7)  # no room for the group
        assert cut.tokens.ids == whole.tokens.ids[:place]
        assert cut.images == []


def test_teacher_forcing_draws_what_was_asked(bundle: Path, folder: Path) -> None:
    tokens, states = toy_marks.answer(folder, "draw a dog", noise_picture(1), 40)
    with mllm_edge.load(bundle, threads=1, kv_type="f32") as model:
        answer = model.generate("draw a dog", noise_picture(1), teacher_forced=tokens, drawing=Drawing(seed=5))
    assert equal([part.image for part in answer.images], painted(states, 5))


def test_run_writes_the_picture(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(noise_picture(0)).save(tmp_path / "noise.png")
    words = ["run", str(bundle), "draw a dog", "--image", str(tmp_path / "noise.png"), "-o", str(tmp_path / "out")]
    assert cli.main([*words, "--threads", "1", "--draw-seed", "3"]) == 0
    assert "image_0.png" in capsys.readouterr().err
    assert Image.open(tmp_path / "out" / "image_0.png").size == (16, 16)


def test_progress_and_previews_come_while_it_is_drawn(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(noise_picture(0)).save(tmp_path / "noise.png")
    out = tmp_path / "out"
    words = ["run", str(bundle), "draw a dog", "--image", str(tmp_path / "noise.png"), "--threads", "1"]
    assert cli.main([*words, "-o", str(out), "--schedule", "dpm_solver", "--preview-every", "1", "--json"]) == 0
    told = capsys.readouterr()
    assert "[1/1] drawing picture 1 ..." in told.err
    assert json.loads(told.out)["images"][0]["origin"] == "generated"
    assert sorted(file.name for file in out.iterdir()) == [".mllm-edge-answer", "image_0.png"]
    assert cli.main([*words, "--preview-every", "2"]) == 2
    assert "--preview-every has no place to write to; give --out too" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--steps", "0"], "0 steps draw nothing; give 1 to 1000"),
        (["--steps", "1000000000"], "1000000000 steps draw nothing; give 1 to 1000"),
        (["--steps", "1000"], "this schedule cannot take 1000 steps of 1000; give fewer"),
        (["--draw-seed", "18446744073709551616"], "the seed 18446744073709551616 is outside 64 bits; give 0 to"),
        (["--draw-seed=-1"], "the seed -1 is outside 64 bits"),
        (["--guidance", "nan"], "are not all numbers"),
        (["--schedule", "heun"], "unknown schedule 'heun'; use one of ddim, pndm, euler"),
        (["--preview-every", "0", "-o", "out"], "there is no preview every 0 steps; give 1 or more"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_the_text(
    option: list[str],
    message: str,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", str(bundle), "draw a dog", "--threads", "1", "--stream", *option]) == 2
    told = capsys.readouterr()
    assert told.out == "" and message in told.err


def test_a_missing_stage_and_a_wrong_scale_are_named(bundle: Path) -> None:
    with (
        mllm_edge.load(bundle, threads=1) as model,
        pytest.raises(BadInput, match=r"2 guidance scale.s. for 1 condition"),
    ):
        model.generate("draw a dog", noise_picture(0), drawing=Drawing(guidance=[1.0, 2.0]))
    manifest = (bundle / "bundle.json").read_text()
    (bundle / "bundle.json").write_text(manifest.replace('"unet": "denoiser"', '"unet": "cleaner"'))
    try:
        with pytest.raises(BadInput, match="no stage 'cleaner'; it has seer, mapper, denoiser, painter"):
            read_manifest(bundle)
    finally:
        (bundle / "bundle.json").write_text(manifest)


def test_beams_on_an_engine_that_has_none_are_refused(bundle: Path) -> None:
    with mllm_edge.load(bundle, threads=1) as model, pytest.raises(BadInput, match=r"beams is 3, and .* one sequence"):
        model.generate("draw a dog", noise_picture(0), beams=3)
