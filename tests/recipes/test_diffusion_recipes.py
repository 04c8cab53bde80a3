"""The recipes of the small text-to-image model: the autoencoder, the diffusion model, and the judge of its pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.unet import UNet
from mllm_edge.models.blocks.vae import VaeDecoder, VaeDims, VaeEncoder
from mllm_edge.models.text_to_image import BETAS, TINY_TEXT, TINY_UNET, TINY_VAE, TRAIN_STEPS, text_encoder
from mllm_edge.recipes import train
from mllm_edge.recipes.data.caption_tokens import byte_pairs, caption_ids, read_caption_tokenizer
from mllm_edge.recipes.data.small_scenes import small_pixels, small_scene
from mllm_edge.recipes.parts import read_part
from mllm_edge.recipes.recipe import load
from mllm_edge.recipes.tasks.diffusion import DiffusionTask, noised
from mllm_edge.recipes.tasks.scene_classifier import SceneClassifier, SceneClassifierTask, judged, recolored
from mllm_edge.recipes.tasks.vae import VaeTask, half_of, read_vae
from mllm_edge.runtime.diffusion.schedules import shares, table_of
from mllm_edge.scenes import COLOR_RGB, HELD_OUT_PAIRS, Background, Scene, SceneObject, sample_scene

SMALL = ["batch=2", "log_every=1", "precision=fp32", "warmup=0.0", "workers=0"]


def quiet(step: int, steps: int, metrics: dict[str, float]) -> None:
    pass


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each recipe, of a step or two."""
    folder = tmp_path_factory.mktemp("runs")
    train("vae-pretrain", [*SMALL, "steps=1", "evaluate=1", f"out={folder / 'vae'}"], False, quiet)
    train("scene-classifier", [*SMALL, "steps=1", "evaluate=4", f"out={folder / 'judge'}"], False, quiet)
    named = [f"init.vae={folder / 'vae'}", f"init.judge={folder / 'judge'}"]
    train("diffusion-pretrain", [*SMALL, *named, "steps=3", "evaluate=3", f"out={folder / 'drawn'}"], False, quiet)
    return folder


def diffusion(runs: Path) -> DiffusionTask:
    """The task of the run's folder, whose tokenizer it takes."""
    return DiffusionTask(
        load("diffusion-pretrain", [f"init.vae={runs / 'vae'}", "evaluate=0", f"out={runs / 'drawn'}"])
    )


def falls(task: VaeTask | DiffusionTask | SceneClassifierTask, rate: float, steps: int) -> tuple[float, float]:
    """The loss of one batch of two before and after training on it."""
    batch = task.collate([task.sample(index) for index in range(2)])
    optimizer = torch.optim.AdamW(task.parameters(), lr=rate)
    found = []
    for _ in range(steps):
        loss = task.model(**batch)["loss"]
        found.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found[0], found[-1]


def test_all_parts_fit_in_fifteen_megabytes() -> None:
    parts = [VaeEncoder(TINY_VAE), VaeDecoder(TINY_VAE), UNet(TINY_UNET), text_encoder(TINY_TEXT)]
    sizes = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert 2 * sum(sizes) < 15e6
    assert sizes[0] + sizes[1] < 1.6e6 and 3e6 < sizes[2] < 5.2e6
    latent = parts[0](torch.zeros(1, 3, 64, 64))
    assert latent.shape == (1, TINY_UNET.channels, TINY_UNET.side, TINY_UNET.side) == (1, 4, 16, 16)
    assert parts[1](latent).shape == (1, 3, 64, 64)


def test_small_scenes_have_one_to_three_objects_as_they_are_drawn() -> None:
    scenes = [small_scene("train", index, 0) for index in range(60)]
    counts = [len(scene.objects) for scene in scenes]
    assert set(counts) == {1, 2, 3}
    assert all(scene.objects == sample_scene("train", i).objects[: counts[i]] for i, scene in enumerate(scenes))
    assert all(len(small_scene("train", index, 0, objects=1).objects) == 1 for index in range(5))
    thing = SceneObject("red", "square", "large", 0.5, 0.5, 0.18, 0.0, (255, 0, 255))
    scene = Scene((thing,), Background("plain", (0, 0, 0), (0, 0, 0), 0.0, 0))
    pixels = small_pixels(scene, 64)
    assert pixels.dtype == np.float32 and pixels.shape == (3, 64, 64)
    assert pixels[:, 32, 32].tolist() == [1, -1, 1] and pixels[:, 0, 0].tolist() == [-1, -1, -1]


def test_noise_is_added_by_the_schedules_own_shares(runs: Path) -> None:
    left = shares(BETAS, TRAIN_STEPS)
    first = 1 - 0.00085
    second = 1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) / 999) ** 2
    np.testing.assert_allclose(left[:2], [first, first * second])
    # What a schedule takes for the picture at a timestep undoes it.
    table = table_of("ddim", BETAS, TRAIN_STEPS, 20)
    latent, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    steps = table.timesteps[[3, 15]].astype(int)
    mixed = noised(latent, noise, torch.from_numpy(left[steps]).float())
    a = left[steps[0]]
    torch.testing.assert_close(mixed[0], a**0.5 * latent[0] + (1 - a) ** 0.5 * noise[0])
    for one, row in enumerate(table.clean[[3, 15]]):
        torch.testing.assert_close(float(row[0]) * mixed[one] + float(row[1]) * noise[one], latent[one])


