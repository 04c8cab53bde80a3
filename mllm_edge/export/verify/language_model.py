"""A bundle's language model against the reference: along the reference's tokens, and the two on their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mllm_edge.bundle.manifest import Manifest, Parity, Slot
from mllm_edge.export.verify.difference import compare, parity, worst
from mllm_edge.export.verify.samples import Samples
from mllm_edge.models.language.reference import Reference
from mllm_edge.models.plan import ExportPlan
from mllm_edge.quants import ENGINES
from mllm_edge.runtime.engines.interface import Floats, LanguageModel
from mllm_edge.runtime.model import Model

TOKENS = 16
EXACT = {"fp32", "f32", "f16"}  # precisions in which rounding cannot turn a close decision


def language_rows(
    model: Model,
    plan: ExportPlan,
    samples: Samples,
    pictures: Sequence[np.ndarray],
    prompts: Sequence[Floats],
    reference: Reference,
) -> list[Parity]:
    """`language_model`: the reference's prompts and tokens in both (teacher forcing). `end_to_end`: the bundle reads
    the question about each picture and goes its own way."""
    lm, logits, agreed = model.language_model, [], []
    for picture, prompt in zip(pictures, prompts, strict=True):
        tokens = reference.generate(prompt, TOKENS)
        wanted, _ = reference.forced(prompt, tokens[:-1])  # [TOKENS,V]
        logits.append((_forced(lm, prompt, tokens), wanted))
        agreed.append(_agreement(_free(lm, model.prompt_embeds(plan.question, picture)), tokens))
    top1 = np.mean([a.argmax(-1) == b.argmax(-1) for a, b in logits])
    measured = {**worst([compare(a, b) for a, b in logits]), "top1": float(top1)}
    agreement = {"tokens": float(TOKENS), "agreement": min(agreed)}
    return [
        parity("language_model", measured, _tolerance(model.manifest)),
        parity("end_to_end", agreement, {"agreement": 1.0} if is_exact(model.manifest) else {}),
    ]


def _tolerance(manifest: Manifest) -> dict[str, float]:
    """Of the precision; random weights, quantized, prefer no token by more than rounding moves it."""
    lm = manifest.language_model
    name = lm.precision
    allowed = ENGINES[lm.engine][name].tolerance
    if manifest.source.get("kind") == "random" and name not in EXACT:
        return {key: limit for key, limit in allowed.items() if key != "top1"}
    return allowed


def is_exact(manifest: Manifest) -> bool:
    """Whether rounding cannot turn a close decision."""
    return {stage.precision for stage in manifest.stages} | {manifest.language_model.precision} <= EXACT


def reference_prompts(
    model: Model, plan: ExportPlan, samples: Samples, pictures: Sequence[np.ndarray], reference: Reference
) -> list[Floats]:
    """What the reference reads for the plan's question about each picture, float32 [T,D]."""
    prompts = []
    for number, picture in enumerate(pictures):
        need = samples.need(number, {})
        rows = []
        for part in model.prompt_parts(plan.question, picture):
            if isinstance(part, Slot):
                tensors = [np.asarray(need(name)) for name in part.tensors]
                rows += [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]  # [1,N,D] -> [N,D]
            elif part:
                rows.append(reference.embed(part))
        prompts.append(np.concatenate(rows).astype(np.float32))
    return prompts


def _forced(lm: LanguageModel, prompt: Floats, tokens: Sequence[int]) -> Floats:
    """The bundle's logits along the reference's tokens: float32 [TOKENS,V]."""
    return np.stack([lm.prefill(prompt).logits, *(lm.extend([token]).logits for token in tokens[:-1])])


def _free(lm: LanguageModel, prompt: Floats) -> list[int]:
    """The bundle's own greedy tokens."""
    tokens = [int(lm.prefill(prompt).logits.argmax())]
    while len(tokens) < TOKENS:
        tokens.append(int(lm.extend(tokens[-1:]).logits.argmax()))
    return tokens


def _agreement(tokens: Sequence[int], expected: Sequence[int]) -> float:
    """Share of the tokens before the first that differs."""
    same = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), len(expected))
    return same / len(expected)
