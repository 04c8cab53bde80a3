"""A small random GILL as a checkpoint in our layout, and what PyTorch and diffusers make of it by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from gguf_for_tests import random_opt
from PIL import Image
from tokenizers_to_test import gpt2_lists
from torch import Tensor
from torch.nn import functional

from mllm_edge.checkpoints.tokenizer_files import extend
from mllm_edge.models.blocks.unet import UNet, UNetDims
from mllm_edge.models.blocks.vae import VaeDecoder, VaeDims
from mllm_edge.models.blocks.vit import VitDims
from mllm_edge.models.gill.heads import MapperDims
from mllm_edge.models.gill.layouts import save_gill
from mllm_edge.models.gill.model import CLASS_TOKEN, LM, TOKENS, Gill, GillDims
from mllm_edge.models.gill.plan import preprocessing
from mllm_edge.models.language.opt import OptDims
from mllm_edge.runtime.preprocess import preprocess

LETTERS = 384
START = LETTERS + 1
DIMS = GillDims(
    VitDims(image_size=16, patch_size=8, width=32, layers=2, heads=4, mlp_width=48, tap=-1),
    OptDims(vocabulary=START + 8, width=64, ffn_width=96, layers=2, heads=4, context=160),
    MapperDims(width=32, layers=2, heads=4, mlp_width=48, queries=5, out_width=12),
    UNetDims(widths=(8, 16), layers=1, attends=(True, False), heads=(2, 2), text_width=12, groups=4, side=8),
    VaeDims(widths=(8, 16), layers=1, groups=4, side=16),
    rows=3,
    query_width=6,
)
MICRO = replace(  # whose graphs are made in seconds
    DIMS,
    language=replace(DIMS.language, context=64),
    vision=replace(DIMS.vision, layers=1),
    mapper=replace(DIMS.mapper, layers=1),
    unet=replace(DIMS.unet, widths=(8,), attends=(True,), heads=(2,)),
    vae=replace(DIMS.vae, widths=(8,), side=8),
)


def spread(module: torch.nn.Module, seed: int) -> None:
    """Weights so large that outputs differ."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * (0.05 if norm else 0.2) + float(norm))


@torch.no_grad()
def state(dims: GillDims = DIMS) -> dict[str, Tensor]:
    """Weights under our names; the first picture token lies along the mean of final states, so that it comes."""
    torch.manual_seed(0)
    gill, unet, vae = Gill(dims), UNet(dims.unet), VaeDecoder(dims.vae)
    for seed, module in enumerate((gill, unet, vae)):
        spread(module, seed)
    decoder: Any = random_opt(dims.language, seed=5)
    mean = decoder.model.decoder.final_layer_norm.bias.normal_(std=0.5)
    table = decoder.get_input_embeddings().weight
    table[dims.start] = mean * 1.7 / mean.square().sum()
    likelier = torch.linspace(2, 3, 7)[:, None]  # were they not barred; not equal, as of equals rounding chooses
    table[dims.start + 1 :] = likelier * table[dims.start]
    gill.language_model.load_state_dict(decoder.state_dict())
    found = {
        **gill.state_dict(),
        **{f"unet.{name}": tensor for name, tensor in unet.state_dict().items()},
        **{f"vae_decoder.{name}": tensor for name, tensor in vae.state_dict().items()},
        "empty_text": torch.randn(1, dims.mapper.queries, dims.mapper.out_width),
    }
    del found[f"{LM}lm_head.weight"]
    return found


def tokenizer(folder: Path) -> Path:
    """OPT's kind with the picture tokens, in `folder`."""
    lists = folder.with_name(f"{folder.name}-lists")
    lists.mkdir(parents=True)
    extend(gpt2_lists(lists), folder, [CLASS_TOKEN], TOKENS)
    return folder


def checkpoint(folder: Path, dims: GillDims = DIMS, weights: dict[str, Tensor] | None = None) -> Path:
    """The checkpoint, in `folder`."""
    texts = tokenizer(folder.with_name("texts"))
    save_gill(folder, "micro", dims, weights or state(dims), texts, torch.float32)
    return folder


