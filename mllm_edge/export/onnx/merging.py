"""`--merge-tokens`: a plan whose pictures take fewer tokens in the prompt."""

from __future__ import annotations

import dataclasses

from torch import nn

from mllm_edge.bundle.manifest import Manifest
from mllm_edge.errors import BadInput
from mllm_edge.kernels.token_merge import TokenMerge
from mllm_edge.models.plan import ExportPlan, StageExport


def with_merged_tokens(plan: ExportPlan, tokens: int) -> ExportPlan:
    """The plan with token merging after the stage whose output stands in the prompt for a picture.

    Raises:
        BadInput: the system has no such stage, or its pictures do not have more than `tokens` tokens.
    """
    stage = embedding_stage(plan)
    if stage is None:
        raise BadInput("this system's pictures are not read as tokens; export without --merge-tokens")
    number = _tokens(stage)
    if not 1 <= tokens < number:
        raise BadInput(f"a picture takes {number} tokens here; merge them to 1 to {number - 1}")
    outputs = [dataclasses.replace(stage.outputs[0], shape=[1, tokens, *stage.outputs[0].shape[2:]])]
    merged = dataclasses.replace(
        stage,
        module=lambda: nn.Sequential(stage.module(), TokenMerge(tokens)),
        reference=lambda: nn.Sequential(stage.compared(), TokenMerge(tokens)),
        outputs=outputs,
    )
    return dataclasses.replace(plan, stages=[merged if one is stage else one for one in plan.stages])


def merged_like(manifest: Manifest, plan: ExportPlan) -> ExportPlan:
    """The plan of a finished bundle: its shapes give the number of tokens that pictures were merged to."""
    stage = embedding_stage(plan)
    if stage is None:
        return plan
    tokens = int(manifest.stage(stage.name).outputs[0].shape[1])
    return with_merged_tokens(plan, tokens) if tokens < _tokens(stage) else plan


def embedding_stage(plan: ExportPlan) -> StageExport | None:
    """The stage that outputs a picture's embeddings for the prompt, and nothing else, if the system has one."""
    found = plan.pictured
    return found[0] if len(found) == 1 and len(found[0].outputs) == 1 else None


def _tokens(stage: StageExport) -> int:
    return int(stage.outputs[0].shape[1])
