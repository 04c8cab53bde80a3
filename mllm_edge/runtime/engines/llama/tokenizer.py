"""The tokenizer inside a GGUF file, loaded without the weights."""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from collections.abc import Mapping
from pathlib import Path

from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.runtime.engines.llama.library import library, recent_errors
from mllm_edge.runtime.engines.llama.sound import require_sound


class GgufTokenizer:
    """See `decoding.tokenizers.Tokenizer`.

    Raises:
        BadInput: llama.cpp cannot read the file, or would not survive it.
        MissingPackage: llama-cpp-python is not installed.
    """

    def __init__(self, path: Path):
        self._llama = llama = library()
        require_sound(path)
        settings = llama.llama_model_default_params()
        settings.vocab_only = True
        recent_errors.clear()
        model = llama.llama_model_load_from_file(os.fsencode(path), settings)
        if not model:
            reason = "; ".join(recent_errors) or "no reason given"
            raise BadInput(f"{path}: llama.cpp cannot read its tokenizer ({reason}); export the bundle again")
        # Also runs when the interpreter ends, before llama.cpp's own static objects go.
        self.close = weakref.finalize(self, llama.llama_model_free, model)
        self._vocab = llama.llama_model_get_vocab(model)
        self.vocabulary = int(llama.llama_vocab_n_tokens(self._vocab))
        self.bos = int(llama.llama_vocab_bos(self._vocab)) if llama.llama_vocab_get_add_bos(self._vocab) else None
        eos = int(llama.llama_vocab_eos(self._vocab))
        self.eos = eos if eos >= 0 else None

    @functools.cached_property
    def control_tokens(self) -> Mapping[str, int]:
        """Control strings and their ids."""
        return self._of(self._llama.LLAMA_TOKEN_ATTR_CONTROL)

    @functools.cached_property
    def user_defined(self) -> Mapping[str, int]:
        """Added tokens that any text may mean, and their ids."""
        return self._of(self._llama.LLAMA_TOKEN_ATTR_USER_DEFINED)

    def _of(self, kind: int) -> Mapping[str, int]:
        self._check_open()
        llama, vocab = self._llama, self._vocab
        found = [token for token in range(self.vocabulary) if llama.llama_vocab_get_attr(vocab, token) & kind]
        return {llama.llama_vocab_get_text(vocab, token).decode("utf-8", "replace"): token for token in found}

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
        self._check(token)
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = self._llama.llama_token_to_piece(self._vocab, token, buffer, room, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer."""
        self._check(token)
        return bool(self._llama.llama_vocab_is_eog(self._vocab, token))

    def _check_open(self) -> None:
        if not self.close.alive:
            raise MllmEdgeError("the tokenizer is closed; load the bundle again")

    def _check(self, token: int) -> None:
        self._check_open()
        if not 0 <= token < self.vocabulary:  # llama.cpp would end the process
            raise MllmEdgeError(f"token ids must be below {self.vocabulary}; got {token}")