def test_the_loss_weighs_the_error_by_min_snr(runs: Path) -> None:
    task = diffusion(runs)
    batch = task.collate([task.sample(0)])
    left = shares(BETAS, TRAIN_STEPS)
    for step in (50, 900):
        batch["timestep"] = torch.tensor([step])
        with torch.no_grad():
            found = task.model(**batch)
        ratio = left[step] / (1 - left[step])
        assert float(found["loss"]) == pytest.approx(float(found["mse"]) * min(ratio, 5.0) / ratio, rel=1e-5)


def test_captions_are_tokenized_as_the_file_says(runs: Path) -> None:
    file = json.loads((runs / "drawn" / "tokenizer.json").read_text())
    ids = file["model"]["vocab"]
    assert len(ids) <= TINY_TEXT.vocabulary and ids["<|startoftext|>"] == 0 and ids["<|endoftext|>"] == 1
    tokenizer = read_caption_tokenizer(runs / "drawn" / "tokenizer.json")
    rows = caption_ids(tokenizer, ["A large red ring.", "", "remove the blue star"])
    words = [ids[f"{word}</w>"] for word in ("a", "large", "red", "ring", ".")]  # a token each
    assert rows.dtype == np.int64
    assert rows[0].tolist() == [0, *words] + [1] * (TINY_TEXT.length - 6)
    assert rows[1].tolist() == [0] + [1] * (TINY_TEXT.length - 1)
    pieces = {number: piece for piece, number in ids.items()}
    said = "".join(pieces[number] for number in rows[2].tolist() if number > 1)
    assert said == "remove</w>the</w>blue</w>star</w>"  # also a word that no caption has, in pieces
    task = diffusion(runs)
    texts = [task.caption(small_scene("train", index, 0), index) for index in range(400)]
    assert all(len(set(row[1:].tolist())) > 1 and row[-1] == 1 for row in caption_ids(tokenizer, texts))  # none is cut
    dropped = [index for index in range(200) if task.sample(index)["ids"].tolist() == rows[1].tolist()]
    assert 8 <= len(dropped) <= 35


def test_byte_pairs_are_merged_by_count_and_then_alphabet() -> None:
    tokens, merges = byte_pairs({"ring": 2, "sing": 2, "rag": 1}, 1000)
    # i+n and n+g are as frequent (4); then the letters' order decides again, between r and s.
    assert merges == [("i", "n"), ("in", "g</w>"), ("r", "ing</w>"), ("s", "ing</w>"), ("a", "g</w>"), ("r", "ag</w>")]
    assert tokens[:2] == ["<|startoftext|>", "<|endoftext|>"] and tokens[-6:] == ["".join(pair) for pair in merges]
    assert len(byte_pairs({"ring": 2}, len(tokens) - 6)[0]) == len(tokens) - 6


def test_timesteps_of_a_batch_lie_evenly(runs: Path) -> None:
    task = diffusion(runs)
    steps = np.array([int(task.sample(index)["timestep"]) for index in range(100, 132)])
    assert steps.min() >= 0 and steps.max() < TRAIN_STEPS
    assert np.histogram(steps, 8, (0, TRAIN_STEPS))[0].tolist() == pytest.approx([4] * 8, abs=1)


def test_each_loss_falls_on_one_batch(runs: Path) -> None:
    tasks: dict[str, VaeTask | DiffusionTask | SceneClassifierTask] = {
        "vae": VaeTask(load("vae-pretrain", [])),
        "judge": SceneClassifierTask(load("scene-classifier", [])),
        "diffusion": diffusion(runs),
    }
    for name, task in tasks.items():
        first, last = falls(task, 3e-3, 12)
        assert last < 0.9 * first, name


def test_parts_are_saved_under_public_names(runs: Path) -> None:
    dims, held = read_vae(str(runs / "vae"))
    assert isinstance(dims, VaeDims) and dims.widths == TINY_VAE.widths
    up, down = VaeDecoder(dims), VaeEncoder(dims)
    assert held.keys() == up.state_dict().keys() | down.state_dict().keys()
    down.load_state_dict(half_of(held, down))
    scenes = [small_pixels(sample_scene("validation", index), 64) for index in range(64)]
    with torch.no_grad():
        measured = float(down(torch.from_numpy(np.stack(scenes))).std())
    assert dims.scale == pytest.approx(1 / measured, rel=1e-2)  # the file is fp16
    UNet(TINY_UNET).load_state_dict(read_part(str(runs / "drawn"), "unet"))
    text_encoder(TINY_TEXT).load_state_dict(read_part(str(runs / "drawn"), "text_encoder"))
    on = load("diffusion-pretrain", [f"init.vae={runs / 'vae'}", f"init.diffusion={runs / 'drawn'}", "evaluate=0"])
    torch.testing.assert_close(
        DiffusionTask(on).model.unet.conv_in.weight, read_part(str(runs / "drawn"), "unet")["conv_in.weight"]
    )
    assert not Path(on.out).exists()  # the earlier run's tokenizer was taken
    on.data["text"] = False
    trained = {id(p) for group in DiffusionTask(on).parameters() for p in group["params"]}
    frozen = DiffusionTask(on).model
    assert not any(p.requires_grad for p in frozen.text_encoder.parameters())
    assert len(trained) == len(list(frozen.unet.parameters()))
    again = VaeTask(load("vae-pretrain", [f"init.vae={runs / 'vae'}"]))
    torch.testing.assert_close(again.model.up.state_dict()["post_quant_conv.bias"], held["post_quant_conv.bias"])


