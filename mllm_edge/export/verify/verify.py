"""Compares a bundle with the PyTorch reference: each stage, the language model, and the two end to end, down to masks.

Later stages and the language model get the reference's inputs and, step by step, the reference's tokens (teacher
forcing), so that a row measures its own stage alone. In `end_to_end` the bundle continues from its own tokens.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mllm_edge import models
from mllm_edge.bundle.manifest import Parity
from mllm_edge.bundle.read import read_manifest, write_manifest
from mllm_edge.errors import BadInput, OutOfTolerance
from mllm_edge.export.onnx.merging import merged_like
from mllm_edge.export.tensorrt.check import with_rows
from mllm_edge.export.verify.answers import answer_rows, retrievable
from mllm_edge.export.verify.difference import AT_LEAST
from mllm_edge.export.verify.language_model import language_rows, reference_prompts
from mllm_edge.export.verify.same_tokens import assert_same_tokens
from mllm_edge.export.verify.samples import Samples, pictures
from mllm_edge.export.verify.stages import stage_row
from mllm_edge.machine.facts import available_memory
from mllm_edge.machine.threads import usable_cores
from mllm_edge.models.plan import Checkpoint, ExportPlan, LanguageModelExport
from mllm_edge.models.resolve import resolve
from mllm_edge.runtime import load
from mllm_edge.runtime.engines.interface import Options
from mllm_edge.runtime.engines.llama.sound import require_sound
from mllm_edge.runtime.turn import Drawing

PICTURES = 4
CONTEXT = 512  # positions beside a picture: the question and the answer


def verify(
    folder: Path,
    checkpoint: Checkpoint,
    plan: ExportPlan,
    pictures: Sequence[np.ndarray],
    drawing: Drawing | None = None,
) -> list[Parity]:
    """Measure a bundle against its checkpoint.

    Args:
        folder: the bundle.
        checkpoint: the weights that it was made from.
        plan: the checkpoint's export plan.
        pictures: uint8 [H,W,3] each; the more, the stricter, as the worst picture counts.
        drawing: how pictures of answers are made, in both.

    Returns:
        A row per stage, `language_model`, `end_to_end` and one for each kind of answer beside text. What needs the
        language model's reference is left out, with a warning, when it does not fit in this machine's memory.

    Raises:
        MllmEdgeError: the bundle's language model tokenizes differently from the checkpoint's tokenizer.
    """
    manifest = read_manifest(folder)
    lm = plan.language_model
    if manifest.language_model.gguf:
        require_sound(folder / manifest.language_model.gguf.file)
    if lm.kind == "causal":
        assert_same_tokens(folder / manifest.tokenizer(manifest.language_model.tokenizer).file, lm.tokenizer)
    samples = Samples(plan, pictures)
    # Engines need their GPU; the graphs that they are made of do not.
    target = None if manifest.target != "trt" else "cpu"
    context = min(lm.dims.context, plan.picture_tokens + CONTEXT)
    # The KV cache's type is chosen at run time and not what is measured here; read_manifest() has checked the hashes.
    options = Options(target or manifest.target, False, usable_cores(), "f32", context)
    rows = [stage_row(folder, manifest.stage(stage.name), stage, samples, options) for stage in plan.stages]
    if _fits(lm):
        with load(folder, target, kv_type="f32", context=context, verify_hash=False) as model:
            reference = lm.reference()
            prompts = reference_prompts(model, plan, samples, pictures, reference)
            rows += language_rows(model, plan, samples, pictures, prompts, reference)
            with retrievable(folder, manifest, target, drawing or Drawing()) as drawing:
                rows += answer_rows(model, plan, samples, pictures, prompts, reference, drawing)
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
    made_from = source.get("path")
    if made_from and not weights and not Path(made_from).exists():
        raise BadInput(f"{made_from}, which the bundle was made from, is not there; say where it is with --weights")
    weights = weights or made_from or source.get("kind", "")  # "random" and the shipped ones have no path
    checkpoint = resolve(manifest.system, weights, manifest.config if weights == "random" else None)
    if checkpoint.source.get("sha256") != source.get("sha256"):
        raise BadInput(f"{folder} was made from other weights ({source}); say where those are with --weights")
    checkpoint = dataclasses.replace(checkpoint, prompt=lambda: (manifest.prompt, ""))  # --template may have chosen it
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


def _fits(lm: LanguageModelExport) -> bool:
    """Whether the fp32 reference fits in free memory, alone and with the largest tensor that fills it; warns if not."""
    table = lm.dims.vocabulary * lm.dims.width
    needed = 4 * (lm.dims.weights + table)
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
