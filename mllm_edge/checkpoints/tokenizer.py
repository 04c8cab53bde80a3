"""Tokenizers of checkpoints, converted to GGUF metadata or refused where llama.cpp would tokenize differently.

Two families: SentencePiece BPE with byte fallback (LLaMA; `tokenizer.model`, or a `tokenizer.json` converted from one)
and byte-level BPE (GPT-2, OPT, Llama 3, Qwen, SmolLM; `tokenizer.json`, or vocab.json and merges.txt).
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mllm_edge.checkpoints.byte_level import check_byte_level, pre_tokenizer, steps_of
from mllm_edge.checkpoints.tokenizer_files import read_json, role_names, tokenizer_json
from mllm_edge.errors import BadInput

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types

_MOST_TOKENS = 1 << 24
_ENDS = ("eos", "eot", "eom")  # the roles of end tokens in a GGUF file


@dataclass(frozen=True)
class Added:
    """A token added to a trained vocabulary. Special ones never result from plain text.

    `flags` names its conditions on the surrounding text (lstrip, rstrip, single_word).
    """

    id: int
    text: str
    special: bool
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as stored in GGUF.

    `special` maps roles (bos, eos, unk, pad; eot and eom for more end tokens) to ids; `space_prefix`: whether every
    piece of text gets a leading space;
    `normalized`: whether the checkpoint's tokenizer composes Unicode first (llama.cpp does not).
    """

    model: str
    tokens: list[str]
    types: list[int]
    special: dict[str, int]
    add_bos: bool
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    pre: str = "default"
    space_prefix: bool = True
    first_space: bool = False
    normalized: bool = False


@functools.lru_cache(maxsize=8)
def read_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint's folder.

    Raises:
        BadInput: no tokenizer, or one (named) that llama.cpp does not support.
    """
    config = read_json(folder / "tokenizer_config.json")
    data = tokenizer_json(folder)
    added = _added_tokens(folder, config, data)
    _check_added(folder, added, data)
    _check_prefix(folder, data)
    if (folder / "tokenizer.model").is_file():
        return _with_ends(folder, _from_sentencepiece(folder, config, data, added))
    if not data:
        raise BadInput(
            f"{folder} has none of tokenizer.model, tokenizer.json, vocab.json; copy the checkpoint's tokenizer there"
        )
    model = data.get("model", {})
    if model.get("type") != "BPE":
        raise BadInput(f"{folder}/tokenizer.json is a {model.get('type')} tokenizer; llama.cpp's LLaMA needs BPE")
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise BadInput(f"{folder}/tokenizer.json has no vocabulary or no merges; copy it again")
    return _with_ends(folder, _from_bpe(folder, config, data, added))


def fitting_tokenizer(folder: Path, rows: int) -> Tokenizer:
    """The tokenizer without the added tokens that the model has no rows for, such as a <pad> that only training needed.

    Raises:
        BadInput: as `read_tokenizer`, or trained tokens or an end token are beyond the model's last row.
    """
    tokenizer = read_tokenizer(folder)
    beyond = tokenizer.tokens[rows:]
    if not beyond:
        return tokenizer
    kept = {role: token for role, token in tokenizer.special.items() if token < rows or role != "pad"}
    if any(kind not in (CONTROL, USER_DEFINED, UNUSED) for kind in tokenizer.types[rows:]) or any(
        token >= rows for token in kept.values()
    ):
        raise BadInput(
            f"{folder} has {len(tokenizer.tokens)} tokens but the model {rows} rows; use the model's tokenizer"
        )
    warnings.warn(
        f"{folder}: {', '.join(beyond[:5])} {'is' if len(beyond) == 1 else 'are'} left out: the model has no row there",
        stacklevel=2,
    )
    return replace(
        tokenizer,
        tokens=tokenizer.tokens[:rows],
        types=tokenizer.types[:rows],
        scores=tokenizer.scores[:rows],
        special=kept,
    )


def _with_ends(folder: Path, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the end tokens of generation_config.json, which the tokenizer's own eos may not be among."""
    where = folder / "generation_config.json"
    ends = read_json(where).get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends] if ends is not None else []
    for end in ends:
        if not isinstance(end, int) or not 0 <= end < len(tokenizer.tokens):
            raise BadInput(f"{where} has the eos_token_id {end!r}, which the tokenizer has not; copy both again")
    if len(ends) > len(_ENDS):
        raise BadInput(f"{where} has {len(ends)} end tokens, a GGUF file {len(_ENDS)}; leave the unusual ones out")
    return replace(tokenizer, special={**tokenizer.special, **dict(zip(_ENDS, ends))})


def lead(folder: Path) -> str:
    """The prefix of a prompt's first piece: a space if the tokenizer prefixes only the first piece, else empty.

    llama.cpp prefixes every piece of text or none, so such a tokenizer is written without prefix.
    """
    return " " if read_tokenizer(folder).first_space else ""


