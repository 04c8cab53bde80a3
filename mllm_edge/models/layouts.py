"""Shared by the loaders of all systems: our own layout, renaming rules, and a checkpoint's source."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_edge.checkpoints.tensors import Tensors, fingerprint
from mllm_edge.errors import BadInput
from mllm_edge.models.plan import Checkpoint

if TYPE_CHECKING:
    import torch

    from mllm_edge.bundle.manifest import Prompt

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
OURS = "system"


def canonical_name(name: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    """A tensor's canonical name by the first rule that matches, or None."""
    for pattern, replacement in rules:
        if re.match(pattern, name):
            return re.sub("^" + pattern, replacement, name) if not name.endswith("position_ids") else None
    return None


def opened(
    system: str,
    folder: Path,
    config: Mapping[str, Any],
    dims: Any,
    tensors: Tensors,
    folders: Sequence[Path],
    tokenizer: Path,
    prompt: Callable[[], tuple[Prompt, str]] | None = None,
) -> Checkpoint:
    """The checkpoint in `folder`, whose weights come from `folders`."""
    source = {"kind": "checkpoint", "path": str(folder), "sha256": fingerprint(*folders)}
    if "licence" in config:
        source["licence"] = config["licence"]
    source = {**_card(folder), **source}
    return Checkpoint(system, config.get("name", folder.resolve().name), dims, tensors, tokenizer, source, prompt)


def _card(folder: Path) -> dict[str, str]:
    """Licence and base model, as the model card's head names them."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", errors="replace") as stream:
        head = re.match(r"---\n(.*?)\n---", stream.read(1 << 16), re.S)
    keys = {
        "licence": r"^license:\s*([\w.-]{1,60})",
        "base_model": r"^base_model:\s*(?:- *)?([\w.-]{1,96}/[\w.-]{1,96})",
    }
    found = {key: re.search(pattern, head[1] if head else "", re.M) for key, pattern in keys.items()}
    return {key: match[1] for key, match in found.items() if match}


def tokenizer_of(folders: Sequence[Path]) -> Path:
    """The first of a checkpoint's folders with a tokenizer. Raises BadInput where none has one."""
    for folder in folders:
        if any((folder / file).is_file() for file in TOKENIZER_FILES[:2]):
            return folder
    raise BadInput(f"{folders[0]} has no tokenizer.model or tokenizer.json; copy the checkpoint's tokenizer there")


def save(
    folder: Path,
    system: str,
    dims: Mapping[str, Any],
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    **config: str,
) -> None:
    """Write our own layout: `config.json` with `dims` and `config`, and `model.safetensors` with canonical names."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    kept = {key: tensor.detach().cpu().to(dtype).contiguous() for key, tensor in state.items()}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    text = json.dumps({OURS: system, **config, "licence": "Apache-2.0", "dims": dims}, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Copy a tokenizer's files into a checkpoint's folder."""
    for file in TOKENIZER_FILES:
        if (tokenizer / file).is_file():
            shutil.copy(tokenizer / file, folder / file)
