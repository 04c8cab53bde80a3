"""llama.cpp as the language model: embeddings in, logits and final-norm hidden states out."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mllm_edge.bundle.manifest import LanguageModelEntry
from mllm_edge.errors import BadInput, MllmEdgeError, look_up
from mllm_edge.quants import KV_TYPES, PLAIN
from mllm_edge.runtime.engines.interface import Floats, Options, Step
from mllm_edge.runtime.engines.llama import gpu_layers, probe
from mllm_edge.runtime.engines.llama.embedding import EmbeddingRows
from mllm_edge.runtime.engines.llama.interrupt import interruptible
from mllm_edge.runtime.engines.llama.library import library, recent_errors
from mllm_edge.targets import TARGETS

# Whether attention is flash attention, by KV type: on a CPU it computes in f16 whatever the cache holds, so f32 does
# without (measured: logits of size 10 within 3e-6 of PyTorch's, against 7e-3); a q8_0 cache exists only with it.
FLASH = {"f32": "DISABLED", "f16": "AUTO", "q8_0": "ENABLED"}
MICRO_BATCH = 512  # positions computed at once; more would only make the scratch buffers larger


class LlamaLanguageModel:
    """A GGUF model with one sequence of positions; see `stage.LanguageModel`.

    Raises:
        BadInput: a file that llama.cpp cannot load, or not the model that the manifest describes; an unknown KV type.
        MllmEdgeError: a GPU was asked for and this llama.cpp has none; not enough memory.
        MissingPackage: llama-cpp-python is not installed.
    """

    def __init__(self, path: Path, spec: LanguageModelEntry, options: Options):
        look_up("KV cache type", options.kv_type, KV_TYPES)
        self.spec, self._path = spec, path
        self.context = options.context
        self._rows = EmbeddingRows(path, spec.embedding)
        self._llama = library()
        layers = gpu_layers.layers(self._llama, spec, options) if _gpu(self._llama, options) else 0
        self._on_gpu = layers > 0
        self._model = _load(self._llama, path, spec, layers)
        # Also runs when the interpreter ends, before llama.cpp's own static objects go.
        self._free_model = weakref.finalize(self, self._llama.llama_model_free, self._model)
        self._vocab = self._llama.llama_model_get_vocab(self._model)
        self.vocabulary = int(self._llama.llama_vocab_n_tokens(self._vocab))
        self.width = int(self._llama.llama_model_n_embd(self._model))
        if (self.vocabulary, self.width) != (spec.vocabulary, spec.hidden_width):
            raise BadInput(
                f"{path} has {self.vocabulary} tokens of width {self.width}, but the manifest says {spec.vocabulary} "
                f"of {spec.hidden_width}; export the bundle again"
            )
        self._context = self._new_context(options)
        self._free_context = weakref.finalize(self, self._llama.llama_free, self._context)
        adds_bos = self._llama.llama_vocab_get_add_bos(self._vocab)
        self.bos = int(self._llama.llama_vocab_bos(self._vocab)) if adds_bos else None
        self.want_hidden = False

    def _new_context(self, options: Options) -> int:
        llama = self._llama
        settings = llama.llama_context_default_params()
        settings.n_ctx = settings.n_batch = options.context
        settings.n_ubatch = min(MICRO_BATCH, options.context)
        settings.n_outputs_max = 1  # only the last position's logits are ever read
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

    @functools.cached_property
    def control_tokens(self) -> Mapping[str, int]:
        """Control strings and their ids."""
        self._check_open()
        llama, vocab = self._llama, self._vocab
        control = [token for token in range(self.vocabulary) if llama.llama_vocab_is_control(vocab, token)]
        return {llama.llama_vocab_get_text(vocab, token).decode("utf-8", "replace"): token for token in control}

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Ids of a piece of text, without BOS. Control strings are plain text unless `special`."""
        self._check_open()
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        while True:
            ids = (self._llama.llama_token * room)()
            count = self._llama.llama_tokenize(self._vocab, data, len(data), ids, room, False, special)
            if count >= 0:
                return list(ids[:count])
            room = -count

    def piece(self, token: int) -> bytes:
        """The UTF-8 bytes of a token; nothing for a control token."""
        self._check_open()
        self._check_token(token)
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = self._llama.llama_token_to_piece(self._vocab, token, buffer, room, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer."""
        self._check_open()
        self._check_token(token)
        return bool(self._llama.llama_vocab_is_eog(self._vocab, token))

    def embed(self, ids: Sequence[int]) -> Floats:
        """Rows of the embedding table, float32 [T,D]."""
        return self._rows[ids]

    def prefill(self, embeds: Floats, keep: int = 0) -> Step:
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
            if self.want_hidden and len(embeds) > 1:  # with embeddings on, llama.cpp outputs every position of a batch
                self._decode(embeds=embeds[:-1], hidden=False)
                embeds = embeds[-1:]
            return self._decode(embeds=embeds, hidden=self.want_hidden)

    def step(self, token: int) -> Step:
        """Append one token. Raises MllmEdgeError when the context is full or the token unknown."""
        self._check_open()
        self._check_token(token)
        self._check_room(self._length() + 1)
        return self._decode(token=token, hidden=self.want_hidden)

    def close(self) -> None:
        """Free the model and its KV cache."""
        self._free_context()
        self._free_model()

    def _length(self) -> int:
        return int(self._llama.llama_memory_seq_pos_max(self._llama.llama_get_memory(self._context), 0)) + 1

    def _decode(self, *, token: int | None = None, embeds: Floats | None = None, hidden: bool) -> Step:
        """One batch; positions and sequence are left to llama.cpp, and only the last position gives an output."""
        llama = self._llama
        llama.llama_set_embeddings(self._context, hidden)
        batch = llama.llama_batch(n_tokens=1 if embeds is None else len(embeds))
        if embeds is None:
            batch.token = (llama.llama_token * 1)(token)
        else:
            batch.embd = embeds.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        recent_errors.clear()
        status = llama.llama_decode(self._context, batch)
        if status != 0:
            reason = "; ".join(recent_errors) or "no reason given"
            raise MllmEdgeError(f"{self._path}: llama.cpp could not decode (status {status}: {reason})")
        logits = _copy(llama.llama_get_logits_ith(self._context, -1), self.vocabulary)
        state = _copy(llama.llama_get_embeddings_ith(self._context, -1), self.width) if hidden else None
        return Step(logits, state)

    def _check_room(self, positions: int) -> None:
        if positions > self.context:
            raise MllmEdgeError(f"{positions} positions do not fit the context of {self.context}; load a larger one")

    def _check_token(self, token: int) -> None:
        if not 0 <= token < self.vocabulary:  # llama.cpp would end the process
            raise MllmEdgeError(f"token ids must be below {self.vocabulary}; got {token}")

    def _check_open(self) -> None:
        if not self._free_model.alive:
            raise MllmEdgeError("the language model is closed; load the bundle again")


def _copy(pointer: Any, size: int) -> Floats:
    return np.array(np.ctypeslib.as_array(pointer, (size,)), np.float32)


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


def _load(llama: ModuleType, path: Path, spec: LanguageModelEntry, layers_on_gpu: int) -> int:
    settings = llama.llama_model_default_params()
    settings.n_gpu_layers = layers_on_gpu
    settings.use_extra_bufts = probe.use_extra_buffers(path, spec.precision)
    # Repacked weights would stand in memory beside the mapped file, twice in all.
    repacked = settings.use_extra_bufts and spec.precision not in PLAIN
    settings.load_mode = llama.LLAMA_LOAD_MODE_NONE if repacked else llama.LLAMA_LOAD_MODE_MMAP
    recent_errors.clear()
    model: int | None = llama.llama_model_load_from_file(os.fsencode(path), settings)
    if not model:
        reason = "; ".join(recent_errors) or "no reason given"
        raise BadInput(f"{path}: llama.cpp cannot load it ({reason}); export the bundle again")
    return model
