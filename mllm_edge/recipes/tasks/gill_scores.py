"""What a trained GILL is worth on scenes that it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mllm_edge.models.blocks.unet import UNet
from mllm_edge.models.blocks.vae import VaeDecoder
from mllm_edge.models.gill.prompts import CAPTION
from mllm_edge.recipes.contrast import recall
from mllm_edge.recipes.data.gill_batches import Batches, Sample
from mllm_edge.recipes.data.gill_scenes import few_things, named, told, told_apart
from mllm_edge.recipes.data.gill_words import BOS, ROW
from mllm_edge.recipes.tasks.diffusion import GUIDANCE, STEPS, drawn_latents
from mllm_edge.recipes.tasks.gill_language import at_rows, continued, said_loss
from mllm_edge.recipes.tasks.gill_model import GillModel, mean_distance
from mllm_edge.recipes.tasks.scene_classifier import SceneClassifier, judged
from mllm_edge.scenes import Scene

MOST = 500  # pictures among which one is looked for
DESCRIBED = 5  # of so many pictures one is described
DRAWN = 10  # and of so many captions one is drawn
AT_ONCE = 50


@dataclass(frozen=True)
class Artist:
    """Draws from latents of a shape and a scale, and has the pictures judged."""

    shape: tuple[int, int, int]
    unet: UNet
    decoder: VaeDecoder
    scale: float
    judge: SceneClassifier | None


def scores(model: GillModel, batches: Batches, artist: Artist, seed: int, samples: int) -> dict[str, float]:
    """On scenes of the test split, up to 500 of one to four things whose captions differ and say everything: R@1 both
    ways; of a fifth the loss per token of a caption behind the picture, and the share of the likeliest ones that name
    exactly what is there. On a tenth as many captions of one to three things: the distance of what the mapper gives
    from the text encoder's output, and how far that of no text is away; with a judge what is found in pictures drawn
    by either (`judged`)."""
    many = min(samples, MOST)
    return {
        **_found(model, batches, seed, many),
        **_described(model, batches, seed, -(-many // DESCRIBED)),
        **_drawn(model, batches, artist, seed, -(-many // DRAWN)),
    }


@torch.no_grad()
def empty_text(model: GillModel, batches: Batches) -> Tensor:
    """What the diffusion model reads for no text, float32 [1,L,D]."""
    rows: Tensor = model.text_encoder(batches.empty().to(model.rows.device)).last_hidden_state
    return rows


def _batch(model: GillModel, batches: Batches, samples: Sequence[Sample]) -> dict[str, Tensor]:
    return {name: tensor.to(model.rows.device) for name, tensor in batches.batch(samples).items()}


def _told(model: GillModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """See `GillModel.told`, of captions without their pictures."""
    ids = batch["retrieval"]
    return model.told(model.states(model.table(), ids, model.rows[:0]), ids)


@torch.no_grad()
def _found(model: GillModel, batches: Batches, seed: int, many: int) -> dict[str, float]:
    pairs = told_apart("test", many, seed)
    texts, images = [], []
    for first in range(0, many, AT_ONCE):
        shown = [batches.seen(scene, text, text) for scene, text in pairs[first : first + AT_ONCE]]
        batch = _batch(model, batches, shown)
        texts.append(_told(model, batch)[1])
        images.append(model.connector(model.vision_encoder(batch["pixel_values"]))[1])
    return recall(torch.cat(texts), torch.cat(images))


@torch.no_grad()
def _described(model: GillModel, batches: Batches, seed: int, many: int) -> dict[str, float]:
    table, dims, words = model.table(), batches.dims, batches.words
    losses, exact = [], []
    for index, (scene, _) in enumerate(told_apart("test", many, seed)):
        text = told(scene, index, seed)
        batch = _batch(model, batches, [batches.seen(scene, text, text)])
        visual, _ = model.connector(model.vision_encoder(batch["pixel_values"]))
        states = model.states(table, batch["captioning"], visual[0])
        losses.append(float(said_loss(states, batch["captioning_labels"], table)[0]))
        ids = torch.tensor([[ROW] * dims.rows + [BOS, *words.ids(CAPTION)]], device=table.device)
        found = continued(model.language_model, at_rows(table, ids, visual[0]), dims.start)[0]
        exact.append(sorted(named(words.text(found))) == sorted(thing.pair for thing in scene.objects))
    return {"caption_loss": round(float(np.mean(losses)), 4), "exact_names": round(float(np.mean(exact)), 4)}


@torch.no_grad()
def _drawn(model: GillModel, batches: Batches, artist: Artist, seed: int, many: int) -> dict[str, float]:
    scenes = [few_things("test", index, seed) for index in range(many)]
    texts = [told(scene, index, seed) for index, scene in enumerate(scenes)]
    batch = _batch(model, batches, [batches.seen(scene, text, text) for scene, text in zip(scenes, texts)])
    mapped, _ = _told(model, batch)
    wanted, empty = model.text_encoder(batch["text"]).last_hidden_state, empty_text(model, batches)
    metrics = {
        "distance": round(float(mean_distance(mapped, wanted)), 4),
        "distance_of_none": round(float(mean_distance(empty, wanted)), 4),
    }
    for name, text in (("drawn", mapped), ("drawn_by_text_encoder", wanted)):
        metrics |= _judged(artist, scenes, text.float().cpu(), empty.cpu(), seed, name)
    return metrics


def _judged(
    artist: Artist, scenes: Sequence[Scene], text: Tensor, empty: Tensor, seed: int, name: str
) -> dict[str, float]:
    """Pictures drawn on the CPU, and what the judge finds in them; nothing without one."""
    if artist.judge is None:
        return {}
    noise = torch.from_numpy(np.random.default_rng([seed, 90]).standard_normal((len(text), *artist.shape), np.float32))
    pixels = artist.decoder(drawn_latents(artist.unet, text, empty, noise, STEPS, GUIDANCE) / artist.scale).clamp(-1, 1)
    return judged(artist.judge.pairs(pixels), scenes, name)
