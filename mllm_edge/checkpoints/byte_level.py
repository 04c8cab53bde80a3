"""Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM): what llama.cpp calls its parts, and what it cannot do."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mllm_edge.errors import BadInput

# The split patterns of byte-level BPE tokenizers, and llama.cpp's name for each.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}


def steps_of(spec: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be one step, a sequence or None."""
    steps: list[dict[str, Any]] = spec.get(key, [spec]) if spec else []
    return steps


def check_byte_level(folder: Path, data: dict[str, Any], pre: str, tokens: Iterable[str], merges: list[str]) -> None:
    """Refuse what llama.cpp's byte-level BPE does not do; `tokens` are the trained ones. Raises BadInput."""
    others = [step.get("type") for step in steps_of(data.get("normalizer"), "normalizers") if step.get("type") != "NFC"]
    if others:
        raise BadInput(f"{folder}/tokenizer.json has the normalizer {others[0]}, which llama.cpp has not")
    if bool(data["model"].get("ignore_merges")) == (pre == "llama-bpe"):
        return  # only with llama-bpe llama.cpp takes whole-word tokens without merging
    made = {merge.replace(" ", "", 1) for merge in merges}
    word = next((text for text in tokens if len(text) > 1 and text not in made), None)
    if word is not None:
        raise BadInput(
            f"{folder}/tokenizer.json has tokens that no merge makes ({word!r}) and an ignore_merges other than "
            f"llama.cpp's {pre}; there is no GGUF for it"
        )


def pre_tokenizer(spec: dict[str, Any] | None, folder: Path) -> str:
    """llama.cpp's name of a byte-level pre-tokenizer, deduced from its structure. Raises BadInput."""
    steps = steps_of(spec, "pretokenizers")
    if any(step.get("type") == "ByteLevel" and step.get("add_prefix_space") for step in steps):
        raise BadInput(f"{folder}/tokenizer.json has ByteLevel with add_prefix_space, which llama.cpp has not")
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0].get("pattern", {}).get("Regex")
        whole = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        if pattern in PATTERNS and whole and not steps[1].get("use_regex", True):
            return PATTERNS[pattern]
        kinds = [f"Split({pattern}, {steps[0].get('behavior')})", f"ByteLevel(use_regex={steps[1].get('use_regex')})"]
    raise BadInput(f"{folder}/tokenizer.json has a pre-tokenizer that is not known: {' + '.join(map(str, kinds))}")
