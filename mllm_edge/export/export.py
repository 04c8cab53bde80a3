"""From a checkpoint to a verified bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_edge import models
from mllm_edge.bundle.manifest import (
    BuildSettings,
    BuiltEngine,
    EmbeddingTable,
    GgufDetails,
    LanguageModelEntry,
    Manifest,
    StageEntry,
    Tokenizer,
)
from mllm_edge.bundle.read import graph_of, write_manifest
from mllm_edge.bundle.sources import Constant, FileEntry
from mllm_edge.checkpoints.tensors import check_finite
from mllm_edge.errors import BadInput
from mllm_edge.export.cost import stage_flops
from mllm_edge.export.gguf.chat_template import chat_template
from mllm_edge.export.gguf.writer import About, export_language_model
from mllm_edge.export.onnx.footprint import activation_bytes
from mllm_edge.export.onnx.language_model import TOKENIZER, export_part, write_tokenizer
from mllm_edge.export.onnx.lower import export_stage
from mllm_edge.export.onnx.merging import with_merged_tokens
from mllm_edge.export.options import check_devices, check_language_model, check_options
from mllm_edge.export.tensorrt.build import make_engine
from mllm_edge.export.tensorrt.engine import ahead, language_model_axes, settings, stage_axes
from mllm_edge.export.verify.samples import Samples, pictures
from mllm_edge.export.verify.verify import PICTURES, require, verify
from mllm_edge.export.workplace import Finished, Workplace, disk_full_explained
from mllm_edge.models.counts import kv_bytes_per_token
from mllm_edge.models.plan import Checkpoint, ExportPlan, LanguageModelExport, StageExport
from mllm_edge.models.resolve import resolve
from mllm_edge.quants import ENGINES
from mllm_edge.runtime.engines.tensorrt.packages import RTX
from mllm_edge.runtime.turn import Drawing
from mllm_edge.targets import BUNDLES
from mllm_edge.version import __version__

if TYPE_CHECKING:
    from mllm_edge.progress import Report

log = logging.getLogger(__name__)

ENGINE_PARTS = {"encoder", "decoder"}  # of a language model
CALIBRATION_PICTURES = {"fp32": 0, "fp16": 8, "int8": 32}  # other pictures than those of the verification


def export(
    system: str,
    weights: str = "",
    config: str | None = None,
    *,
    target: str = "cpu",
    precision: str | None = None,
    quant: str | None = None,
    llm: str | None = None,
    out: str | Path | None = None,
    force: bool = False,
    devices: Sequence[str] = (),
    merge_tokens: int | None = None,
    mmproj: bool = False,
    template: str = "",
    check: bool = True,
    drawing: Drawing | None = None,
    report: Report | None = None,
) -> Path:
    """Write a system's checkpoint as a bundle.

    The bundle grows in `<out>.partial` and gets its name when it is complete and verified. When this fails or is
    interrupted, nothing is at `out`, and the same call continues where it stopped.

    Args:
        system: a name from the registry.
        weights: "random", a folder or a hub id; "" takes the weights of `config` that come with the package.
        config: of shipped or "random" weights; by default the smallest.
        target: "cpu", "cuda" or "trt".
        precision: of the stages, "fp32", "fp16" or "int8"; by default fp32 for cpu and fp16 for the others. A stage
            that is not made for it takes the last of those that it is made for.
        quant: of the language model: for llama.cpp "f32", "f16", "q8_0" (the default), "q6_k", "q5_k_m" or "q4_k_m",
            for ONNX Runtime "fp32", "fp16", "int8" (the default) or "int4".
        llm: what runs the language model: "gguf" (llama.cpp, the default where it can) or "onnx" (ONNX Runtime).
        out: the bundle's folder; by default `<system>-<config>.bundle` in the working directory.
        force: replace a bundle that is already there.
        devices: of target trt: compute capabilities such as "sm_89" or GPUs by name ("rtx-4060-laptop"), for which
            TensorRT-RTX builds engines here, and boards ("orin"), which build their own; by default the GPU of this
            machine, or usual ones.
        merge_tokens: how many tokens a picture takes, fewer than the checkpoint's: the most similar ones become their
            mean (`kernels/token_merge.py`).
        mmproj: also write llama.cpp's multimodal projector file.
        template: the prompt's name; by default the one that the checkpoint says.
        check: compare the bundle with PyTorch before it gets its name.
        drawing: how pictures of answers are made in that comparison; an answer that retrieves needs an index.
        report: called when a step begins (`seconds` None), with the `part` that is done of a long one, and when it has
            ended.

    Returns:
        The bundle's folder.

    Raises:
        BadInput: an option or the weights cannot be used, or `out` is taken.
        OutOfTolerance: the bundle differs too much from PyTorch.
        MllmEdgeError: the disk is full, or a stage cannot be lowered.
    """
    precision = check_options(target, precision)
    devices = check_devices(target, devices)
    capabilities = ahead(devices)
    how = settings(devices)
    module = models.get(system).load_module()
    checkpoint = resolve(system, weights, config, template)
    plan = module.plan(checkpoint)
    llm, quant = check_language_model(plan.language_model, llm, quant, system, target)
    if mmproj and "mmproj" not in plan.extras:
        raise BadInput(f"{system} has no multimodal projector in llama.cpp; export without --mmproj")
    if merge_tokens is not None:
        if mmproj:
            raise BadInput("llama.cpp's projector file cannot merge tokens; export without --mmproj or --merge-tokens")
        plan = with_merged_tokens(plan, merge_tokens)
    axes = stage_axes(plan.stages, plan.answers)
    if target == "trt" and llm == "onnx":
        axes |= language_model_axes(plan.language_model.dims.context, plan.generation.beams)
    how = dataclasses.replace(how, axes=axes)
    final = Path(out or f"{system}-{checkpoint.config}.bundle")
    if checkpoint.source["kind"] != "random":
        check_finite(checkpoint.tensors, module.tensor_shapes(checkpoint.dims))
    with disk_full_explained(final.parent), Workplace(final, force) as place:
        graphs = [part.name for part in plan.language_model.parts] if llm == "onnx" else ["language_model"]
        engines = len(plan.stages) + len(ENGINE_PARTS.intersection(graphs)) if capabilities else 0
        clock = _Clock(report, len(plan.stages) + engines + len(graphs) + mmproj + check)
        job = _Job(place, checkpoint, plan, target, capabilities, how, precision, llm, quant, clock)
        manifest = job.manifest()
        if mmproj:
            manifest.extra_files.append(job.extra_file("mmproj", "mmproj.gguf"))
        write_manifest(manifest, place.folder)
        if check:
            with job.clock.step("verify"):
                rows = verify(place.folder, checkpoint, plan, pictures(PICTURES), drawing)
            require(rows)
            write_manifest(dataclasses.replace(manifest, parity=rows), place.folder)
        return place.publish(entry.file for entry in manifest.files())


class _Clock:
    """Numbers the steps and reports each."""

    def __init__(self, report: Report | None, total: int):
        self._report = report or (lambda *_: None)
        self._total = total
        self._number = 0

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Callable[[float], None]]:
        """Yields what to call with the share of the step that is done."""
        self._number += 1
        self._report(name, self._number, self._total, None)
        began = time.monotonic()
        yield lambda part: self._report(name, self._number, self._total, None, part)
        self._report(name, self._number, self._total, time.monotonic() - began)


@dataclasses.dataclass
class _Job:
    """One export: makes the files of a bundle in its workplace, or takes over those of an earlier try."""

    place: Workplace
    checkpoint: Checkpoint
    plan: ExportPlan
    target: str
    capabilities: list[str]
    how: BuildSettings
    precision: str
    llm: str
    quant: str
    clock: _Clock

    def manifest(self) -> Manifest:
        """Lower all stages and the language model."""
        plan, lm = self.plan, self.plan.language_model
        room = int(lm.dims.weights * ENGINES[self.llm][self.quant].bytes_per_weight * 1.05)
        self.place.need(room, "the language model")
        stages = [self._with_engine(self._stage(stage)) for stage in plan.stages]
        tokenizers, copied = plan.tokenizers, [self._copied(name, path) for name, path in plan.files.items()]
        if self.llm == "gguf":
            language_model = self._decoder(lm)
        else:
            language_model = self._onnx_language_model(lm)
            tokenizers = [self._json(entry, copied) if entry.kind == "gguf" else entry for entry in tokenizers]
        constants = [Constant(name, self._constant(name, make())) for name, make in plan.constants.items()]
        return Manifest(
            system=self.checkpoint.system,
            config=self.checkpoint.config,
            target=self.target,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            tool_version=__version__,
            licences=plan.licences,
            source={**self.checkpoint.source, **({"prompt": plan.prompt_from} if plan.prompt_from else {})},
            tasks=plan.tasks,
            sources=[*plan.sources, *constants],
            stages=stages,
            tokenizers=tokenizers,
            language_model=language_model,
            prompt=plan.prompt,
            generation=plan.generation,
            answers=plan.answers,
            extra_files=copied,
            build=self.how,
        )

    def _constant(self, name: str, array: np.ndarray) -> FileEntry:
        path = self.place.folder / f"{name}.npy"
        np.save(path, array, allow_pickle=False)
        return self.place.entry(path)

    def _copied(self, name: str, path: Path) -> FileEntry:
        shutil.copyfile(path, self.place.folder / name)
        return self.place.entry(self.place.folder / name)

    def _json(self, entry: Tokenizer, files: list[FileEntry]) -> Tokenizer:
        """A tokenizer as a file of its own, which is added to `files`, where there is no GGUF to hold it."""
        path = self.place.folder / TOKENIZER
        made = write_tokenizer(self.plan.language_model, path, entry)
        files.append(self.place.entry(path))
        return made

    def extra_file(self, step: str, file: str) -> FileEntry:
        """A file that belongs to the bundle but to no stage."""

        def build() -> Finished:
            self.plan.extras[step](self.place.folder / file)
            return Finished([self.place.entry(self.place.folder / file)])

        with self.clock.step(step):
            return self.place.step(step, self._made_from(file=file), build).files[0]

    def _stage(self, stage: StageExport) -> StageEntry:
        precision = self.precision if self.precision in stage.precisions else stage.precisions[-1]
        if precision != self.precision:
            log.info("%s is lowered to %s: it is not made for %s", stage.name, precision, self.precision)

        def build() -> Finished:
            module = stage.module()
            weights = sum(parameter.nbytes for parameter in module.parameters())
            self.place.need(int(weights * 2.5), stage.name)  # the fp32 graph, its copy for calibration, the result
            path = self.place.folder / f"{stage.name}.onnx"
            samples = Samples(self.plan, pictures(CALIBRATION_PICTURES[precision], first=PICTURES))
            feeds = samples.inputs(stage) if precision != "fp32" else []
            built = dataclasses.replace(stage, module=lambda: module)
            data_files = export_stage(built, path, precision, feeds, for_tensorrt=self.target == "trt")
            details = {"flops": stage_flops(module, stage.inputs), "activation_bytes": activation_bytes(path)}
            return Finished([self.place.entry(file) for file in (path, *data_files)], details)

        shapes = [dataclasses.asdict(spec) for spec in (*stage.inputs, *stage.outputs)]
        sources = [dataclasses.asdict(source) for source in self.plan.sources]
        key = self._made_from(precision=precision, shapes=shapes, sources=sources, trt=self.target == "trt")
        with self.clock.step(stage.name):
            finished = self.place.step(stage.name, key, build)
        return StageEntry(
            **dataclasses.asdict(finished.files[0]),
            name=stage.name,
            engine=BUNDLES[self.target].engine,
            precision=precision,
            inputs=stage.inputs,
            outputs=stage.outputs,
            data_files=finished.files[1:],
            **finished.details,
        )

    def _part(self, part: StageExport) -> StageEntry:
        """A graph of the language model, for target trt an engine but of the table of embeddings."""
        name, for_tensorrt = f"language_model.{part.name}", self.target == "trt"
        engine = BUNDLES[self.target].engine if part.name in ENGINE_PARTS else "onnx"

        def build() -> Finished:
            path = self.place.folder / f"{name}.onnx"
            files = export_part(part, path, self.quant, for_tensorrt)
            return Finished([self.place.entry(file) for file in (path, *files)])

        shapes = [dataclasses.asdict(spec) for spec in (*part.inputs, *part.outputs)]
        with self.clock.step(name):
            key = self._made_from(quant=self.quant, shapes=shapes, trt=for_tensorrt)
            finished = self.place.step(name, key, build)
        if for_tensorrt and engine == "onnx":
            warnings.warn(f"{name} is read by ONNX Runtime: a table needs no engine", RuntimeWarning, stacklevel=2)
        entry = StageEntry(
            **dataclasses.asdict(finished.files[0]),
            name=name,
            engine=engine,
            precision=self.quant,
            inputs=part.inputs,
            outputs=part.outputs,
            data_files=finished.files[1:],
        )
        made = self._with_engine(entry) if engine == "tensorrt" else entry
        return dataclasses.replace(made, name=part.name)

    def _with_engine(self, stage: StageEntry) -> StageEntry:
        """The stage with its engine for the GPUs that are built for here."""
        if not self.capabilities:
            return stage

        def build() -> Finished:
            how = dataclasses.replace(self.how, workspace_mb=0)  # that is for boards
            made = make_engine(self.place.folder, stage, self.capabilities, RTX, how, progress)
            return Finished([FileEntry(made.file, made.bytes, made.sha256)], dataclasses.asdict(made))

        key = {"graph": graph_of(stage), "devices": self.capabilities, "version": RTX.version, "how": repr(self.how)}
        with self.clock.step(f"{stage.name} engine") as progress:
            return dataclasses.replace(
                stage, engines=[BuiltEngine(**self.place.step(f"{stage.name}.engine", key, build).details)]
            )

    def _decoder(self, lm: LanguageModelExport) -> LanguageModelEntry:
        """A causal language model: one GGUF file."""
        source = self.checkpoint.source
        about = About(
            f"{self.checkpoint.system} {self.checkpoint.config}",
            source.get("licence", ""),
            source.get("base_model", ""),
            chat_template(self.plan.prompt),
        )
        key = self._made_from(quant=self.quant, about=asdict(about))

        def build() -> Finished:
            entry = export_language_model(
                lm,
                self.place.folder / "language_model.gguf",
                self.quant,
                lambda done, total: progress(done / total),
                made_from=json.dumps(key, sort_keys=True, default=repr),
                about=about,
            )
            return Finished([FileEntry(file.file, file.bytes, file.sha256) for file in entry.files()], asdict(entry))

        with self.clock.step("language_model") as progress:
            details = self.place.step("language_model", key, build).details
        gguf = {**details["gguf"], "embedding": EmbeddingTable(**details["gguf"]["embedding"])}
        return LanguageModelEntry(**{**details, "gguf": GgufDetails(**gguf)})

    def _onnx_language_model(self, lm: LanguageModelExport) -> LanguageModelEntry:
        """ONNX parts."""
        parts = [self._part(part) for part in lm.parts]
        decoder = next(part for part in parts if part.name == "decoder")
        return LanguageModelEntry(
            name="language_model",
            engine="onnx",
            kind=lm.kind,
            precision=self.quant,
            tokenizer=lm.tokenizer_name,
            context=lm.dims.context,
            width=lm.dims.width,
            vocabulary=lm.dims.vocabulary,
            kv_bytes_per_token=kv_bytes_per_token(lm.dims),
            parts=parts,
            start=lm.start,
            flops_per_token=2 * lm.dims.product_weights,
            bytes_per_token=decoder.bytes + sum(file.bytes for file in decoder.data_files),
            encoder_flops_per_token=2 * lm.dims.prompt_weights if lm.kind == "seq2seq" else 0,
        )

    def _made_from(self, **options: Any) -> dict[str, Any]:
        weights = {"source": self.checkpoint.source, "dims": repr(self.checkpoint.dims)}
        return {"tool": __version__, **weights, **options}
