"""A toy system whose decoder is an OPT: from plan to answer, with a group of tokens that any text may mean."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_for_tests import random_opt
from PIL import Image
from tokenizers_to_test import gpt2_lists
from toys import PATCHES, PIXEL_SPEC, PIXELS, Patches, noise_picture, register, seeded

import mllm_edge
from mllm_edge.bundle.manifest import Generation, Prompt, Slot, TensorSpec, Tokenizer
from mllm_edge.bundle.read import read_manifest
from mllm_edge.bundle.sources import States
from mllm_edge.checkpoints.tokenizer import checkpoint_tokenizer
from mllm_edge.checkpoints.tokenizer_files import extend
from mllm_edge.export.export import export
from mllm_edge.models.language.llama import LlamaReference
from mllm_edge.models.language.opt import OptDims
from mllm_edge.models.plan import Checkpoint, ExportPlan, LanguageModelExport, StageExport
from mllm_edge.runtime.preprocess import preprocess

MARKS = [f"[M{number}]" for number in range(8)]
START = 384
DIMS = OptDims(vocabulary=START + 8, width=64, ffn_width=96, layers=2, heads=4, context=160)
SEER = seeded(lambda: Patches(DIMS.width), 3)
SLOT = Slot("<image>", "pixels", ["rows"], joint="<image>")


@torch.no_grad()
def decoder() -> Any:
    """Random; the first mark lies along the mean of final states, so that it is sometimes the likeliest token."""
    model: Any = random_opt(DIMS, seed=5)
    mean = model.model.decoder.final_layer_norm.bias.normal_(std=0.5)
    table = model.get_input_embeddings().weight
    table[START] = mean * 1.7 / mean.square().sum()
    table[START + 1 :] = 2 * table[START]  # likelier still, were they not barred
    return model.eval()


def plan(checkpoint: Checkpoint) -> ExportPlan:
    rows = TensorSpec("rows", "float32", [1, PATCHES, DIMS.width])
    return ExportPlan(
        tasks=["draw"],
        sources=[PIXELS, States("marks", MARKS, at="token")],
        stages=[StageExport("seer", SEER, [PIXEL_SPEC], [rows])],
        tokenizers=[Tokenizer("language_model", "gguf", "language_model.gguf", added=MARKS)],
        language_model=LanguageModelExport(
            DIMS,
            checkpoint.tokenizer,
            lambda: LlamaReference(decoder()),
            architecture="opt",
            tensors=decoder().state_dict(),
        ),
        prompt=Prompt("toy", "", "{text}", "{text}", "{text}", [], [SLOT]),
        generation=Generation(max_tokens=40, groups={MARKS[0]: MARKS[1:]}),
        licences={},
        question="draw a dog",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lists, folder = tmp_path_factory.mktemp("lists"), tmp_path_factory.mktemp("tokenizer")
    extend(gpt2_lists(lists), folder, [], MARKS)
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        register(patch, DIMS, plan)
        return export("toy", str(folder), quant="f32", out=tmp_path_factory.mktemp("opt") / "toy.bundle")


@torch.no_grad()
def answer(ids: list[int], picture: np.ndarray, most: int) -> list[int]:
    """By hand, with transformers: greedy tokens after BOS, picture and `ids`, with the group's rule."""
    model = decoder()
    embed = model.get_input_embeddings()
    pixels = torch.from_numpy(preprocess(Image.fromarray(picture), PIXELS))
    read = torch.cat([embed(torch.tensor([[2]])), SEER()(pixels), embed(torch.tensor([ids]))], 1)
    tokens: list[int] = []
    while len(tokens) < most:
        after = embed(torch.tensor([tokens], dtype=torch.long))
        logits = model(inputs_embeds=torch.cat([read, after], 1)).logits[0, -1]
        logits[START + 1 :] = -torch.inf
        token = int(logits.argmax())
        group = list(range(START, START + 8)) if token == START else [token]
        if len(group) > 1 and len(tokens) + 8 > most:
            break
        tokens += group
        if token == 2:
            break
    return tokens


def test_every_row_of_parity_passes(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    rows = {row.name: row for row in manifest.parity}
    assert {"seer", "language_model", "end_to_end"} <= set(rows) and all(row.passed for row in rows.values())
    assert (manifest.language_model.context, manifest.language_model.vocabulary) == (160, START + 8)


@pytest.mark.parametrize("question", ["draw a dog", "see [M0]\n [M1][M7] here\n", "caf\u00e9's 12?"])
def test_answers_are_those_of_transformers(bundle: Path, folder: Path, question: str) -> None:
    """Marks in a user's words are the tokens, without the white space beside them."""
    plain, picture = checkpoint_tokenizer(folder), noise_picture(1)
    marked = [*plain("see"), START, START + 1, START + 7, *plain("here\n")]
    expected = answer(marked if "[M0]" in question else plain(question), picture, 40)
    with mllm_edge.load(bundle, threads=1, kv_type="f32") as model:
        found = model.generate(question, picture)
    assert found.tokens.ids == expected
    if question == "draw a dog":
        assert START in expected and "[M0][M1][M2][M3][M4][M5][M6][M7]" in found.text
