"""Loading a bundle: what is checked before, and what is in memory when."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from pathlib import Path

from mllm_edge.bundle.check import locate
from mllm_edge.bundle.manifest import Manifest
from mllm_edge.bundle.read import read_manifest
from mllm_edge.errors import BadInput, MllmEdgeError, look_up
from mllm_edge.machine.threads import most_threads, usable_cores
from mllm_edge.quants import KV_TYPES
from mllm_edge.runtime.decoding.tokenizers import KINDS as TOKENIZERS
from mllm_edge.runtime.engines.interface import LanguageModel, Options
from mllm_edge.runtime.engines.lazy import LazyStage, lazy_language_model
from mllm_edge.runtime.engines.table import LANGUAGE_MODEL_ENGINES, STAGE_ENGINES
from mllm_edge.runtime.memory import plan_memory, stage_bytes
from mllm_edge.runtime.model import Model
from mllm_edge.runtime.sources import Held
from mllm_edge.runtime.wiring import needed_for, taggers
from mllm_edge.targets import TARGETS

DEFAULT_CONTEXT = 4096  # positions, where the bundle allows more: the KV cache of a longer one must be asked for


def load(
    folder: str | os.PathLike[str],
    target: str | None = None,
    threads: int | None = None,
    kv_type: str = "f16",
    context: int | None = None,
    verify_hash: bool = True,
    memory_budget: int | None = None,
    gpu_layers: int | None = None,
    tagger: bool = True,
) -> Model:
    """Load a bundle. The manifest, its files' hashes and all dims are checked before any engine starts.

    Args:
        folder: the bundle.
        target: run on "cpu" or "cuda" whatever the bundle was made for; then an engine without it is an error. By
            default the bundle's own target, and what cannot run there runs on the CPU, with a warning. "trt" runs the
            TensorRT engines of a bundle that was made for it, and never anything instead; "ort-rtx" has ONNX Runtime's
            TensorRT-RTX provider run the graphs.
        threads: CPU threads; by default the physical cores that this process may use.
        kv_type: element type of the KV cache: "f32", "f16" or "q8_0".
        context: positions, at most the bundle's; by default the bundle's, up to 4096.
        verify_hash: compare SHA-256 of every file.
        memory_budget: bytes that the process may have resident on a CPU. Where the whole bundle needs more, stages are
            loaded for their use and unloaded after it, and in the end the language model, too, while masks or pictures
            are made.
        gpu_layers: how many layers of the language model go to the GPU; by default as many as fit its free memory.
        tagger: whether to have the stages that find tags for the prompt; without them tags are given or left out.

    Returns:
        A `Model`; use it as a context manager or call `close`.

    Raises:
        BadInput: the bundle or an argument is not usable.
        MllmEdgeError: an engine or the target is not available on this machine.
        MissingPackage: an engine is not installed.
    """
    start = time.perf_counter()
    folder = Path(folder)
    manifest = read_manifest(folder, verify_hash, engines=target in (None, "trt"))
    if not tagger:
        manifest = _without_tagger(manifest)
    options = options_for(manifest, target, threads, kv_type, context, memory_budget, gpu_layers)
    place = plan_memory(manifest, options, memory_budget)
    pictures = [name for slot in manifest.prompt.slots if slot.of == "pixels" for name in slot.tensors]
    first = needed_for(pictures, manifest.stages)
    with contextlib.ExitStack() as opened:
        options = on_device(manifest, folder, options, opened)
        sizes = {entry.name: stage_bytes(entry) for entry in manifest.stages}
        later = sum(size for name, size in sizes.items() if name not in first)  # those are loaded before the decoder
        reserve = later if place.keep_stages else max(sizes.values(), default=0)
        options = dataclasses.replace(options, gpu_reserve=reserve)
        stages = lazy_stages(manifest, folder, options, opened, place.keep_stages)
        for name, stage in stages.items():
            if name in first and place.keep_stages:
                stage.load()
        tokenizers = {}
        for tokenizer in manifest.tokenizers:
            tokenizers[tokenizer.name] = TOKENIZERS[tokenizer.kind](locate(folder, tokenizer.file), tokenizer)
            opened.callback(tokenizers[tokenizer.name].close)
        decoder = manifest.language_model
        make = functools.partial(LANGUAGE_MODEL_ENGINES[decoder.engine], folder, decoder, options)
        language_model: LanguageModel = make() if place.keep_language_model else lazy_language_model(make)
        opened.callback(language_model.close)
        load_ms = 1000 * (time.perf_counter() - start)
        held = Held(folder, tokenizers)
        model = Model(manifest, stages, language_model, held, load_ms, opened, place, options.target)
        model.opened = opened.pop_all()
        return model


def _without_tagger(manifest: Manifest) -> Manifest:
    left_out = taggers(manifest.prompt, manifest.answers, manifest.stages, manifest.sources)
    if not left_out:
        raise BadInput("this bundle has no tagger; load it without --no-tagger")
    return dataclasses.replace(manifest, stages=[stage for stage in manifest.stages if stage.name not in left_out])


def lazy_stages(
    manifest: Manifest, folder: Path, options: Options, opened: contextlib.ExitStack, keep: bool = True
) -> dict[str, LazyStage]:
    """The manifest's stages by name, none of them loaded; `opened` closes them."""
    stages: dict[str, LazyStage] = {}
    for entry in manifest.stages:
        engine = functools.partial(STAGE_ENGINES[entry.engine], locate(folder, entry.file), entry, options)
        stages[entry.name] = LazyStage(entry, engine, keep)
        opened.callback(stages[entry.name].close)
    return stages


