"""Recipe task `diffusion`: trains the small text-to-image model in the latents of a frozen autoencoder.

Stable Diffusion's training (Rombach et al. 2022) at small dims, but the text encoder is trained along: there is none
that knows captions of scenes. The weights are not averaged over time, since the learning rate falls to zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mllm_edge.errors import BadInput, look_up
from mllm_edge.models.blocks.unet import UNet, UNetDims
from mllm_edge.models.blocks.vae import VaeDecoder, VaeDims, VaeEncoder
from mllm_edge.models.text_to_image import BETAS, TINY_TEXT, TINY_UNET, TRAIN_STEPS, TextDims, text_encoder
from mllm_edge.recipes.data.caption_tokens import (
    TOKENIZER,
    caption_ids,
    read_caption_tokenizer,
    train_caption_tokenizer,
)
from mllm_edge.recipes.data.small_scenes import small_pixels, small_scene
from mllm_edge.recipes.modules import decaying
from mllm_edge.recipes.parts import part_folder, read_part, save_part
from mllm_edge.recipes.recipe import Recipe
from mllm_edge.recipes.tasks.scene_classifier import judged, read_classifier
from mllm_edge.recipes.tasks.vae import half_of, read_vae
from mllm_edge.runtime.diffusion.guidance import guided
from mllm_edge.runtime.diffusion.schedules import run, shares, table_of
from mllm_edge.scenes import Scene, caption

CONFIGS = {"tiny": (TINY_UNET, TINY_TEXT)}
DROPPED = 0.1  # share of captions that are left out, for guidance (Ho & Salimans 2022)
MOST_SNR = 5.0  # min-SNR weighting (Hang et al. 2023, arXiv 2303.09556, section 3.4)
TURN = (5**0.5 - 1) / 2  # its multiples lie evenly in 0..1, and so do the timesteps of every batch
CORPUS = 1500  # captions that the tokenizer learns from
STEPS, GUIDANCE = 20, 5.0  # of the pictures that are judged

Sample = dict[str, np.ndarray[Any, Any]]


def noised(latent: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    """Latents [B,C,h,w] with noise of which `share` [B] of their variance is left (Ho et al. 2020, equation 4)."""
    kept = share[:, None, None, None]
    return kept.sqrt() * latent + (1 - kept).sqrt() * noise


class DiffusionModel(nn.Module):
    """The UNet and its text encoder behind a frozen autoencoder, with the loss of the predicted noise."""

    left: Tensor

    def __init__(self, vae: VaeDims, unet: UNetDims, text: TextDims):
        super().__init__()
        self.scale = vae.scale
        self.vae_encoder = VaeEncoder(vae).requires_grad_(False)
        self.unet, self.text_encoder = UNet(unet), text_encoder(text)
        left = torch.from_numpy(shares(BETAS, TRAIN_STEPS)).float()
        self.register_buffer("left", left, persistent=False)

    def forward(self, pixel_values: Tensor, ids: Tensor, noise: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """`pixel_values` float32 [B,3,S,S] in -1..1, `ids` int64 [B,L], `noise` float32 [B,C,h,w], `timestep` int64
        [B]. `mse` is the error without weights."""
        with torch.no_grad():
            latent = self.vae_encoder(pixel_values).float() * self.scale
        share = self.left[timestep]  # [B]
        seen = self.unet(noised(latent, noise, share), timestep.float(), self.text(ids)).float()
        away = (seen - noise).square().mean(dim=(1, 2, 3))  # [B]
        ratio = share / (1 - share)  # of picture to noise
        return {"loss": (away * (MOST_SNR / ratio).clamp(max=1)).mean(), "mse": away.mean()}

    def text(self, ids: Tensor) -> Tensor:
        """int64 [B,L] -> float32 [B,L,D]."""
        rows: Tensor = self.text_encoder(ids).last_hidden_state
        return rows


@torch.no_grad()
def drawn_latents(unet: UNet, text: Tensor, empty: Tensor, noise: Tensor, steps: int, guidance: float) -> Tensor:
    """Latents [n,C,h,w] for what texts are to the UNet, [n,L,D], from noise [n,C,h,w], by DPM-Solver++; `empty` [1,L,D]
    is no text."""
    device = text.device
    rows = torch.cat([text, empty.expand_as(text)])  # [2n,L,D]

    def predict(latent: np.ndarray[Any, Any], timestep: float) -> np.ndarray[Any, Any]:
        both = torch.from_numpy(np.concatenate([latent, latent])).to(device)
        found = unet(both, torch.tensor([timestep], device=device), rows).float().cpu().numpy()
        return guided(np.split(found, 2), [guidance])

    table = table_of("dpm_solver", BETAS, TRAIN_STEPS, steps)  # which draws no fresh noise
    *_, (latent, _) = run(table, noise.numpy(), predict, lambda: np.zeros_like(noise))
    return torch.from_numpy(latent).to(device)


class DiffusionTask:
    """Train the model of `recipe.config`; `init` names the runs of the autoencoder (`vae`), of the classifier that
    judges (`judge`, where `evaluate` is not 0), and of a diffusion model to go on from (`diffusion`), whose text
    encoder `data.text=false` leaves alone: what was trained to speak for it, a GILL's mapper, stays right."""

    def __init__(self, recipe: Recipe):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.dims, self.text = look_up("config", recipe.config, CONFIGS)
        if not recipe.init.get("vae"):
            raise BadInput("the recipe's init names no vae; add init.vae=FOLDER")
        judge = recipe.init.get("judge")
        if recipe.evaluate and not judge:
            raise BadInput("the recipe's init names no judge; add init.judge=FOLDER, or evaluate=0")
        self.vae, held = read_vae(recipe.init["vae"])
        self.model = DiffusionModel(self.vae, self.dims, self.text)
        self.model.vae_encoder.load_state_dict(half_of(held, self.model.vae_encoder))
        self.decoder = VaeDecoder(self.vae)
        self.decoder.load_state_dict(half_of(held, self.decoder))
        # After the model, whose first weights must not depend on it.
        self.judge = read_classifier(judge) if recipe.evaluate and judge else None
        tokenizer = Path(recipe.out) / TOKENIZER
        if earlier := recipe.init.get("diffusion"):
            self._go_on(earlier)
            self.model.text_encoder.requires_grad_(bool(recipe.data.get("text", True)))
            tokenizer = part_folder(earlier) / TOKENIZER
        elif not tokenizer.is_file():
            tokenizer.parent.mkdir(parents=True, exist_ok=True)
            texts = (self.caption(small_scene("train", i, recipe.seed), i) for i in range(CORPUS))
            train_caption_tokenizer(tokenizer, self.text.vocabulary, self.text.length, texts)
        self.tokenizer = read_caption_tokenizer(tokenizer)

    def _go_on(self, folder: str) -> None:
        for part in ("unet", "text_encoder"):
            try:
                getattr(self.model, part).load_state_dict(read_part(folder, part))
            except RuntimeError:
                raise BadInput(f"init.diffusion has another {part}; give one of config {self.recipe.config}") from None

    def caption(self, scene: Scene, index: int) -> str:
        """The scene in words."""
        return caption(scene, np.random.default_rng([self.recipe.seed, 64, index]))

    def parameters(self) -> list[dict[str, Any]]:
        return decaying(self.model.parameters())

    def sample(self, index: int) -> Sample:
        scene = small_scene("train", index, self.recipe.seed)
        rng = np.random.default_rng([self.recipe.seed, 65, index])
        text = "" if rng.random() < DROPPED else self.caption(scene, index)
        return {
            "pixel_values": small_pixels(scene, self.vae.side),
            "ids": caption_ids(self.tokenizer, [text])[0],
            "noise": self._noise(rng),
            "timestep": np.array(int(index * TURN % 1 * TRAIN_STEPS)),
        }

    def _noise(self, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float32]]:
        return rng.standard_normal((self.dims.out_channels, self.dims.side, self.dims.side), np.float32)

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}

    def evaluate(self, samples: int) -> dict[str, float]:
        """Pictures drawn for captions of the test split with one and with two objects, and for one object of a pair
        that is held out, a third of `samples` each: what the classifier finds in them (`judged`)."""
        if self.judge is None:
            return {}
        metrics: dict[str, float] = {}
        for name, split, objects in (("one", "test", 1), ("two", "test", 2), ("held_out", "held_out", 1)):
            scenes = self._asked(split, objects, -(-samples // 3))
            texts = [self.caption(scene, index) for index, scene in enumerate(scenes)]
            metrics |= judged(self.judge.pairs(self.pictures(texts)), scenes, name)
        return metrics

    def _asked(self, split: str, objects: int, many: int) -> list[Scene]:
        """Scenes of that number of objects; those held out with a pair that is."""
        found: list[Scene] = []
        index = 0
        while len(found) < many:
            scene = small_scene(split, index, self.recipe.seed, objects)
            if len(scene.objects) == objects and scene.shows_held_out_pair == (split == "held_out"):
                found.append(scene)
            index += 1
        return found

    @torch.no_grad()
    def pictures(self, texts: Sequence[str]) -> Tensor:
        """Pictures drawn for texts, on the CPU: float32 [n,3,S,S], -1..1."""
        noise = np.stack([self._noise(np.random.default_rng([self.recipe.seed, 66, i])) for i in range(len(texts))])
        ids, empty = (torch.from_numpy(caption_ids(self.tokenizer, rows)) for rows in (texts, [""]))
        device = self.model.left.device
        text, none = self.model.text(ids.to(device)), self.model.text(empty.to(device))
        latent = drawn_latents(self.model.unet, text, none, torch.from_numpy(noise), STEPS, GUIDANCE)
        pixels: Tensor = self.decoder(latent.cpu() / self.vae.scale).clamp(-1, 1)
        return pixels

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """The UNet and the text encoder under diffusers' and transformers' names, and the tokenizer."""
        save_part(folder, "unet", asdict(self.dims), state, "unet.", self.recipe.dtype)
        save_part(folder, "text_encoder", asdict(self.text), state, "text_encoder.", self.recipe.dtype)
        self.tokenizer.save(str(folder / TOKENIZER))
