"""Weights from disk or the hub as lazy mappings: each tensor is read on access and not cached.

Checkpoints are untrusted: pickles are read only with `weights_only=True`, and an index may only name files in its own
folder.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mllm_edge.bundle.read import sha256
from mllm_edge.errors import BadInput, MissingPackage, first_line

Shape = tuple[int, ...]
WEIGHT_FILES = ("*.safetensors", "*.bin")
HUB_FILES = ["*.json", "*.model", "*.txt", "*.safetensors", "*.bin"]


class Tensors(Mapping[str, Tensor]):
    """Names to tensors, each created on access; `shape` does not load."""

    def __init__(self, names: list[str], get: Callable[[str], Tensor], shape: Callable[[str], Shape]):
        self._names, self._get, self.shape = dict.fromkeys(names), get, shape

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_folder(folder: Path) -> Tensors:
    """The weights of a checkpoint's folder: safetensors or `.bin`, single or sharded with an index.

    Raises:
        BadInput: no weights, a missing or damaged shard, an index that points outside, a pickle that runs code.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            return merged([open_file(path) for path in _shards(folder, index)])
        if single.is_file():
            return open_file(single)
    raise BadInput(f"{folder} has no weights (model.safetensors or pytorch_model.bin); give a checkpoint's folder")


def open_file(path: Path) -> Tensors:
    """The tensors of one safetensors or `.bin` file. Raises BadInput as `open_folder` does."""
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_bin(path)


def merged(sources: list[Tensors]) -> Tensors:
    """One mapping over several; for duplicate names the later one wins."""
    owner = {name: source for source in sources for name in source}
    return Tensors(list(owner), lambda name: owner[name][name], lambda name: owner[name].shape(name))


def renamed(source: Tensors, rename: Callable[[str], str | None]) -> Tensors:
    """The source under other names; names that become None are left out."""
    old = {new: name for name in source if (new := rename(name)) is not None}
    return Tensors(list(old), lambda name: source[old[name]], lambda name: source.shape(old[name]))


def random_weights(shapes: Mapping[str, Shape], seed: int = 0) -> Tensors:
    """Seeded random weights that depend only on name and seed: normal with std 0.02, norms 1, biases 0."""

    def make(name: str) -> Tensor:
        shape = shapes[name]
        if name.endswith("bias"):
            return torch.zeros(shape)
        if "norm" in name:
            return torch.ones(shape)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randn(shape, generator=generator) * 0.02

    return Tensors(list(shapes), make, lambda name: shapes[name])


def merge_lora(base: Tensors, adapter: Path) -> Tensors:
    """`base` with a peft LoRA added: W + scale * B @ A, tensor by tensor (peft's `merge_and_unload`).

    Args:
        base: weights under the names used by the adapter's model.
        adapter: a folder with `adapter_config.json` and `adapter_model.safetensors` or `.bin`.

    Raises:
        BadInput: the configuration or weights are missing, or weights (named) match no tensor of `base`.
    """
    config = read_json(adapter / "adapter_config.json")
    found = [adapter / f"adapter_model.{suffix}" for suffix in ("safetensors", "bin")]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        raise BadInput(f"{adapter} has no adapter_model.safetensors; copy the whole adapter")
    if config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise BadInput(f"{adapter} is a LoRA with DoRA or rank patterns; merge it with peft first")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or rank < 1:
        raise BadInput(f"{adapter}/adapter_config.json has no usable r and lora_alpha; copy it again")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    weights = open_file(path)
    pairs: dict[str, dict[str, str]] = {}
    for name in weights:
        module, _, kind = name.removeprefix("base_model.model.").partition(".lora_")
        pairs.setdefault(f"{module}.weight", {})[kind[:1]] = name
    unknown = [name for name, pair in pairs.items() if name not in base or pair.keys() != {"A", "B"}]
    if unknown:
        raise BadInput(f"{path} fits no weight of the base model ({_some(unknown)}); give the base it was made for")

    for name, pair in pairs.items():
        shape = (weights.shape(pair["B"])[0], weights.shape(pair["A"])[-1])
        if shape != base.shape(name):
            raise BadInput(
                f"{path}: the LoRA of {name} is for {shape}, the base has {base.shape(name)}; give its own base"
            )

    def get(name: str) -> Tensor:
        tensor = base[name]
        if name not in pairs:
            return tensor
        a, b = weights[pairs[name]["A"]].float(), weights[pairs[name]["B"]].float()
        return (tensor.float() + scale * (b @ a)).to(tensor.dtype)

    return Tensors(list(base), get, base.shape)