def on_device(manifest: Manifest, folder: Path, options: Options, opened: contextlib.ExitStack) -> Options:
    """The options with the GPU that engines share, where they share one. Raises MllmEdgeError where it cannot run what
    the manifest has."""
    if options.target != "trt":
        return options
    from mllm_edge.runtime.engines.tensorrt.stage import Device

    device = Device(manifest)
    opened.callback(device.close)
    device.check(manifest, folder)
    return dataclasses.replace(options, device=device)


def options_for(
    manifest: Manifest,
    target: str | None,
    threads: int | None,
    kv_type: str = "f16",
    context: int | None = None,
    memory_budget: int | None = None,
    gpu_layers: int | None = None,
) -> Options:
    """How engines are to run; see `load`. Raises BadInput or MllmEdgeError where they cannot."""
    wanted, longest = target or manifest.target, manifest.language_model.context
    look_up("target", wanted, TARGETS)
    look_up("KV cache type", kv_type, KV_TYPES)
    if wanted == "trt" and manifest.target != "trt":
        raise MllmEdgeError(f"the bundle was made for {manifest.target}; export it with --target trt")
    if manifest.language_model.engine == "onnx" and (kv_type == "q8_0" or gpu_layers is not None):
        which = "the KV cache is f32; leave out --kv-type" if kv_type == "q8_0" else "leave out --gpu-layers"
        raise BadInput(f"this bundle's language model runs on ONNX Runtime, where {which}")
    if gpu_layers is not None and gpu_layers < 0:
        raise BadInput(f"gpu_layers is {gpu_layers}; it must be 0 or more")
    if threads is not None and not 1 <= threads <= most_threads():
        raise BadInput(f"threads is {threads}; it must be at least 1, and on this machine at most {most_threads()}")
    if context is not None and not 1 <= context <= longest:
        raise BadInput(f"context is {context}; this bundle takes 1 to {longest}")
    return Options(
        target=wanted,
        strict=target is not None,
        threads=threads or usable_cores(),
        kv_type=kv_type,
        context=context or min(longest, DEFAULT_CONTEXT),
        lean=memory_budget is not None,
        gpu_layers=gpu_layers,
    )
