"""llama.cpp as the language model: embeddings in, logits and final-norm hidden states out."""

from __future__ import annotations

import ctypes
import os
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np

from mllm_edge.bundle.check import locate
from mllm_edge.bundle.manifest import LanguageModelEntry
from mllm_edge.errors import BadInput, MllmEdgeError, look_up
from mllm_edge.quants import KV_TYPES, PLAIN
from mllm_edge.runtime.engines.interface import Floats, Options, Step
from mllm_edge.runtime.engines.llama import gpu_layers, probe
from mllm_edge.runtime.engines.llama.embedding import EmbeddingRows
from mllm_edge.runtime.engines.llama.interrupt import interruptible
from mllm_edge.runtime.engines.llama.library import library, recent_errors
from mllm_edge.runtime.engines.llama.sound import require_sound
from mllm_edge.targets import TARGETS

# Whether attention is flash attention, by KV type: on a CPU it computes in f16 whatever the cache holds, so f32 does
# without (measured: logits of size 10 within 3e-6 of PyTorch's, against 7e-3); a q8_0 cache exists only with it.
FLASH = {"f32": "DISABLED", "f16": "AUTO", "q8_0": "ENABLED"}
OUTPUTS = 64  # positions of a batch whose hidden states can be read: a forced group is one batch
MICRO_BATCH = 512  # positions computed at once; more would only make the scratch buffers larger


class LlamaLanguageModel:
    """A GGUF model with one sequence of positions; see `interface.LanguageModel`.

    Raises:
        BadInput: a file that llama.cpp cannot load, or not the model that the manifest describes; an unknown KV type; a
            context beyond learned positions.
        MllmEdgeError: a GPU was asked for and this llama.cpp has none; not enough memory.
        MissingPackage: llama-cpp-python is not installed.
    """

    keeps = True

    def __init__(self, folder: Path, spec: LanguageModelEntry, options: Options):
        look_up("KV cache type", options.kv_type, KV_TYPES)
        assert spec.gguf is not None  # as the manifest's check says
        self._path = path = locate(folder, spec.gguf.file)
        self.context = options.context
        self._rows = EmbeddingRows(path, spec.gguf.embedding)
        self._llama = library()
        require_sound(path)
        layers = gpu_layers.layers(self._llama, spec.gguf, options) if _gpu(self._llama, options) else 0
        self._on_gpu = layers > 0
        self._model = _load(self._llama, path, spec.precision, layers)
        # Also runs when the interpreter ends, before llama.cpp's own static objects go.
        self._free_model = weakref.finalize(self, self._llama.llama_model_free, self._model)
        vocab = self._llama.llama_model_get_vocab(self._model)
        self.vocabulary = int(self._llama.llama_vocab_n_tokens(vocab))
        self.width = int(self._llama.llama_model_n_embd(self._model))
        if (self.vocabulary, self.width) != (spec.vocabulary, spec.width):
            raise BadInput(
                f"{path} has {self.vocabulary} tokens of width {self.width}, but the manifest says {spec.vocabulary} "
                f"of {spec.width}; export the bundle again"
            )
        trained = int(self._llama.llama_model_n_ctx_train(self._model))
        learned = self._llama.llama_model_rope_type(self._model) == self._llama.LLAMA_ROPE_TYPE_NONE
        if learned and options.context > trained:  # llama.cpp would end the process at the first that is missing
            raise BadInput(f"{path} has {trained} positions, not {options.context}; load it with --context {trained}")
        self._context = self._new_context(options)
        self._free_context = weakref.finalize(self, self._llama.llama_free, self._context)

    def _new_context(self, options: Options) -> int:
        llama = self._llama
        settings = llama.llama_context_default_params()
        settings.n_ctx = settings.n_batch = options.context
        settings.n_ubatch = min(MICRO_BATCH, options.context)
        settings.n_outputs_max = OUTPUTS
        settings.n_threads = settings.n_threads_batch = options.threads
        settings.pooling_type = llama.LLAMA_POOLING_TYPE_NONE
        settings.type_k = settings.type_v = getattr(llama, f"GGML_TYPE_{options.kv_type.upper()}")
        settings.flash_attn_type = getattr(llama, f"LLAMA_FLASH_ATTN_TYPE_{FLASH[options.kv_type]}")
        settings.offload_kqv = settings.op_offload = self._on_gpu
        settings.no_perf = True
        recent_errors.clear()
        context: int | None = llama.llama_init_from_model(self._model, settings)
        if not context:
            reason = "; ".join(recent_errors) or "not enough memory"
            raise MllmEdgeError(
                f"{self._path}: cannot make a {options.kv_type} KV cache of {options.context} positions ({reason}); "
                "use a smaller context or another KV type"
            )
        return context

    def embed(self, ids: Sequence[int]) -> Floats:
        """Rows of the embedding table, float32 [T,D]."""
        return self._rows[ids]

    def prefill(self, embeds: Floats, keep: int = 0, state: bool = False) -> Step:
        """Keep the first `keep` positions, append `embeds` [T,D] in one batch and return the last position's step.

        Raises:
            MllmEdgeError: a wrong shape, more positions than the context has, fewer than `keep` present, or a failure
                of llama.cpp.
        """
        self._check_open()
        embeds = np.ascontiguousarray(embeds, np.float32)
        if embeds.ndim != 2 or embeds.shape[1] != self.width or len(embeds) == 0:
            raise MllmEdgeError(f"the language model takes embeddings [T,{self.width}], T > 0; got {embeds.shape}")
        self._check_room(keep + len(embeds))
        if keep > self._length():
            raise MllmEdgeError(f"cannot keep {keep} positions, only {self._length()} are there")
        memory = self._llama.llama_get_memory(self._context)
        if not self._llama.llama_memory_seq_rm(memory, 0, keep, -1):
            raise MllmEdgeError(f"{self._path}: this model cannot be rewound to {keep} positions")
        with interruptible(self._llama, self._context):
            if state and len(embeds) > 1:  # with embeddings on, llama.cpp outputs every position of a batch
                self._decode(embeds=embeds[:-1], states=0)
                embeds = embeds[-1:]
            return self._decode(embeds=embeds, states=int(state))

    def extend(self, ids: Sequence[int], states: int = 0) -> Step:
        """Append tokens. Raises MllmEdgeError when the context is full or a token unknown."""
        self._check_open()
        for token in ids:
            self._check_token(token)
        self._check_room(self._length() + len(ids))
        if len(ids) <= OUTPUTS:
            return self._decode(tokens=ids, states=states)
        hidden: list[Floats] = []
        for start in range(0, len(ids), OUTPUTS):
            part = ids[start : start + OUTPUTS]
            step = self._decode(tokens=part, states=max(0, states - (len(ids) - start - len(part))))
            hidden.append(step.hidden)
        return Step(step.logits, np.concatenate(hidden)[-states:] if states else step.hidden)

    def about(self) -> str:
        """llama.cpp's own line about its build."""
        return str(self._llama.llama_print_system_info().decode().strip())

    def close(self) -> None:
        """Free the model and its KV cache."""
        self._free_context()
        self._free_model()

    def _length(self) -> int:
        return int(self._llama.llama_memory_seq_pos_max(self._llama.llama_get_memory(self._context), 0)) + 1

    def _decode(self, *, tokens: Sequence[int] = (), embeds: Floats | None = None, states: int) -> Step:
        """One batch; positions and sequence are left to llama.cpp. Its last position gives logits, and the last
        `states` positions, at most all of the batch, their hidden states."""
        llama = self._llama
        llama.llama_set_embeddings(self._context, states > 0)
        batch = llama.llama_batch(n_tokens=len(tokens) if embeds is None else len(embeds))
        if embeds is None:
            batch.token = (llama.llama_token * len(tokens))(*tokens)
        else:
            batch.embd = embeds.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        recent_errors.clear()
        status = llama.llama_decode(self._context, batch)
        if status != 0:
            reason = "; ".join(recent_errors) or "no reason given"
            raise MllmEdgeError(f"{self._path}: llama.cpp could not decode (status {status}: {reason})")
        logits = _view(llama.llama_get_logits_ith(self._context, -1), self.vocabulary).copy()  # [V]
        last = range(-min(states, batch.n_tokens), 0)
        hidden = np.empty((len(last), self.width), np.float32)  # [S,D]
        for row, place in enumerate(last):
            hidden[row] = _view(llama.llama_get_embeddings_ith(self._context, place), self.width)
        return Step(logits, hidden)

    def _check_room(self, positions: int) -> None:
        if positions > self.context:
            raise MllmEdgeError(f"{positions} positions do not fit the context of {self.context}; load a larger one")

    def _check_token(self, token: int) -> None:
        if not 0 <= token < self.vocabulary:  # llama.cpp would end the process
            raise MllmEdgeError(f"token ids must be below {self.vocabulary}; got {token}")

    def _check_open(self) -> None:
        if not self._free_model.alive:
            raise MllmEdgeError("the language model is closed; load the bundle again")


