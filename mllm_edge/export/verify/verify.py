"""Compares a bundle with the PyTorch reference: each stage, the language model, and the two end to end, down to masks.

Later stages and the language model get the reference's inputs and, step by step, the reference's tokens (teacher
forcing), so that a row speaks of its own stage alone. `end_to_end` lets the bundle go its own way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mllm_edge import models
from mllm_edge.bundle.check import locate
from mllm_edge.bundle.manifest import Manifest, Parity, StageEntry
from mllm_edge.bundle.read import read_manifest, write_manifest
from mllm_edge.errors import BadInput, MllmEdgeError, OutOfTolerance
from mllm_edge.export.gguf.same_tokens import assert_same_tokens
from mllm_edge.export.onnx.merging import embedding_stage, merged_like
from mllm_edge.export.tensorrt.check import with_rows
from mllm_edge.export.verify.difference import compare
from mllm_edge.export.verify.samples import Samples, pictures
from mllm_edge.machine.facts import available_memory
from mllm_edge.machine.threads import usable_cores
from mllm_edge.models.language.llama import LlamaDims
from mllm_edge.models.plan import Checkpoint, ExportPlan, StageExport
from mllm_edge.models.resolve import resolve
from mllm_edge.quants import PRECISIONS, QUANTS
from mllm_edge.runtime import Model, load
from mllm_edge.runtime.answers.masks import LOGITS, SEG, STATES
from mllm_edge.runtime.answers.resize import at_full_size, iou
from mllm_edge.runtime.engines.interface import Floats, LanguageModel, Options
from mllm_edge.runtime.engines.table import STAGE_ENGINES
from mllm_edge.runtime.prompt import piece_ids, render

# Agreement is asked for only where rounding cannot turn a close decision.
EXACT = ({"fp32"}, {"f32", "f16"})
AT_LEAST = ("cosine", "top1", "agreement", "same_tokens", "mask_iou")

TOKENS = 16
PICTURES = 4
ANSWER = 256  # most tokens of an answer with masks
MASK_TOLERANCE = {True: {"same_tokens": 1.0, "mask_iou": 0.99}, False: {"mask_iou": 0.97}}  # exact parts, others


def verify(folder: Path, checkpoint: Checkpoint, plan: ExportPlan, pictures: Sequence[np.ndarray]) -> list[Parity]:
    """Measure a bundle against its checkpoint.

    Args:
        folder: the bundle.
        checkpoint: the weights that it was made from.
        plan: the checkpoint's export plan.
        pictures: uint8 [H,W,3] each; the more, the stricter, as the worst picture counts.

    Returns:
        A row per stage, `language_model`, `end_to_end` and, where answers have masks, `masks`. These are left out, with
        a warning, when the reference does not fit in this machine's memory.

    Raises:
        MllmEdgeError: the bundle's language model tokenizes differently from the checkpoint's tokenizer.
    """
    manifest = read_manifest(folder)
    assert_same_tokens(folder / manifest.language_model.file, checkpoint.tokenizer)
    samples = Samples(plan, pictures)
    # The KV cache's type is chosen at run time and not what is measured here; read() has checked the hashes.
    target = (
        None if manifest.target != "trt" else "cpu"
    )  # engines need their GPU; the graphs that they are made of do not
    options = Options(target or manifest.target, False, usable_cores(), "f32", _context(plan))
    rows = [_stage_row(folder, manifest.stage(stage.name), stage, samples, options) for stage in plan.stages]
    if _fits(plan.language_model.dims):
        with load(folder, target, kv_type="f32", context=_context(plan), verify_hash=False) as model:
            reference = _reference(checkpoint)
            rows += _language_rows(model, manifest, plan, samples, pictures, reference)
            rows += mask_rows(model, manifest, plan, samples, pictures, reference)
    return rows


def verify_bundle(folder: Path, weights: str | None = None) -> list[Parity]:
    """Verify a finished bundle and write the result into its manifest.

    Args:
        folder: the bundle.
        weights: where its checkpoint is now; by default where it was when the bundle was made.

    Raises:
        BadInput: not a bundle, or the checkpoint is not found or is another one.
        OutOfTolerance: names what failed; the manifest has the rows all the same.
    """
    manifest = read_manifest(folder)
    module = models.get(manifest.system).load_module()
    source = manifest.source
    weights = weights or source.get("path") or source["kind"]  # "random" and the shipped ones have no path
    checkpoint = resolve(manifest.system, weights, manifest.config if weights == "random" else None)
    if checkpoint.source.get("sha256") != source.get("sha256"):
        raise BadInput(f"{folder} was made from other weights ({source}); say where those are with --weights")
    plan = merged_like(manifest, module.plan(checkpoint))
    rows = verify(folder, checkpoint, plan, pictures(PICTURES))
    write_manifest(dataclasses.replace(manifest, parity=with_rows(manifest.parity, rows)), folder)
    require(rows)
    return rows


def require(rows: Sequence[Parity]) -> None:
    """Raise OutOfTolerance that lists the failed rows, the worst first."""
    failed = sorted((row for row in rows if not row.passed), key=_excess, reverse=True)
    if failed:
        raise OutOfTolerance(
            f"out of tolerance: {'; '.join(_describe(row) for row in failed)}; "
            "export with a higher precision or quantization, or check that the weights are the bundle's"
        )


def parity(name: str, measured: dict[str, float], tolerance: dict[str, float]) -> Parity:
    """A row; not-a-number never passes."""
    passed = all(measured[k] >= limit if k in AT_LEAST else measured[k] <= limit for k, limit in tolerance.items())
    return Parity(name, passed, measured, tolerance)


def _context(plan: ExportPlan) -> int:
    """Positions that a picture, a question and the tokens take."""
    return min(plan.language_model.dims.context, int(_pictured(plan).outputs[0].shape[1]) + 512)


def _pictured(plan: ExportPlan) -> StageExport:
    """The stage whose output stands in the prompt."""
    stage = embedding_stage(plan)
    if stage is None:
        raise MllmEdgeError("no stage gives image_embeds, so the language model cannot be compared; correct the plan")
    return stage


def _stage_row(folder: Path, entry: StageEntry, stage: StageExport, samples: Samples, options: Options) -> Parity:
    """One stage at a time is in memory, and PyTorch's first."""
    expected = samples.outputs(stage)
    with contextlib.closing(STAGE_ENGINES[entry.engine](locate(folder, entry.file), entry, options)) as engine:
        pairs = [
            (np.asarray(engine(**feed)[name]), outputs[name])
            for feed, outputs in zip(samples.inputs(stage), expected, strict=True)
            for name in outputs
        ]
    return parity(stage.name, _worst([compare(*pair) for pair in pairs]), PRECISIONS[entry.precision].tolerance)


