"""A tokenizer's files as one `tokenizer.json`: also where there are only vocab.json and merges.txt (GPT-2, OPT)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_edge.bundle.read import read_text
from mllm_edge.errors import BadInput

LISTS = ("vocab.json", "merges.txt")
ROLES = ("bos", "eos", "unk", "pad", "cls", "sep", "mask")
_MOST_BYTES = 256 << 20
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file. Raises BadInput where it is no JSON."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(read_text(path, _MOST_BYTES))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not valid JSON ({error}); copy it again") from None
    return data if isinstance(data, dict) else {}


def role_names(folder: Path) -> dict[str, str]:
    """The token of each role (bos, eos, ...) that the configuration names."""
    named = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
    roles: dict[str, str] = {}
    for role in ROLES:
        value = named.get(f"{role}_token")
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            roles[role] = text
    return roles


def tokenizer_json(folder: Path) -> dict[str, Any]:
    """`tokenizer.json`, or what it would say of vocab.json and merges.txt; empty where there is neither.

    Of the added tokens of those two the ones with a role are special, as in transformers 4's slow GPT2Tokenizer.

    Raises:
        BadInput: a file that cannot be read.
    """
    data = read_json(folder / "tokenizer.json")
    if data or not all((folder / name).is_file() for name in LISTS):
        return data
    vocabulary = _ids(folder / LISTS[0])
    lines = read_text(folder / LISTS[1], _MOST_BYTES).split("\n")
    merges = [line for line in lines[lines[0].startswith("#version") :] if line]
    if not all(len(line.split(" ")) == 2 for line in merges):
        raise BadInput(f"{folder / LISTS[1]} has lines that are not two tokens; copy it again")
    return {
        "version": "1.0",
        "added_tokens": _added(folder, vocabulary),
        "normalizer": None,
        "pre_tokenizer": dict(_BYTE_LEVEL),
        "post_processor": None,
        "decoder": dict(_BYTE_LEVEL),
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }


def _ids(path: Path) -> dict[str, int]:
    """Tokens and their numbers."""
    table = read_json(path)
    if not all(type(number) is int and number >= 0 for number in table.values()):
        raise BadInput(f"{path} is no table of tokens and their numbers; copy it again")
    return table


def _added(folder: Path, vocabulary: Mapping[str, int]) -> list[dict[str, Any]]:
    roles = set(role_names(folder).values())
    extra = _ids(folder / "added_tokens.json")
    known = {**vocabulary, **extra}
    found = {known[text]: {"content": text, **_FLAGS, "special": True} for text in roles if text in known}
    for text, number in extra.items():
        found.setdefault(number, {"content": text, **_FLAGS, "special": False})
    for key, entry in read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
        found[int(key)] = {**_FLAGS, **entry, "normalized": False}
    return [{"id": number, **entry} for number, entry in sorted(found.items())]


def extend(
    source: Path, folder: Path, special: Sequence[str], plain: Sequence[str], config: Mapping[str, Any] | None = None
) -> None:
    """Write a byte-level tokenizer with more added tokens; new ones get the ids after its last, in order.

    Args:
        source: a folder with tokenizer.json, or vocab.json and merges.txt.
        folder: gets `tokenizer.json` and `tokenizer_config.json`.
        special: control tokens, which are never shown.
        plain: tokens that any text may mean, and that are shown as they are.
        config: what the configuration says where `source` does not, such as `{"bos_token": "</s>"}`.

    Raises:
        BadInput: there is no such tokenizer, or it cannot be read.
    """
    data = tokenizer_json(source)
    if not isinstance(data.get("model", {}).get("vocab"), dict):
        raise BadInput(f"{source} has neither tokenizer.json nor {' and '.join(LISTS)}; copy the tokenizer there")
    marked = {entry["content"]: entry["id"] for entry in data["added_tokens"]}
    ids = {**data["model"]["vocab"], **marked}
    for text in (*special, *plain):
        if text not in marked:
            marked[text] = ids.get(text, max(0, *ids.values(), *marked.values()) + 1)
            data["added_tokens"].append({"id": marked[text], "content": text, **_FLAGS, "special": text in special})
    data["added_tokens"].sort(key=lambda entry: entry["id"])
    kept = {f"{role}_token": text for role, text in role_names(source).items()}
    flags = {key: value for key, value in read_json(source / "tokenizer_config.json").items() if key == "add_bos_token"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    settings = json.dumps({**(config or {}), **kept, **flags}, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")
