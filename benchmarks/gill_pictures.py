"""Pictures of a GILL's bundles beside PyTorch's and diffusers' from the same weights and noise, and its schedules.

    python benchmarks/gill_pictures.py CHECKPOINT BUNDLE [BUNDLE ...] [--cases 16] [--judged 60] [--judge DIR]

Every case is a caption of the test split as a request, with the picture tokens as its whole answer, and noise of its
own. The reference runs transformers' OPT, our heads in PyTorch and diffusers' PNDM of 50 steps with guidance 7.5, all
in fp32. Then the first bundle draws --judged captions by each schedule, and the classifier of scene-classifier says
what it finds: DPM-Solver++ of 20 steps beside PNDM of 50.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, cast

import diffusers
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mllm_edge
from mllm_edge.checkpoints.tokenizer import checkpoint_tokenizer
from mllm_edge.evaluate.drawings import SEED, Judge, asking, read_judge
from mllm_edge.machine.facts import cpu_name
from mllm_edge.models.blocks.unet import UNet
from mllm_edge.models.blocks.vae import VaeDecoder
from mllm_edge.models.gill.model import LM, TOKENS, Gill
from mllm_edge.models.language.opt import TABLE
from mllm_edge.models.resolve import resolve
from mllm_edge.recipes.data.gill_scenes import few_things
from mllm_edge.runtime import Model
from mllm_edge.runtime.turn import Drawing

STEPS, GUIDANCE, BOS = 50, 7.5, 2
SCHEDULES = (("pndm", 50), ("dpm_solver", 20), ("dpm_solver", 50))
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class Reference:
    """A checkpoint in PyTorch."""

    def __init__(self, checkpoint: str):
        held = resolve("gill", checkpoint)
        self.dims = held.dims
        self.words = checkpoint_tokenizer(held.tokenizer)
        tensors = {name: tensor.float() for name, tensor in held.tensors.items()}
        self.gill, self.unet, self.vae = Gill(self.dims), UNet(self.dims.unet), VaeDecoder(self.dims.vae)
        head = {f"{LM}lm_head.weight": tensors[f"{LM}{TABLE}"]}
        self.gill.load_state_dict({name: {**tensors, **head}[name] for name in self.gill.state_dict()})
        for module, prefix in ((self.unet, "unet."), (self.vae, "vae_decoder.")):
            module.load_state_dict({name: tensors[prefix + name] for name in module.state_dict()})
        self.empty = tensors["empty_text"]

    @torch.no_grad()
    def picture(self, words: str, seed: int) -> Pixels:
        """uint8 [H,W,3] for words that are followed by the picture tokens alone."""
        group = list(range(self.dims.start, self.dims.start + len(TOKENS)))
        opt: Any = self.gill.language_model
        rows = opt.get_input_embeddings()(torch.tensor([[BOS, *self.words(words), *group]]))
        states = opt(inputs_embeds=rows, output_hidden_states=True).hidden_states[-1][:, -len(group) :]  # [1,8,D]
        text = self.gill.heads(states, opt.get_input_embeddings().weight[group][None])[0]  # [1,L,D]
        scheduler = cast(Any, diffusers).PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        )
        scheduler.set_timesteps(STEPS)
        unet = self.dims.unet
        noise = np.random.Generator(np.random.PCG64(seed))
        latent = torch.from_numpy(noise.standard_normal((1, unet.channels, unet.side, unet.side), np.float32))
        for timestep in scheduler.timesteps:
            asked, free = (self.unet(latent, timestep.reshape(1).float(), rows) for rows in (text, self.empty))
            latent = scheduler.step(free + GUIDANCE * (asked - free), timestep, latent).prev_sample
        pixels = self.vae(latent / self.dims.vae.scale)[0]
        found: Pixels = ((pixels / 2 + 0.5) * 255).clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
        return found


def drawn(model: Model, words: str, drawing: Drawing) -> Pixels:
    """The bundle's picture for the same."""
    answer = model.generate(words, drawing=drawing, teacher_forced="".join(TOKENS), max_tokens=1)
    return np.asarray(answer.images[0].image.convert("RGB"))


def psnr(found: Pixels, wanted: Pixels) -> float:
    error = float(np.square(found.astype(float) - wanted.astype(float)).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def judged(model: Model, judge: Judge, schedule: str, steps: int, cases: int) -> tuple[float, float, float]:
    """Shares of objects and of exact pictures, and seconds a picture."""
    from PIL import Image

    objects, exact, began = [], [], time.perf_counter()
    for index in track(range(cases), f"{schedule}, {steps} steps", console=Console(stderr=True)):
        scene = few_things("test", index, SEED)
        asked = {" ".join(thing.pair) for thing in scene.objects}
        drawing = Drawing(seed=index, schedule=schedule, steps=steps)
        found = set(judge.names(Image.fromarray(drawn(model, asking(scene, index), drawing))))
        objects += [one in found for one in asked]
        exact.append(found == asked)
    return float(np.mean(objects)), float(np.mean(exact)), (time.perf_counter() - began) / cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--judged", type=int, default=60)
    parser.add_argument("--judge", type=Path)
    options = parser.parse_args()
    reference, judge = Reference(options.checkpoint), read_judge(options.judge)
    asked = [asking(few_things("test", index, SEED), index) for index in range(options.cases)]
    wanted = [reference.picture(words, seed) for seed, words in enumerate(asked)]
    table = Table(title=f"{cpu_name()}: PSNR with PyTorch, {options.cases} pictures")
    for column in ("bundle", "least, dB", "median, dB", "most, dB"):
        table.add_column(column)
    for path in options.bundles:
        with mllm_edge.load(path) as model:
            likeness = []
            for seed, (words, found) in enumerate(zip(asked, wanted)):
                drawing = Drawing(seed=seed, schedule="pndm", steps=STEPS, guidance=[GUIDANCE])
                likeness.append(psnr(drawn(model, words, drawing), found))
        table.add_row(path.name, *(f"{number:.1f}" for number in np.percentile(likeness, (0, 50, 100))))
    Console().print(table)
    table = Table(title=f"{cpu_name()}: what the judge finds, {options.judged} captions")
    for column in ("schedule", "steps", "objects, %", "exact pictures, %", "s a picture"):
        table.add_column(column)
    with mllm_edge.load(options.bundles[0]) as model:
        for schedule, steps in SCHEDULES:
            objects, exact, seconds = judged(model, judge, schedule, steps, options.judged)
            table.add_row(schedule, str(steps), f"{100 * objects:.1f}", f"{100 * exact:.1f}", f"{seconds:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
