"""Weights from disk or the hub as lazy mappings: each tensor is read on access and not cached.

Checkpoints are untrusted: pickles are read only with `weights_only=True`, and an index may only name files in its own
folder.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mllm_edge.bundle.check import is_inside
from mllm_edge.bundle.read import read_text, sha256
from mllm_edge.errors import BadInput, MissingPackage, first_line

Shape = tuple[int, ...]
STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")  # the last is diffusers'
WEIGHT_FILES = ("*.safetensors", "*.bin")
PICKLES = ("*.pth", "*.pth.tar")  # authors' own files; none is taken from the hub
TEXTS = ("*.json", "*.jinja", "*.model", "*.txt")
HUB_FILES = [*TEXTS, *WEIGHT_FILES, "README.md"]


class Tensors(Mapping[str, Tensor]):
    """Names to tensors, each created on access; `shape` does not load, `origin` says where a tensor stands."""

    def __init__(
        self,
        names: list[str],
        get: Callable[[str], Tensor],
        shape: Callable[[str], Shape],
        origin: Callable[[str], str] = str,
    ):
        self._names, self._get, self.shape, self.origin = dict.fromkeys(names), get, shape, origin

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_folder(folder: Path) -> Tensors:
    """The weights of a checkpoint's folder: safetensors or `.bin`, single or sharded with an index. A whole file is
    taken before an index beside it, which is stale then (transformers' order).

    Raises:
        BadInput: no weights, a missing or damaged shard, an index that points outside, a pickle that runs code.
    """
    for stem, suffix in itertools.product(STEMS, ("safetensors", "bin")):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.is_file():
            return open_file(single)
        if index.is_file():
            return merged([open_file(path) for path in _shards(folder, index)])
    raise BadInput(f"{folder} has no weights (model.safetensors or pytorch_model.bin); give a checkpoint's folder")


def has_weights(folder: Path) -> bool:
    """Whether `open_folder` finds something to open."""
    files = itertools.product(STEMS, ("safetensors", "bin"), ("", ".index.json"))
    return any((folder / f"{stem}.{suffix}{end}").is_file() for stem, suffix, end in files)


def open_file(path: Path, key: str = "") -> Tensors:
    """The tensors of one safetensors or `.bin` file, there below `key` where it has such a part. Raises BadInput as
    `open_folder` does."""
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_bin(path, key)


def merged(sources: list[Tensors]) -> Tensors:
    """One mapping over several; for duplicate names the later one wins."""
    owner = {name: source for source in sources for name in source}
    return Tensors(
        list(owner),
        lambda name: owner[name][name],
        lambda name: owner[name].shape(name),
        lambda name: owner[name].origin(name),
    )


def renamed(source: Tensors, rename: Callable[[str], str | None]) -> Tensors:
    """The source under other names; names that become None are left out.

    Raises:
        BadInput: two tensors get the same name.
    """
    old: dict[str, str] = {}
    for name in source:
        new = rename(name)
        if new in old:
            raise BadInput(f"{source.origin(name)} and {old[new]} are the same tensor; keep one of them")
        if new is not None:
            old[new] = name
    return Tensors(
        list(old),
        lambda name: source[old[name]],
        lambda name: source.shape(old[name]),
        lambda name: source.origin(old[name]),
    )


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


def check_shapes(tensors: Tensors, shapes: Mapping[str, Shape], where: str) -> None:
    """Compare names and shapes with what a model needs, without loading.

    Raises:
        BadInput: names the missing tensors, or the first of the wrong shape.
    """
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise BadInput(f"{where} lacks {len(missing)} tensors ({some(missing)}); give the complete checkpoint")
    for name, shape in shapes.items():
        if tensors.shape(name) != tuple(shape):
            raise BadInput(f"{where}: {name} is {tensors.shape(name)}, the config says {tuple(shape)}; they do not fit")


def check_all_used(tensors: Tensors, used: Container[str], unused: Mapping[str, str], where: str) -> None:
    """Account for every tensor: it is used, or on the list of those that are known to have no effect.

    Args:
        tensors: canonical names; what has none keeps its own.
        used: the names that the model is built of.
        unused: patterns of whole names, each with the reason why such a tensor has no effect.
        where: for the message.

    Raises:
        BadInput: names the tensors that would be dropped in silence.
    """
    known = re.compile("|".join(unused) or "(?!)")
    left = [tensors.origin(name) for name in tensors if name not in used and not known.fullmatch(name)]
    if left:
        raise BadInput(
            f"{where} has {len(left)} tensors that the model of its config has no place for ({some(left)}); "
            "they would be lost, so give a checkpoint of a supported model"
        )


def check_finite(tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Read every tensor once, before anything is made of them.

    Raises:
        BadInput: names the first tensor that holds codes instead of numbers, or values that are NaN or infinite.
    """
    for name in names:
        if name not in tensors:  # a tied head
            continue
        tensor = tensors[name]
        origin = tensors.origin(name) if isinstance(tensors, Tensors) else name
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise BadInput(f"{origin} holds {kind} codes, not weights; give the checkpoint that was not quantized")
        if not torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all():
            raise BadInput(f"{origin} has values that are NaN or infinite; download or train the checkpoint again")


def resolve_folder(weights: str) -> Path:
    """A local folder, or a hub id (org/name), fetched once into the hub's cache.

    Raises:
        BadInput: neither of the two, or the hub cannot be reached.
    """
    path = Path(weights).expanduser()
    if path.is_dir():
        return path.absolute()  # a bundle remembers it, and is verified from elsewhere
    if path.exists() or weights.count("/") != 1 or weights.startswith((".", "/", "~")) or path.parent.is_dir():
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
    """SHA-256 over the weight files, configuration, tokenizer and chat template in `folders`.

    Raises:
        BadInput: a text among them, which may be copied into a bundle, is a link out of its folder.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted({path for pattern in (*WEIGHT_FILES, *PICKLES, *TEXTS) for path in folder.glob(pattern)}):
            if path.suffix not in (".safetensors", ".bin", ".pth", ".tar") and not is_inside(path, folder):
                raise BadInput(f"{path} is a link out of its folder; copy the file itself there")
            digest.update(f"{path.name}:{sha256(path)}\n".encode())
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises BadInput when it is missing or not one."""
    if not path.is_file():
        raise BadInput(f"{path} is missing; copy the whole checkpoint")
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
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
        raise BadInput(f"{index} names tensors that no shard holds ({some(absent)}); copy all shards")
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

    return Tensors(list(shapes), get, lambda name: shapes[name], lambda name: f"{name} of {path}")


def _open_bin(path: Path, key: str = "") -> Tensors:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError:
        raise BadInput(f"{path} is refused: it wants to run code when read; convert it to safetensors") from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or ["it ends too early"])[0]
        raise BadInput(f"{path} is damaged ({reason}); copy it again") from None
    if isinstance(state, dict) and isinstance(state.get(key), dict):
        state = state[key]  # beside the optimizer and such
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise BadInput(f"{path} does not hold named tensors; give a checkpoint's weights")
    shapes = {str(name): tuple(tensor.shape) for name, tensor in state.items()}
    return Tensors(list(shapes), lambda name: state[name], lambda name: shapes[name], lambda name: f"{name} of {path}")


def _is_zip(path: Path) -> bool:
    """Whether it is torch's zip format, which can be memory-mapped; the older one must be read whole."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