class ByHand:
    """The same weights in PyTorch."""

    def __init__(self, weights: dict[str, Tensor], dims: GillDims = DIMS):
        self.dims, self.empty = dims, weights["empty_text"]
        self.gill, self.unet, self.vae = Gill(dims).eval(), UNet(dims.unet).eval(), VaeDecoder(dims.vae).eval()
        table = weights[f"{LM}model.decoder.embed_tokens.weight"]
        self.gill.load_state_dict(
            {n: table if n.endswith("lm_head.weight") else weights[n] for n in self.gill.state_dict()}
        )
        self.unet.load_state_dict({n: weights[f"unet.{n}"] for n in self.unet.state_dict()})
        self.vae.load_state_dict({n: weights[f"vae_decoder.{n}"] for n in self.vae.state_dict()})
        self.scale = float(weights["logit_scale"].exp())

    @property
    def lm(self) -> Any:
        return self.gill.language_model

    def embeds(self, ids: Sequence[int]) -> Tensor:
        return self.lm.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))

    @torch.no_grad()
    def seen(self, picture: Image.Image) -> tuple[Tensor, Tensor]:
        """Rows [1,R,D] of the prompt and the vector [1,d] that retrieval compares."""
        pixels = torch.from_numpy(preprocess(picture, preprocessing(self.dims)))
        rows, query = self.gill.connector(self.gill.vision_encoder(pixels))
        return rows, functional.normalize(query, dim=-1)

    @torch.no_grad()
    def answer(self, prompt: Sequence[Tensor], most: int, ends: Sequence[int] = ()) -> tuple[list[int], Tensor]:
        """Greedy tokens with whole groups, up to `</s>` or one of `ends` that is not the first token, and states [n,D]
        at the picture tokens. No cache: every step reads all."""
        read, first = torch.cat(list(prompt), 1), self.dims.start
        tokens: list[int] = []
        while len(tokens) < most:
            logits = self.lm(inputs_embeds=torch.cat([read, self.embeds(tokens)], 1)).logits[0, -1]
            logits[first + 1 : first + 8] = -torch.inf
            token = int(logits.argmax())
            group = list(range(first, first + 8)) if token == first else [token]
            if len(group) > 1 and len(tokens) + 8 > most:
                break
            tokens += group
            if token == 2 or (token in ends and len(tokens) > 1):
                break
        rows = torch.cat([read, self.embeds(tokens)], 1)
        hidden = self.lm(inputs_embeds=rows, output_hidden_states=True).hidden_states[-1][0, read.shape[1] :]
        return tokens, hidden[[place for place, token in enumerate(tokens) if token >= first]]

    @torch.no_grad()
    def heads(self, states: Tensor) -> tuple[Tensor, Tensor, list[float]]:
        """Of one group [8,D]: the diffusion model's text, a query of length 1, chances of retrieving and drawing."""
        table = self.lm.get_input_embeddings().weight[self.dims.start :]
        found = self.gill.heads(states[None], table[None])
        chances = found[2].softmax(-1)[0].tolist() if len(found) > 2 else []
        return found[0], functional.normalize(found[1], dim=-1)[0], chances

    @torch.no_grad()
    def drawn(self, text: Tensor, random: np.random.Generator, steps: int = 50, scale: float = 7.5) -> np.ndarray:
        """By diffusers' PNDM, branch after branch, uint8 [H,W,3]."""
        scheduler = diffusers.PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        )
        scheduler.set_timesteps(steps)
        side = self.dims.unet.side
        latent = torch.from_numpy(random.standard_normal((1, self.dims.unet.channels, side, side), np.float32))
        for timestep in scheduler.timesteps:
            with_text, without = (self.unet(latent, timestep.reshape(1).float(), one) for one in (text, self.empty))
            latent = scheduler.step(without + scale * (with_text - without), timestep, latent).prev_sample
        pixels = self.vae(latent / self.dims.vae.scale)[0]
        return ((pixels / 2 + 0.5) * 255).clamp(0, 255).round().byte().permute(1, 2, 0).numpy()


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    """In dB, of pictures of 0..255."""
    error = float(np.square(found.astype(float) - wanted.astype(float)).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))