def check_shapes(tensors: Tensors, shapes: Mapping[str, Shape], where: str) -> None:
    """Compare names and shapes with what a model needs, without loading.

    Raises:
        BadInput: names the missing tensors, or the first of the wrong shape.
    """
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise BadInput(f"{where} lacks {len(missing)} tensors ({_some(missing)}); give the complete checkpoint")
    for name, shape in shapes.items():
        if tensors.shape(name) != tuple(shape):
            raise BadInput(f"{where}: {name} is {tensors.shape(name)}, the config says {tuple(shape)}; they do not fit")


def resolve_folder(weights: str) -> Path:
    """A local folder, or a hub id (org/name), fetched once into the hub's cache.

    Raises:
        BadInput: neither of the two, or the hub cannot be reached.
    """
    path = Path(weights).expanduser()
    if path.is_dir():
        return path
    if path.exists() or weights.count("/") != 1 or weights.startswith((".", "/", "~")):
        raise BadInput(f"{weights} is neither a checkpoint's folder nor a hub id (org/name); check the path")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ModuleNotFoundError:
        raise MissingPackage("huggingface_hub", "export") from None
    try:
        return Path(snapshot_download(weights, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(
            f"{weights} is no local folder and the hub did not give it ({first_line(error)}); check the name"
        ) from None


def fingerprint(*folders: Path) -> str:
    """SHA-256 over the weight files, configuration and tokenizer in `folders`."""
    digest = hashlib.sha256()
    patterns = (*WEIGHT_FILES, "*.json", "*.model")
    for folder in folders:
        for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
            digest.update(f"{path.name}:{sha256(path)}\n".encode())
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises BadInput when it is missing or not one."""
    if not path.is_file():
        raise BadInput(f"{path} is missing; copy the whole checkpoint")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON ({error}); copy it again") from None
    if not isinstance(data, dict):
        raise BadInput(f"{path} must hold a JSON object; copy it again")
    return data


def _shards(folder: Path, index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise BadInput(f"{index} has no weight_map of file names; copy it again")
    files = sorted(set(names.values()))
    for file in files:
        if Path(file).name != file or "\\" in file or file in ("", ".", ".."):
            raise BadInput(f"{index} points outside its folder ({file!r}); do not use this checkpoint")
        if not (folder / file).is_file():
            raise BadInput(f"{folder / file} is missing; copy all shards")
    shards = [folder / file for file in files]
    held = {name for shard in shards for name in open_file(shard)}
    absent = [name for name in names if name not in held]
    if absent:
        raise BadInput(f"{index} names tensors that no shard holds ({_some(absent)}); copy all shards")
    return shards


def _open_safetensors(path: Path) -> Tensors:
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is damaged or no safetensors file ({error}); copy it again") from None

    def get(name: str) -> Tensor:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    return Tensors(list(shapes), get, lambda name: shapes[name])


def _open_bin(path: Path) -> Tensors:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError:
        raise BadInput(f"{path} is refused: it wants to run code when read; convert it to safetensors") from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or ["it ends too early"])[0]
        raise BadInput(f"{path} is damaged ({reason}); copy it again") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise BadInput(f"{path} does not hold named tensors; give a checkpoint's weights")
    shapes = {str(name): tuple(tensor.shape) for name, tensor in state.items()}
    return Tensors(list(shapes), lambda name: state[name], lambda name: shapes[name])


def _is_zip(path: Path) -> bool:
    """Whether it is torch's zip format, which can be memory-mapped; the older one must be read whole."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
