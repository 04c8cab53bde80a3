"""Manifests and files: read, written, hashed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import typing
from pathlib import Path
from typing import Any, cast

from mllm_edge.bundle.check import check, locate
from mllm_edge.bundle.manifest import MANIFEST, SCHEMA, BuiltEngine, Manifest, StageEntry
from mllm_edge.bundle.sources import FileEntry
from mllm_edge.bundle.upgrade import upgrade
from mllm_edge.errors import BadInput
from mllm_edge.typed_json import UnknownKind, typed

LARGEST_TEXT = 64 << 20  # a tokenizer.json of 256,000 tokens has 34 MB
LARGEST_MANIFEST = 16 << 20
_HOLES = 1 << 30  # bytes; a larger file is not hashed where it is nearly all holes, which say nothing and cost minutes


def graph_of(stage: StageEntry) -> str:
    """What names a stage's graph and weights: the SHA-256 of its file, or of those of all its files."""
    if not stage.data_files:
        return stage.sha256
    return hashlib.sha256("".join(file.sha256 for file in (stage, *stage.data_files)).encode()).hexdigest()


def file_entry(folder: Path, file: str) -> FileEntry:
    """Size and SHA-256 of `folder/file`."""
    path = folder / file
    return FileEntry(file=file, bytes=path.stat().st_size, sha256=sha256(path))


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces. Raises BadInput for a pipe or a device, which may never end."""
    if not path.is_file():
        raise BadInput(f"{path} is missing, or no ordinary file; remove it, or copy it again")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def read_text(path: Path, most: int = LARGEST_TEXT) -> str:
    """A text in UTF-8 of at most so many bytes.

    Raises:
        BadInput: it is larger, not UTF-8, or no ordinary file.
    """
    if not path.is_file():
        raise BadInput(f"{path} is missing, or no ordinary file; copy it again")
    with path.open("rb") as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise BadInput(f"{path} is larger than {most >> 20} MB, which no such file is; check what it is")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is no text in UTF-8 ({error.reason}); copy it again") from None


def _digest(stream: typing.BinaryIO) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while piece := stream.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `bundle.json` into `folder`, replacing an older one in one step."""
    check(manifest, folder)
    temporary = folder / f".{MANIFEST}.{os.getpid()}"
    temporary.write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / MANIFEST)


def read_manifest(folder: Path, verify_hash: bool = True, engines: bool = True) -> Manifest:
    """Read and check a bundle's manifest and its files before anything is loaded.

    Args:
        folder: the bundle.
        verify_hash: also compare every file's SHA-256 (sizes are always compared).
        engines: check the files of TensorRT engines, too; only target trt runs them.

    Raises:
        BadInput: no manifest, not JSON, newer schema, wrong or missing fields, a path that leaves the folder,
            dims that disagree between stages, or a file that is missing, truncated or changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BadInput(f"{folder} is not a bundle (it has no {MANIFEST}); make one with: mllm-edge export")
    try:
        data = json.loads(read_text(path, LARGEST_MANIFEST))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not valid JSON ({error}); export the bundle again") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise BadInput(f"{path} has no schema version; export the bundle again")
    if schema > SCHEMA:
        needs = data.get("tool_version", "a newer version")
        raise BadInput(f"{path} has schema {schema}, this tool reads up to {SCHEMA}; install mllm-edge >= {needs}")
    manifest = _typed(data, path)
    check(manifest, folder)
    built = {engine.file for stage in manifest.engine_stages() for engine in stage.engines}
    for entry in manifest.files():
        if engines or entry.file not in built:
            check_file(entry, folder, verify_hash)
    return manifest


def _stored(path: Path) -> int:
    """The bytes that a file takes on the disk, or its size where the system does not tell."""
    status = path.stat()
    return status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size


def _typed(data: dict[str, Any], path: Path) -> Manifest:
    try:
        return cast("Manifest", typed(Manifest, upgrade(data), str(path)))
    except UnknownKind as error:
        needs = data.get("tool_version", "the version that wrote it")
        raise BadInput(f"{error}; install mllm-edge >= {needs}") from None
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, StopIteration) as error:
        raise BadInput(f"{path} is no manifest of schema {data['schema']} ({error!r}); export it again") from None


def check_file(entry: FileEntry, folder: Path, verify_hash: bool = True) -> None:
    """Raises BadInput where a file is missing or not the one that the manifest has."""
    path = locate(folder, entry.file)
    again = "run: mllm-edge build" if isinstance(entry, BuiltEngine) else "copy or export it again"
    if not path.is_file():
        raise BadInput(f"{path} is missing; {again}")
    if path.stat().st_size != entry.bytes:
        raise BadInput(f"{path} has {path.stat().st_size} bytes, not {entry.bytes}; {again}")
    if verify_hash and entry.bytes > _HOLES and _stored(path) < entry.bytes // 16:
        raise BadInput(f"{path} has {entry.bytes} bytes, nearly all of them holes; {again}")
    if verify_hash and sha256(path) != entry.sha256:
        raise BadInput(f"{path} does not match its SHA-256 in {MANIFEST}; {again}")