def _language_rows(
    model: Model, manifest: Manifest, plan: ExportPlan, samples: Samples, pictures: Sequence[np.ndarray], reference: Any
) -> list[Parity]:
    lm = model.language_model
    logits, greedy = [], []
    prompts = _prompts(model, manifest, plan, samples, reference)
    for picture, embeds in zip(pictures, prompts, strict=True):
        tokens, wanted, _ = generate(reference, embeds, TOKENS)
        logits.append((_forced(lm, embeds, tokens), wanted))
        greedy.append(_agreement(_free(lm, model.prompt_embeds(plan.question, picture)), tokens))
    top1 = np.mean([a.argmax(-1) == b.argmax(-1) for a, b in logits])
    measured = {**_worst([compare(a, b) for a, b in logits]), "top1": float(top1)}
    quant = manifest.language_model.precision
    agreement = {"tokens": float(TOKENS), "agreement": min(greedy)}
    return [
        parity("language_model", measured, QUANTS[quant].tolerance),
        parity("end_to_end", agreement, {"agreement": 1.0} if _exact(manifest) else {}),
    ]


def _exact(manifest: Manifest) -> bool:
    """Whether rounding cannot turn a close decision."""
    stages = {stage.precision for stage in manifest.stages}
    return stages <= EXACT[0] and manifest.language_model.precision in EXACT[1]


def _prompts(model: Model, manifest: Manifest, plan: ExportPlan, samples: Samples, reference: Any) -> list[Floats]:
    """What the reference reads for the plan's question about each picture, float32 [T,D]."""
    lm = model.language_model
    before, after = (
        piece_ids(piece, lm, manifest.prompt) for piece in render(manifest.prompt, plan.question, images=1)
    )
    before = [*([] if lm.bos is None else [lm.bos]), *before]
    table = reference.get_input_embeddings().weight.detach()
    return [
        np.concatenate([table[before].numpy(), expected["image_embeds"][0], table[after].numpy()])
        for expected in samples.outputs(_pictured(plan))
    ]


