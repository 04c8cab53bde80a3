"""Small tokenizers of every family, trained here."""

import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mllm_edge.checkpoints.byte_level import PATTERNS

CORPUS = [
    "The quick brown fox jumps over the lazy dog, 12 times in 2026.",
    "What color is the circle? The circle is red. USER: ASSISTANT:",
    "def f(x): return x ** 2  # code",
    "It's they're I've; we'll see what's there!",
    "caf\u00e9 na\u00efve stra\u00dfe \u4f60\u597d \u0645\u0631\u062d\u0628\u0627 \U0001f600",
] * 20
SPECIAL = [
    {"id": 0, "content": "<unk>", "special": True},
    {"id": 1, "content": "<s>", "special": True},
    {"id": 2, "content": "</s>", "special": True},
]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def llama_sentencepiece(folder: Path, size: int = 420) -> Path:
    """`tokenizer.model` as LLaMA's: BPE, byte fallback, digits split; `<image>` and `<extra>` added after it."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        minloglevel=2,
    )
    write(folder / "added_tokens.json", {"<image>": size, "<extra>": size + 1})
    write(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    return folder


def llama_fast(folder: Path, legacy: bool) -> Path:
    """`tokenizer.json` as transformers converts LLaMA's: BPE with byte fallback, legacy or not."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=520, special_tokens=["<unk>", "<s>", "</s>", *bytes_], limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    data = json.loads(tokenizer.to_str())
    if legacy:  # the split only kept words apart in training
        data["pre_tokenizer"] = None
    size = len(data["model"]["vocab"])
    data["added_tokens"] = [
        {**FLAGS, **token} for token in [*SPECIAL, {"id": size, "content": "<image>", "special": True}]
    ]
    write(folder / "tokenizer.json", data)
    write(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})
    return folder


def byte_level(folder: Path, pre: str) -> Path:
    """`tokenizer.json` of the GPT-2 family with one of llama.cpp's pre-tokenizers."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    patterns = {name: pattern for pattern, name in PATTERNS.items()}
    if pre == "gpt-2":
        tokenizer.pre_tokenizer = whole
    elif pre == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    else:
        split = pre_tokenizers.Split(tokenizers.Regex(patterns[pre]), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|image|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<plain>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", {"eos_token": "<|end|>"})
    return folder


def gpt2_lists(folder: Path, size: int = 384) -> Path:
    """vocab.json and merges.txt alone, with OPT's first four tokens and configuration."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.model.save(str(folder))
    end = {"__type": "AddedToken", "content": "</s>", **FLAGS, "normalized": True}
    roles = {"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": "<pad>"}
    write(folder / "tokenizer_config.json", {**roles, "add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"})
    return folder


def write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")
