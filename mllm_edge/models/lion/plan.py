"""What export lowers of a LION, and what its bundles say of prompts and answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from mllm_edge.bundle.manifest import Generation, Prompt, TensorSpec, Tokenizer
from mllm_edge.bundle.sources import Labels, Pixels, Source, Task, Text
from mllm_edge.models.blocks.eva import EvaEncoder
from mllm_edge.models.language.t5 import T5
from mllm_edge.models.language.t5_parts import (
    DecoderPart,
    EmbedPart,
    EncoderPart,
    T5Reference,
    part_specs,
    task_rows,
    wide_products,
)
from mllm_edge.models.lion.layouts import QUESTION, question_tokenizer, tags_of
from mllm_edge.models.lion.layouts import load as load
from mllm_edge.models.lion.model import CONFIGS as CONFIGS
from mllm_edge.models.lion.model import SHIPPED as SHIPPED
from mllm_edge.models.lion.model import Aggregator, LionDims, Queries, Tagger
from mllm_edge.models.lion.model import build as build
from mllm_edge.models.lion.model import tensor_shapes as tensor_shapes
from mllm_edge.models.lion.prompts import BOX, CAPTION_QUESTIONS, CUES, TAGGED, TASKS, prompt
from mllm_edge.models.llava.model import IMAGE_MEAN, IMAGE_STD, IMAGENET_MEAN, IMAGENET_STD
from mllm_edge.models.parts import Part, filled
from mllm_edge.models.plan import Checkpoint, ExportPlan, LanguageModelExport, StageExport
from mllm_edge.runtime.decoding.tokenizers import JsonTokenizer
from mllm_edge.runtime.sources import question_ids

PROMPTS: dict[str, Prompt] = {}  # a LION has one


READER = Tokenizer(QUESTION, "json", "question.json", bos="[CLS]", ends=["[SEP]"])  # the Q-Former's


class TaskRow(nn.Module):
    """int64 [1], a type of task -> what stands before the prompt in it, [1,1,D]."""

    def __init__(self, dims: LionDims):
        super().__init__()
        self.rows: Tensor
        self.register_buffer("rows", torch.from_numpy(task_rows(dims.language)), persistent=False)

    def forward(self, task: Tensor) -> Tensor:
        return self.rows[task]


def preprocessing(dims: LionDims) -> list[Pixels]:
    """The whole picture squashed into a square, for the encoder and for the tagger."""
    size = dims.vision.image_size
    found = [Pixels("pixel_values", size, "squash", "bicubic", [0, 0, 0], mean=list(IMAGE_MEAN), std=list(IMAGE_STD))]
    if dims.tagger:
        side, mean, std = dims.tagger.swin.image_size, list(IMAGENET_MEAN), list(IMAGENET_STD)
        found.append(Pixels("tag_pixel_values", side, "squash", "bilinear", [0, 0, 0], mean=mean, std=std))
    return found


def plan(checkpoint: Checkpoint) -> ExportPlan:
    """What export lowers: EVA with its taps, aggregator, Q-Former, tagger, and the T5 in three graphs."""
    dims: LionDims = checkpoint.dims
    names = list(tensor_shapes(dims))

    def part(prefix: str, make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        weights = Part(checkpoint.tensors, names, prefix)
        return lambda: filled(make(), weights)

    stages, visual = _stages(dims, part)
    language_model = part("language_model.", lambda: T5(dims.language))
    sources: list[Source] = [*preprocessing(dims)]
    examples: dict[str, np.ndarray] = {}
    files = {"tokenizer.json": checkpoint.tokenizer / "tokenizer.json"}
    tokenizers = [Tokenizer("language_model", "json", "tokenizer.json", ends=["</s>"])]
    constants: dict[str, Callable[[], np.ndarray]] = {}
    if dims.qformer.vocabulary and "query" in dims.levels:
        files[READER.file] = question_tokenizer(checkpoint.tokenizer)
        tokenizers.append(READER)
        heard = Text("question", QUESTION, dims.question_length, cut="left")
        reader = JsonTokenizer(question_tokenizer(checkpoint.tokenizer), READER)
        sources.append(heard)
        examples["question"] = question_ids(heard, reader, CAPTION_QUESTIONS[0])
    if dims.language.bottleneck:
        sources.append(Task("task", TASKS, CUES))
        examples["task"] = np.array([TASKS["caption"]], np.int64)
    if dims.tagger:
        tags, thresholds = tags_of(checkpoint.tokenizer)
        if checkpoint.source["kind"] == "random" and len(tags) != dims.tagger.tags:
            tags, thresholds = [f"tag {number}" for number in range(dims.tagger.tags)], [0.5] * dims.tagger.tags
        sources.append(Labels("tags", "tag_chances", tags, thresholds, around=TAGGED))
        constants["soft_prompt"] = lambda: checkpoint.tensors["soft_prompt"].float().numpy()[None]  # [1,D]
    return ExportPlan(
        tasks=["captioning", "visual question answering", "referring comprehension", "region captioning"],
        sources=sources,
        stages=stages,
        tokenizers=tokenizers,
        language_model=LanguageModelExport(
            dims.language,
            checkpoint.tokenizer,
            lambda: T5Reference(language_model()),  # type: ignore[arg-type]
            kind="seq2seq",
            parts=_parts(dims, language_model),
            start=0,
        ),
        prompt=prompt(visual, dims.language.bottleneck > 0, dims.tagger is not None),
        answers=[BOX] if dims.language.bottleneck else [],  # BLIP was not taught boxes
        generation=Generation(max_tokens=256, beams=dims.beams, repeat_penalty=dims.repeat_penalty),
        licences={"weights": checkpoint.source.get("licence", "see the checkpoint's own licence")},
        constants=constants,
        files=files,
        examples=examples,
        question=CAPTION_QUESTIONS[0],
    )


def _stages(
    dims: LionDims, part: Callable[[str, Callable[[], nn.Module]], Callable[[], nn.Module]]
) -> tuple[list[StageExport], list[str]]:
    """The stages in order, and the tensors of a picture in the prompt."""
    side, rows, width = dims.vision.image_size, dims.vision.patches + 1, dims.language.width
    taps = [TensorSpec(f"features_{tap}", "float32", [1, rows, dims.vision.width]) for tap in dims.vision.taps]
    pixels = TensorSpec("pixel_values", "float32", [1, 3, side, side])
    stages = [StageExport("vision_encoder", part("vision_encoder.", lambda: EvaEncoder(dims.vision)), [pixels], taps)]
    visual = []
    if "query" in dims.levels:
        reads = [taps[0]]
        if dims.qformer.vocabulary:
            reads.append(TensorSpec("question", "int64", [1, dims.question_length]))
        embeds = TensorSpec("query_embeds", "float32", [1, dims.qformer.queries, width])
        stages.append(StageExport("queries", part("queries.", lambda: Queries(dims)), reads, [embeds]))
        visual.append(embeds.name)
    if "region" in dims.levels:
        embeds = TensorSpec("region_embeds", "float32", [1, rows, width])
        stages.append(StageExport("aggregator", part("aggregator.", lambda: Aggregator(dims)), taps, [embeds]))
        visual.append(embeds.name)
    if dims.language.bottleneck:
        row = TensorSpec("task_row", "float32", [1, 1, width])
        stages.append(StageExport("task", lambda: TaskRow(dims), [TensorSpec("task", "int64", [1])], [row], ("fp32",)))
    if dims.tagger:
        tagger, size = dims.tagger, dims.tagger.swin.image_size
        seen = TensorSpec("tag_pixel_values", "float32", [1, 3, size, size])
        chances = TensorSpec("tag_chances", "float32", [1, tagger.tags])
        stages.append(StageExport("tagger", part("tagger.", lambda: Tagger(tagger)), [seen], [chances]))
    return stages, visual


def _parts(dims: LionDims, model: Callable[[], nn.Module]) -> list[StageExport]:
    """The T5 in three graphs."""
    specs = part_specs(dims.language)
    modules: dict[str, Callable[[T5], nn.Module]] = {"embed": EmbedPart, "encoder": EncoderPart, "decoder": DecoderPart}
    return [
        StageExport(name, lambda make=make: make(model()), *specs[name], float32=wide_products(dims.language))  # type: ignore[misc]
        for name, make in modules.items()
    ]