def require_tokens(folder: Path, tokens: Iterable[str]) -> None:
    """Raise BadInput that names the first of `tokens` that the tokenizer in `folder` lacks."""
    known = set(read_tokenizer(folder).tokens)
    lacking = next((token for token in tokens if token not in known), None)
    if lacking:
        raise BadInput(f"{folder} has no token {lacking}, which its prompts need; give the model's own tokenizer")


def checkpoint_tokenizer(folder: Path) -> Callable[[str], list[int]]:
    """The checkpoint's own tokenizer as a function from text to ids, without BOS; control strings become their ids."""
    if not (folder / "tokenizer.model").is_file() or (folder / "tokenizer.json").is_file():
        import tokenizers

        try:
            fast = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(folder)))
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception on a malformed file
            raise BadInput(f"{folder}: the tokenizer cannot be read ({error}); copy it again") from None
        return lambda text: list(fast.encode(text, add_special_tokens=False).ids)
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = read_tokenizer(folder)
    known = {text: i for i, (text, kind) in enumerate(zip(tokenizer.tokens, tokenizer.types)) if kind in (3, 4)}
    borders = re.compile("(" + "|".join(re.escape(text) for text in sorted(known, key=len, reverse=True)) + ")")

    def encode(text: str) -> list[int]:
        ids: list[int] = []
        for part in borders.split(text) if known else [text]:
            ids += [known[part]] if part in known else model.encode(part) if part else []
        return ids

    return encode


def _added_tokens(folder: Path, config: dict[str, Any], data: dict[str, Any]) -> dict[int, Added]:
    found = {i: Added(i, text, True) for text, i in read_json(folder / "added_tokens.json").items()}
    for key, entry in config.get("added_tokens_decoder", {}).items():
        found[int(key)] = _added(int(key), entry)
    for entry in data.get("added_tokens", []):
        found[entry["id"]] = _added(entry["id"], entry)
    return found


def _added(number: int, entry: dict[str, Any]) -> Added:
    flags = tuple(name for name in ("lstrip", "rstrip", "single_word") if entry.get(name))
    return Added(number, entry["content"], bool(entry.get("special")), flags)


def _check_added(folder: Path, added: dict[int, Added], data: dict[str, Any]) -> None:
    """Refuse added tokens that are not matched literally, llama.cpp supports no other match, and those on which it
    aborts."""
    texts = [token.text for token in added.values()]
    for token in added.values():
        if not isinstance(token.text, str) or not token.text or texts.count(token.text) > 1:
            raise BadInput(f"{folder}: added token {token.id} has the text {token.text!r}, empty or twice; mend it")
        if not 0 <= token.id < _MOST_TOKENS:
            raise BadInput(f"{folder}: added token {token.text!r} has the id {token.id}, which no model has; mend it")
    prefixed = _normalizer(data, "Prepend")  # a normalized token would only match after the prepended space
    moved = {entry["content"] for entry in data.get("added_tokens", []) if prefixed and entry.get("normalized")}
    for token in added.values():
        flags = [*token.flags, *(["normalized"] if token.text in moved else [])]
        if flags:
            raise BadInput(
                f"{folder}: added token {token.text!r} has {' and '.join(flags)}, which llama.cpp's tokenizer has not; "
                "use a tokenizer without"
            )


def _check_prefix(folder: Path, data: dict[str, Any]) -> None:
    """Refuse a space prefix only for pieces that have none yet: llama.cpp prefixes every piece or none."""
    for step in steps_of(data.get("pre_tokenizer"), "pretokenizers"):
        older = "always" if step.get("add_prefix_space", True) else "never"  # the setting's equivalent in older files
        if step.get("type") == "Metaspace" and step.get("prepend_scheme", older) == "always":
            raise BadInput(
                f"{folder}/tokenizer.json has Metaspace with prepend_scheme always (transformers 5 saves LLaMA's so "
                "with legacy=True), which llama.cpp has not; put the original tokenizer.model there instead of it"
            )


def _normalizer(data: dict[str, Any], kind: str) -> bool:
    return any(step.get("type") == kind for step in steps_of(data.get("normalizer"), "normalizers"))


def _roles(folder: Path, ids: dict[str, int]) -> dict[str, int]:
    """Ids of the roles that the configuration names and a GGUF file has."""
    names = role_names(folder)
    return {role: ids[names[role]] for role in ("bos", "eos", "unk", "pad") if names.get(role) in ids}


