"""Recipe task `vae`: trains the small autoencoder of latent diffusion on drawn scenes.

As latent diffusion's (Rombach et al. 2022, section 3.1, with a KL term), but with differences of neighbors in place of
perceptual and adversarial losses: drawings have edges and flat colors, no textures that those would be for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mllm_edge.errors import BadInput, look_up
from mllm_edge.models.blocks.vae import VaeDecoder, VaeDims, VaeEncoder
from mllm_edge.models.text_to_image import TINY_VAE
from mllm_edge.recipes.data.small_scenes import small_pixels
from mllm_edge.recipes.modules import decaying
from mllm_edge.recipes.parts import part_dims, read_part, save_part
from mllm_edge.recipes.recipe import Recipe
from mllm_edge.scenes import sample_scene

CONFIGS = {"tiny": TINY_VAE}
KL = 1e-6  # weight of a latent's KL against a pixel's error, each summed over a picture, as in latent diffusion
START = -6.0  # logarithm of the latents' variance before training
MEASURED = 64  # scenes that the latents' deviation is measured on

Sample = dict[str, np.ndarray[Any, Any]]


class Autoencoder(nn.Module):
    """Both halves with their loss."""

    def __init__(self, dims: VaeDims):
        super().__init__()
        self.down, self.up = VaeEncoder(dims), VaeDecoder(dims)
        with torch.no_grad():
            # Noise as large as the latents themselves, which random weights give, hides them for thousands of steps.
            self.down.quant_conv.get_parameter("bias")[dims.latent_channels :] = START

    def forward(self, pixel_values: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """`pixel_values` float32 [B,3,S,S] in -1..1, `noise` float32 [B,C,h,w] that the latent is drawn by."""
        mean, spread = (half.float() for half in self.down.distribution(pixel_values))
        seen = self.up(mean + (spread / 2).exp() * noise).float()
        away = (seen - pixel_values).abs().mean()
        edges = sum((seen.diff(dim=side) - pixel_values.diff(dim=side)).abs().mean() for side in (2, 3))
        kl = (mean.square() + spread.exp() - 1 - spread).mean() / 2
        loss = away + edges + KL * kl * (mean.numel() / pixel_values.numel())
        return {"loss": loss, "l1": away, "kl": kl}


def read_vae(folder: str) -> tuple[VaeDims, dict[str, Tensor]]:
    """The dims of a trained autoencoder, with its measured scale, and its tensors in fp32.

    Raises:
        BadInput: it has not been trained, or its file is damaged.
    """
    dims = part_dims(folder, "vae")
    return VaeDims(**{**dims, "widths": tuple(dims["widths"])}), read_part(folder, "vae")


def half_of(tensors: dict[str, Tensor], half: nn.Module) -> dict[str, Tensor]:
    """Of an autoencoder's tensors those that a half has. Raises BadInput where one is missing or of another shape."""
    for name, tensor in half.state_dict().items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise BadInput(f"{name} of init.vae is not that of this config; give an autoencoder of its size")
    return {name: tensors[name] for name in half.state_dict()}


class VaeTask:
    """Train the autoencoder of `recipe.config`; `init.vae` names a run to go on from."""

    def __init__(self, recipe: Recipe):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.dims = look_up("config", recipe.config, CONFIGS)
        self.model = Autoencoder(self.dims)
        if recipe.init.get("vae"):
            _, held = read_vae(recipe.init["vae"])
            for half in (self.model.down, self.model.up):
                half.load_state_dict(half_of(held, half))

    def parameters(self) -> list[dict[str, Any]]:
        return decaying(self.model.parameters())

    def sample(self, index: int, split: str = "train") -> Sample:
        side = self.dims.side // self.dims.shrinks
        rng = np.random.default_rng([self.recipe.seed, 62, index])
        return {
            "pixel_values": small_pixels(sample_scene(split, index, self.recipe.seed), self.dims.side),
            "noise": rng.standard_normal((self.dims.latent_channels, side, side), np.float32),
        }

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}

    @torch.no_grad()
    def evaluate(self, samples: int) -> dict[str, float]:
        """PSNR in dB, mean over pictures, of scenes of the validation and held-out splits; deviation of the latents."""
        device = next(self.model.parameters()).device
        metrics: dict[str, float] = {}
        for split in ("validation", "held_out"):
            found = []
            for index in range(samples):
                pixels = self.collate([self.sample(index, split)])["pixel_values"].to(device)
                error = float((self.model.up(self.model.down(pixels)).clamp(-1, 1) - pixels).square().mean())
                found.append(10 * math.log10(4 / max(error, 1e-12)))  # from -1 to 1
            metrics[f"{split}_psnr"] = round(sum(found) / len(found), 2)
        return {**metrics, "latent_std": round(self._deviation(), 4)}

    def _deviation(self) -> float:
        pixels = self.collate([self.sample(index, "validation") for index in range(MEASURED)])["pixel_values"]
        with torch.no_grad():
            return float(self.model.down(pixels.to(next(self.model.parameters()).device)).std())

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """One part under diffusers' names; `scale` in its dims makes the latents' deviation 1."""
        dims = replace(self.dims, scale=round(1 / self._deviation(), 5))
        joined = {name.split(".", 1)[1]: tensor for name, tensor in state.items()}
        save_part(folder, "vae", asdict(dims), joined, "", self.recipe.dtype)