def _view(pointer: Any, size: int) -> Floats:
    """llama.cpp's own memory, until its next call."""
    return cast("Floats", np.ctypeslib.as_array(pointer, (size,)))


def _gpu(llama: ModuleType, options: Options) -> bool:
    """Whether layers go to a GPU."""
    if not TARGETS[options.target].gpu or options.gpu_layers == 0:
        return False
    if llama.llama_supports_gpu_offload():
        return True
    why = "this llama.cpp was built without GPU support"
    line = f'CMAKE_ARGS="-DGGML_CUDA=on" {probe.REBUILD}'
    if options.strict:
        raise MllmEdgeError(f"{why}; use target cpu or rebuild it: {line}")
    warnings.warn(f"{why}, so the language model runs on the CPU; rebuild it: {line}", RuntimeWarning, stacklevel=2)
    return False


def _load(llama: ModuleType, path: Path, precision: str, layers_on_gpu: int) -> int:
    settings = llama.llama_model_default_params()
    settings.n_gpu_layers = layers_on_gpu
    settings.use_extra_bufts = probe.use_extra_buffers(path, precision)
    # Repacked weights would stand in memory beside the mapped file, twice in all.
    repacked = settings.use_extra_bufts and precision not in PLAIN
    settings.load_mode = llama.LLAMA_LOAD_MODE_NONE if repacked else llama.LLAMA_LOAD_MODE_MMAP
    recent_errors.clear()
    model: int | None = llama.llama_model_load_from_file(os.fsencode(path), settings)
    if not model:
        reason = "; ".join(recent_errors) or "no reason given"
        raise BadInput(f"{path}: llama.cpp cannot load it ({reason}); export the bundle again")
    return model