def _from_sentencepiece(
    folder: Path, config: dict[str, Any], data: dict[str, Any], added: dict[int, Added]
) -> Tokenizer:
    import sentencepiece

    proto: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")  # generated code, without types
    path = folder / "tokenizer.model"
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise BadInput(f"{path} cannot be read ({error}); copy it again") from None
    spec = proto.ModelProto()
    spec.ParseFromString(path.read_bytes())
    if spec.trainer_spec.model_type != proto.TrainerSpec.BPE:
        raise BadInput(f"{path} is not a BPE model; llama.cpp's LLaMA needs SentencePiece BPE")
    size = model.get_piece_size()
    tokens = [model.id_to_piece(i) for i in range(size)]
    scores = [model.get_score(i) for i in range(size)]
    types = [_piece_type(model, i) for i in range(size)]
    special = {role: i for role in ("bos", "eos", "unk", "pad") if (i := getattr(model, f"{role}_id")()) >= 0}
    _put_added(added, tokens, types, scores)
    ids = {text: i for i, text in enumerate(tokens)}
    first_space = _prefixes_first_only(data)
    if not data and config.get("legacy") is False:
        # The pieces of a prompt are separate strings, each with its space; only text after a control token has none.
        warnings.warn(
            f"{folder} has a LLaMA tokenizer with legacy false: after </s> it adds no space, llama.cpp does; from the "
            "second turn on one token a turn differs",
            stacklevel=3,
        )
    return Tokenizer(
        model="llama",
        tokens=tokens,
        types=types,
        scores=scores,
        special={**special, **_roles(folder, ids)},
        add_bos=bool(config.get("add_bos_token", True)),
        space_prefix=spec.normalizer_spec.add_dummy_prefix and not first_space,
        first_space=first_space,
    )


def _piece_type(model: Any, i: int) -> int:
    tests = ((model.is_unknown, UNKNOWN), (model.is_control, CONTROL), (model.is_unused, UNUSED), (model.is_byte, BYTE))
    return next((kind for test, kind in tests if test(i)), NORMAL)


def _put_added(added: dict[int, Added], tokens: list[str], types: list[int], scores: list[float] | None) -> None:
    """Write added tokens over or after the trained ones; ids without a token are marked unused."""
    for token in sorted(added.values(), key=lambda a: a.id):
        while len(tokens) <= token.id:
            tokens.append(f"[UNUSED{len(tokens)}]")
            types.append(UNUSED)
            if scores is not None:
                scores.append(-1000.0)
        if types[token.id] not in (UNKNOWN, BYTE):
            tokens[token.id], types[token.id] = token.text, CONTROL if token.special else USER_DEFINED


def _from_bpe(folder: Path, config: dict[str, Any], data: dict[str, Any], added: dict[int, Added]) -> Tokenizer:
    model = data["model"]
    vocabulary: dict[str, int] = model["vocab"]
    tokens = [f"[UNUSED{i}]" for i in range(max(vocabulary.values(), default=-1) + 1)]
    types = [UNUSED] * len(tokens)
    for text, i in vocabulary.items():
        tokens[i], types[i] = text, NORMAL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    sentencepiece_like = bool(model.get("byte_fallback"))
    scores: list[float] | None = None
    if sentencepiece_like:
        rank = {merge.replace(" ", "", 1): float(-i) for i, merge in reversed(list(enumerate(merges)))}
        scores = [rank.get(text, -1e6) for text in tokens]
        for i, text in enumerate(tokens):
            if re.fullmatch(r"<0x[0-9A-F]{2}>", text):
                types[i] = BYTE
            elif text == model.get("unk_token"):
                types[i] = UNKNOWN
    _put_added(added, tokens, types, scores)
    ids = {text: i for i, text in enumerate(tokens)}
    common: dict[str, Any] = {
        "tokens": tokens,
        "types": types,
        "special": _roles(folder, ids),
        "add_bos": _adds_bos(data, config),
        "normalized": _normalizer(data, "NFC"),
    }
    if sentencepiece_like:
        first = _prefixes_first_only(data)
        return Tokenizer(
            model="llama", scores=scores or [], space_prefix=_prefixes_all(data), first_space=first, **common
        )
    pre = pre_tokenizer(data.get("pre_tokenizer"), folder)
    trained = [text for text, kind in zip(tokens, types) if kind == NORMAL]
    check_byte_level(folder, data, pre, trained, merges)
    return Tokenizer(model="gpt2", merges=merges, pre=pre, space_prefix=False, **common)


def _adds_bos(data: dict[str, Any], config: dict[str, Any]) -> bool:
    template = (data.get("post_processor") or {}).get("single") or []
    leading = template[:1] and "SpecialToken" in template[0]
    return bool(config.get("add_bos_token", leading))


def _prefixes_all(data: dict[str, Any]) -> bool:
    """Legacy LLaMA: the normalizer prepends a space to every piece between special tokens."""
    return _normalizer(data, "Prepend")


def _prefixes_first_only(data: dict[str, Any]) -> bool:
    return '"prepend_scheme": "first"' in json.dumps(data.get("pre_tokenizer"))
