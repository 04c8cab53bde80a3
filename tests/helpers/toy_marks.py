"""A toy decoder whose answers hold a group of eight tokens, [IMG0] to [IMG7], in a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers_to_test import byte_level
from torch import nn
from toys import PATCHES, PIXEL_SPEC, PIXELS, Patches, seeded

from mllm_edge.bundle.manifest import Generation, Prompt, Slot, TensorSpec, Tokenizer
from mllm_edge.bundle.sources import States
from mllm_edge.models.language.llama import LlamaDims, LlamaReference, llama
from mllm_edge.models.language.llama_parts import parts
from mllm_edge.models.plan import Checkpoint, ExportPlan, LanguageModelExport, StageExport

MARKS = [f"[IMG{number}]" for number in range(8)]
WIDTH = 32
PROMPT = Prompt("toy", "", "{text}", "{text}", "{text}", [], [Slot("<image>", "pixels", ["rows"], joint="<image>")])


def marked(folder: Path) -> Path:
    """A byte-level tokenizer with the marks as special tokens."""
    file = byte_level(folder, "gpt-2") / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens(MARKS)
    tokenizer.save(str(file))
    return folder


def first_mark(folder: Path) -> int:
    """The id of [IMG0]; the others follow it."""
    return int(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(MARKS[0]))


def dims(folder: Path) -> LlamaDims:
    size = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    return LlamaDims(vocabulary=size, width=WIDTH, ffn_width=64, layers=2, heads=4, kv_heads=2, context=256)


def decoder(folder: Path) -> Any:
    """Random, but for [IMG0], which is the likeliest token after a few others."""
    torch.manual_seed(11)
    model: Any = llama(dims(folder))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.4 if "embed" in name else 0.25)
        start = first_mark(folder)
        length = model.lm_head.weight[:start].norm(dim=1).mean()
        torch.manual_seed(102)  # one picture in an answer, sometimes two
        model.lm_head.weight[start] = 1.9 * length * torch.nn.functional.normalize(torch.randn(WIDTH), dim=0)
        model.lm_head.weight[start + 1 :] *= 2  # the others would come alone, were they not barred
    return model.eval()


def rows(seed: int = 3) -> nn.Module:
    return seeded(lambda: Patches(WIDTH), seed)()


def plan(checkpoint: Checkpoint, **more: Any) -> ExportPlan:
    """Pictures as rows, the decoder, states at the marks themselves; `more` are the plan's other parts."""
    folder = checkpoint.tokenizer
    stages = [
        StageExport("seer", rows, [PIXEL_SPEC], [TensorSpec("rows", "float32", [1, PATCHES, WIDTH])]),
        *more.pop("stages"),
    ]
    model = decoder(folder)
    return ExportPlan(
        tasks=["draw"],
        sources=[PIXELS, States("marks", MARKS, at="token")],
        stages=stages,
        tokenizers=[Tokenizer("language_model", "gguf", "language_model.gguf")],
        language_model=LanguageModelExport(
            dims(folder),
            folder,
            lambda: LlamaReference(decoder(folder)),
            tensors=model.state_dict(),
            parts=parts(dims(folder), lambda: decoder(folder)),
        ),
        prompt=PROMPT,
        generation=Generation(max_tokens=40, groups={MARKS[0]: MARKS[1:]}),
        licences={},
        question="draw a dog",
        examples={
            "marks": np.random.default_rng(0).standard_normal((8, WIDTH)).astype(np.float32),
            **more.pop("examples", {}),
        },
        **more,
    )


@torch.no_grad()
def answer(folder: Path, question: str, picture: np.ndarray, most: int) -> tuple[list[int], torch.Tensor]:
    """By hand, with transformers alone: greedy tokens with the group's rule, and the states [n,W] at the marks."""
    from PIL import Image

    from mllm_edge.runtime.preprocess import preprocess

    model, start = decoder(folder), first_mark(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    pixels = torch.from_numpy(preprocess(Image.fromarray(picture), PIXELS))
    words = model.get_input_embeddings()(torch.tensor([tokenizer.encode(question, add_special_tokens=False).ids]))
    read = torch.cat([rows()(pixels), words], 1)  # [1,N+T,W]
    tokens: list[int] = []
    while len(tokens) < most:
        logits = model(inputs_embeds=_after(model, read, tokens)).logits[0, -1]
        logits[start + 1 : start + 8] = -torch.inf
        token = int(logits.argmax())
        group = list(range(start, start + 8)) if token == start else [token]
        if len(group) > 1 and len(tokens) + 8 > most:
            break
        tokens += group
        if token == tokenizer.token_to_id("<|end|>"):
            break
    hidden = model(inputs_embeds=_after(model, read, tokens), output_hidden_states=True).hidden_states[-1][0]
    places = [read.shape[1] + number for number, token in enumerate(tokens) if start <= token < start + 8]
    return tokens, hidden[places]


@torch.no_grad()
def forced(folder: Path, question: str) -> torch.Tensor:
    """By hand: the states [8,W] at the marks right after a question without a picture."""
    model, start = decoder(folder), first_mark(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [*tokenizer.encode(question, add_special_tokens=False).ids, *range(start, start + 8)]
    states: torch.Tensor = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    return states[-8:]


def _after(model: Any, read: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    return torch.cat([read, model.get_input_embeddings()(torch.tensor([tokens], dtype=torch.long))], 1)