def test_an_autoencoder_begins_with_little_noise() -> None:
    task = VaeTask(load("vae-pretrain", []))
    with torch.no_grad():
        _, spread = task.model.down.distribution(task.collate([task.sample(0)])["pixel_values"])
    assert spread.mean() < -4


def test_drawn_pictures_are_judged(runs: Path) -> None:
    metrics = json.loads((runs / "drawn" / "report.json").read_text())["metrics"]
    assert metrics.keys() == {f"{a}_{b}" for a in ("one", "two", "held_out") for b in ("objects", "pictures")}
    task = diffusion(runs)
    one, again = task.pictures(["A red ring."]), task.pictures(["A red ring."])
    assert one.shape == (1, 3, 64, 64) and one.abs().max() <= 1
    torch.testing.assert_close(one, again)
    things = [
        SceneObject(color, "star", "large", x, 0.5, 0.15, 0.0, COLOR_RGB[color])
        for color, x in (("red", 0.2), ("blue", 0.8))
    ]
    scene = Scene(tuple(things), Background("plain", (60, 60, 60), (60, 60, 60), 0.0, 0))
    red, blue = ("red", "star"), ("blue", "star")
    assert judged([{red, blue}, {red}], [scene, scene], "two") == {"two_objects": 0.75, "two_pictures": 0.5}
    assert judged([{red, blue, ("red", "ring")}], [scene], "x") == {"x_objects": 1.0, "x_pictures": 0.0}


def test_the_judge_reads_one_pair_for_each_center() -> None:
    class Told(SceneClassifier):
        def read(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            color, shape, center = torch.zeros(1, 8, 64), torch.zeros(1, 6, 64), torch.full((1, 64), -1.0)
            for cell, (paint, form), height in ((9, (1, 0), 2.0), (10, (2, 3), 1.0), (60, (0, 5), 0.5)):
                color[0, paint, cell], shape[0, form, cell], center[0, cell] = 5, 5, height
            return color, shape, center

    # Cells 9 and 10 are neighbors: things stand so close.
    assert Told().pairs(torch.zeros(1, 3, 64, 64)) == [{("green", "circle"), ("blue", "star"), ("red", "ring")}]
    scenes = [recolored(sample_scene("train", index), np.random.default_rng(index)) for index in range(40)]
    assert {thing.pair for scene in scenes for thing in scene.objects} & set(HELD_OUT_PAIRS)


def test_diffusion_resumes_to_the_same_losses(runs: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(step: int, steps: int, metrics: dict[str, float]) -> None:
        if step == 2:
            raise Killed

    named = [f"init.vae={runs / 'vae'}", f"init.judge={runs / 'judge'}"]
    settings = [*SMALL, *named, "steps=3", "evaluate=0", "init.judge=", "save_every=1", f"out={tmp_path / 'parts'}"]
    with pytest.raises(Killed):
        train("diffusion-pretrain", settings, False, kill)
    train("diffusion-pretrain", settings, True, quiet)
    assert losses(tmp_path / "parts") == pytest.approx(losses(runs / "drawn"), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("diffusion-pretrain", ["init.vae="], "names no vae"),
        ("diffusion-pretrain", ["init.vae=VAE", "init.judge="], "names no judge.*evaluate=0"),
        ("diffusion-pretrain", ["init.vae=nowhere", "evaluate=0"], "nowhere.*is missing"),
        ("diffusion-pretrain", ["init.vae=VAE", "evaluate=0", "init.diffusion=nowhere"], "nowhere.*is missing"),
        ("diffusion-pretrain", ["init.vae=VAE", "evaluate=0", "init.vision_encoder=x"], "changes nothing here"),
        ("diffusion-pretrain", ["config=large", "init.vae=VAE"], "unknown config 'large'"),
        ("vae-pretrain", ["config=large"], "unknown config 'large'"),
        ("vae-pretrain", ["data.wide=0.5"], "data.wide changes nothing here"),
        ("scene-classifier", ["config=large"], "no classifier of config large"),
    ],
)
def test_mistakes_are_named(runs: Path, tmp_path: Path, name: str, settings: list[str], message: str) -> None:
    settings = [setting.replace("VAE", str(runs / "vae")) for setting in settings]
    with pytest.raises(BadInput, match=message):
        train(name, [*settings, f"out={tmp_path / 'run'}"], False, quiet)
