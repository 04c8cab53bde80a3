"""Shared by the loaders of all systems: our own layout, renaming rules, and a checkpoint's source."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_edge.checkpoints.tensors import Tensors, fingerprint
from mllm_edge.models.plan import Checkpoint

if TYPE_CHECKING:
    import torch

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
    system: str, folder: Path, config: Mapping[str, Any], dims: Any, tensors: Tensors, folders: Sequence[Path]
) -> Checkpoint:
    """The checkpoint in `folder`, whose weights come from `folders`."""
    source = {"kind": "checkpoint", "path": str(folder), "sha256": fingerprint(*folders)}
    if "licence" in config:
        source["licence"] = config["licence"]
    return Checkpoint(system, config.get("name", folder.resolve().name), dims, tensors, folder, source)


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
