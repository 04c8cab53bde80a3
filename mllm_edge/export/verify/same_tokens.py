"""Checks on a corpus of difficult strings that a bundle tokenizes like its checkpoint's tokenizer."""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mllm_edge.checkpoints.tokenizer import CONTROL, USER_DEFINED, checkpoint_tokenizer, read_tokenizer
from mllm_edge.errors import MllmEdgeError, OutOfTolerance
from mllm_edge.runtime.engines.llama.library import library

NASTY = (
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    "\t\ttabs\tinside\t",
    "windows\r\nline\r\nends\r\n",
    "What is in the picture?",
    "\nWhat color is the circle?",
    " a leading space",
    "a trailing space ",
    "two  spaces   three    four",
    "0 1 12 123 1234 12345 1234567890 3.14159 1,000,000 007",
    "2026-11-23T12:34:56Z",
    "It's they're I've we'll HE'S don't",
    "caf\u00e9 na\u00efve \u00dcber stra\u00dfe \u0152uvre \u00c5ngstr\u00f6m",
    "e\u0301 combining, \u00e9 composed",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \uc548\ub155\ud558\uc138\uc694",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\U00010348 \U0001d11e \u2603 \ufffd \u200b zero width",
    "a\u00a0no-break\u2003em\u2009thin",
    "\x01\x02\x7f control",
    "def f(x):\n    return {'a': [x**2, \"b\"]}  # done\n",
    "https://example.org/a?b=c&d=%20e#f",
    "a" * 200,
    "!!! ??? ... --- *** ### <<< >>> \\\\ //",
    "<0x0A> <unknown> </ s> < s> <|nothing|>",
    "ALLCAPS CamelCase snake_case kebab-case",
)


def assert_same_tokens(path: Path, folder: Path, corpus: Iterable[str] = NASTY) -> None:
    """Compare the tokenizer of a GGUF, or a `tokenizer.json`, with the checkpoint's on `corpus`, with and without added
    tokens in it.

    If the checkpoint's tokenizer composes Unicode first, which llama.cpp does not, composed text is compared.

    Raises:
        OutOfTolerance: names the first string that differs, with both results.
    """
    tokenizer = read_tokenizer(folder)
    expected = checkpoint_tokenizer(folder)
    texts = list(corpus)
    lead = " " if tokenizer.first_space else ""
    with (_json if path.suffix == ".json" else _gguf)(path) as (tokenize, rows):
        held = zip(tokenizer.tokens[:rows], tokenizer.types)
        added = [token for token, kind in held if kind in (CONTROL, USER_DEFINED)]
        for token in added:
            texts += [f"a{token}b", f"a {token} b", f"a  {token}  b\n", f"{token}{token}"]
        for text in texts:
            if tokenizer.normalized:
                text = unicodedata.normalize("NFC", text)
            if lead and (not text or text.startswith(tuple(added))):
                continue  # a prompt always starts with text, to which the lead applies
            got, want = tokenize(text if text.startswith(" ") else lead + text), expected(text)
            if got != want:
                raise OutOfTolerance(
                    f"{path.name} tokenizes {text!r} as {got}, the checkpoint's tokenizer as {want}; "
                    "please report this tokenizer"
                )


@contextlib.contextmanager
def _json(path: Path) -> Iterator[tuple[Callable[[str], list[int]], int]]:
    """A `tokenizer.json`, and how many tokens it has."""
    import tokenizers

    made = tokenizers.Tokenizer.from_file(str(path))
    yield lambda text: list(made.encode(text, add_special_tokens=False).ids), made.get_vocab_size()


@contextlib.contextmanager
def _gguf(path: Path) -> Iterator[tuple[Callable[[str], list[int]], int]]:
    """llama.cpp's tokenizer of a GGUF file, loaded without the weights, and how many tokens it has."""
    llama = library()
    settings = llama.llama_model_default_params()
    settings.vocab_only = True
    model = llama.llama_model_load_from_file(os.fsencode(path), settings)
    if not model:
        raise MllmEdgeError(f"llama.cpp cannot read the tokenizer of {path}; export it again")
    vocabulary = llama.llama_model_get_vocab(model)

    def tokenize(text: str) -> list[int]:
        data = text.encode()
        room = len(data) + 16
        ids = (llama.llama_token * room)()
        count = llama.llama_tokenize(vocabulary, data, len(data), ids, room, False, True)
        return list(ids[:count])

    try:
        yield tokenize, llama.llama_vocab_n_tokens(vocabulary)
    finally:
        llama.llama_model_free(model)
