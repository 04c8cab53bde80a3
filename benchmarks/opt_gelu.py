"""How near OPT runs as llama.cpp's gpt2, whose GELU is sharpened to ReLU: `python benchmarks/opt_gelu.py`.

The root mean square error of final states over theirs, by quantization and sharpness, for random decoders whose second
matrices of feed-forwards have the given deviations. `--size 125m` has OPT-125M's dims.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers

from mllm_edge.export.gguf.maps import MAPS, opt_tensors, sharpness
from mllm_edge.export.gguf.writer import export_language_model
from mllm_edge.machine.facts import cpu_name
from mllm_edge.models.language.llama import LlamaReference
from mllm_edge.models.language.opt import OptDims, opt
from mllm_edge.models.plan import LanguageModelExport
from mllm_edge.runtime.engines.interface import Floats, Options
from mllm_edge.runtime.engines.llama.model import LlamaLanguageModel

SMALL = OptDims(vocabulary=512, width=512, ffn_width=2048, layers=3, heads=8, context=64)
TOKENS = [7, 250, 12, 90, 3, 200, 31, 66]
SIZES = {"small": SMALL, "125m": OptDims(vocabulary=50272, width=768, ffn_width=3072, layers=12, heads=12)}


@torch.no_grad()
def decoder(dims: OptDims, second: float, active: float) -> Any:
    """Random: `second` is the deviation of fc2, `active` that of what ReLU is applied to; branches are as large as the
    residual stream."""
    torch.manual_seed(0)
    branch = 0.7 * second * active * dims.ffn_width**0.5
    spreads = {"fc1.weight": active * dims.width**-0.5, "fc2.weight": second, "_proj.weight": 0.05}
    spreads |= {"out_proj.weight": branch * dims.width**-0.5, "embed": branch, "bias": 0.1 * branch}
    model: Any = opt(dims).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.normal_(1, 0.1)
        else:
            parameter.normal_(0, [spread for part, spread in spreads.items() if part in name][-1])
    return model


def tokenizer(folder: Path) -> Path:
    """One token a byte, and one of two, as llama.cpp wants a merge."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    (folder / "vocab.json").write_text(json.dumps({text: i for i, text in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\na b\n", encoding="utf-8")
    return folder


@contextmanager
def sharpened(factor: float) -> Iterator[None]:
    """Exports with another factor."""
    usual = MAPS["opt"]
    MAPS["opt"] = dataclasses.replace(usual, tensors=lambda dims, _: opt_tensors(dims, factor))
    try:
        yield
    finally:
        MAPS["opt"] = usual


def states(lm: LanguageModelExport, folder: Path, quant: str, prompt: Floats) -> Floats:
    """llama.cpp's final states after a prompt and `TOKENS`, [n+1,D]."""
    entry = export_language_model(lm, folder / "model.gguf", quant)
    model = LlamaLanguageModel(folder, entry, Options("cpu", True, 1, "f32", 64))
    try:
        first = model.prefill(prompt, state=True).hidden
        return np.concatenate([first, model.extend(TOKENS, len(TOKENS)).hidden])
    finally:
        model.close()


def rows(dims: OptDims, model: Any, folder: Path, quants: Sequence[str], factors: Sequence[float]) -> Iterator[str]:
    """A line a quantization: sharpness, error and least cosine."""
    reference = LlamaReference(model)
    weights = model.state_dict()
    lm = LanguageModelExport(dims, folder, lambda: reference, architecture="opt", tensors=weights)
    prompt = reference.embed(list(range(24)))
    _, wanted = reference.forced(prompt, TOKENS)
    for quant in quants:
        line = []
        for factor in factors or [sharpness(quant)]:
            with sharpened(factor):
                found = states(lm, folder, quant, prompt)
            error = np.sqrt(np.square(found - wanted).mean() / np.square(wanted).mean())
            lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
            line.append(f"{factor:g}: {error:.4f} {((found * wanted).sum(1) / lengths).min():.6f}")
        yield f"{quant:7} {'   '.join(line)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--quants", nargs="+", default=["q8_0", "q6_k", "q4_k_m"])
    parser.add_argument("--second", type=float, nargs="+", default=[0.02, 0.005, 0.002])
    parser.add_argument("--active", type=float, nargs="+", default=[1.0, 0.3])
    parser.add_argument("--factors", type=float, nargs="+", default=[], help="by default those of export")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    dims = SIZES[given.size]
    print(f"{cpu_name()}, {given.size}: fc2, activations, quantization; sharpness: error, least cosine")
    with tempfile.TemporaryDirectory() as place:
        folder = tokenizer(Path(place))
        for second, active in itertools.product(given.second, given.active):
            for row in rows(dims, decoder(dims, second, active), folder, given.quants, given.factors):
                print(f"{second:<6} {active:<4} {row}", flush=True)


if __name__ == "__main__":
    main()