def mask_rows(
    model: Model, manifest: Manifest, plan: ExportPlan, samples: Samples, pictures: Sequence[np.ndarray], reference: Any
) -> list[Parity]:
    """Whole answers with masks against the reference's: the same tokens, and masks that cover the same pixels.

    Where rounding may turn a word, masks are compared that both cut out for the reference's words.
    """
    decoder = next((s for s in plan.stages if LOGITS in [spec.name for spec in s.outputs]), None)
    if decoder is None:
        return []
    exact = _exact(manifest)
    module = decoder.module().eval()
    source = next(spec.name for spec in decoder.inputs if spec.name != STATES)
    maker = next(stage.name for stage in plan.stages if source in [spec.name for spec in stage.outputs])
    frame = next(step.size for step in plan.preprocessing if step.stage == maker)
    seg = model.language_model.control_tokens[SEG]
    same, ious = [], [1.0]
    prompts = _prompts(model, manifest, plan, samples, reference)
    for picture, embeds, made in zip(pictures, prompts, samples.inputs(decoder), strict=True):
        end = model.language_model.is_end
        tokens, _, states = generate(reference, embeds, ANSWER, end)
        wanted = [state for state, token in zip(states, tokens, strict=True) if token == seg]
        answer = model.generate(plan.question, picture, max_tokens=ANSWER, temperature=0.0, repeat_penalty=1.0)
        same.append(answer.tokens.ids == tokens)
        if not exact and wanted:
            answer = model.generate(plan.question, picture, teacher_forced=tokens, max_tokens=1)
        if len(answer.masks) != len(wanted):
            ious.append(0.0)
        elif wanted:
            with torch.no_grad():
                logits = module(torch.from_numpy(made[source]), torch.from_numpy(np.stack(wanted))).numpy()
            height, width = picture.shape[:2]
            ious += [
                iou(mask.pixels, at_full_size(one, frame, (width, height)) > 0)
                for mask, one in zip(answer.masks, logits, strict=True)
            ]
    measured = {"masks": float(len(ious) - 1), "same_tokens": float(np.mean(same)), "mask_iou": float(min(ious))}
    return [parity("masks", measured, MASK_TOLERANCE[exact])]


def _worst(measurements: Sequence[dict[str, float]]) -> dict[str, float]:
    """Per measure the worst value (np keeps not-a-number)."""
    pick = {key: np.min if key in AT_LEAST else np.max for key in measurements[0]}
    return {key: float(worst([measured[key] for measured in measurements])) for key, worst in pick.items()}


@torch.no_grad()
def generate(
    reference: Any, embeds: np.ndarray, most: int, is_end: Callable[[int], bool] = lambda _: False
) -> tuple[list[int], np.ndarray, list[np.ndarray]]:
    """The reference's greedy tokens, and what each was chosen from: logits f32 [n,V] and the states f32 [D] behind the
    final norm."""
    more = {"use_cache": True, "output_hidden_states": True}
    result = reference(inputs_embeds=torch.from_numpy(embeds)[None], **more)
    tokens: list[int] = []
    logits: list[np.ndarray] = []
    states: list[np.ndarray] = []
    while True:
        logits.append(result.logits[0, -1].float().numpy())
        states.append(result.hidden_states[-1][0, -1].float().numpy())
        tokens.append(int(logits[-1].argmax()))
        if len(tokens) == most or is_end(tokens[-1]):
            return tokens, np.stack(logits), states
        result = reference(torch.tensor([tokens[-1:]]), past_key_values=result.past_key_values, **more)


def _forced(lm: LanguageModel, embeds: Floats, tokens: Sequence[int]) -> Floats:
    """The bundle's logits along the reference's tokens: f32 [TOKENS,V]."""
    return np.stack([lm.prefill(embeds).logits, *(lm.step(token).logits for token in tokens[:-1])])


def _free(lm: LanguageModel, embeds: Floats) -> list[int]:
    """The bundle's own greedy tokens."""
    tokens = [int(lm.prefill(embeds).logits.argmax())]
    while len(tokens) < TOKENS:
        tokens.append(int(lm.step(tokens[-1]).logits.argmax()))
    return tokens


def _agreement(tokens: Sequence[int], expected: Sequence[int]) -> float:
    """Share of the tokens before the first that differs."""
    same = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), len(expected))
    return same / len(expected)


def _reference(checkpoint: Checkpoint) -> Any:
    return models.get(checkpoint.system).load_module().build(checkpoint).language_model


def _fits(dims: LlamaDims) -> bool:
    """Whether the fp32 reference fits in free memory; says so when it does not."""
    needed = 2 * 4 * dims.weights  # the module, and the tensors that it is filled from
    free = available_memory()
    if free is None or needed < free:
        return True
    warnings.warn(
        f"the language model is not verified: its fp32 reference needs {needed / 1e9:.0f} GB of memory and "
        f"{free / 1e9:.0f} GB are free; verify the bundle on a larger machine with: mllm-edge verify",
        stacklevel=3,
    )
    return False


def _excess(row: Parity) -> float:
    """How many times over its tolerance a row is."""
    ratios = []
    for key, limit in row.tolerance.items():
        off, allowed = (1 - row.measured[key], 1 - limit) if key in AT_LEAST else (row.measured[key], limit)
        ratios.append(math.inf if math.isnan(off) or (off > 0 and not allowed) else off / (allowed or 1))
    return max(ratios, default=0.0)


def _describe(row: Parity) -> str:
    parts = []
    for key, limit in row.tolerance.items():
        value = row.measured[key]
        if key in AT_LEAST and not value >= limit:
            parts.append(f"{key} {value:.4g} (at least {limit:g})")
        elif key not in AT_LEAST and not value <= limit:
            parts.append(f"{key} {value:.4g} (at most {limit:g})")
    return f"{row.name} {', '.join(parts)}"
