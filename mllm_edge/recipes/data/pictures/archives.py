"""Package archives that hold pictures: fetched by the package clients, checked by hash, unpacked without install.

They are not in the repository; each has its own license.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mllm_edge.errors import BadInput, MllmEdgeError


@dataclass(frozen=True)
class Archive:
    """A package's file: `client` is pip, npm or apt; `file` is its download name; sha256 in hexadecimal."""

    client: str
    name: str
    version: str
    file: str
    sha256: str

    @property
    def requirement(self) -> str:
        """Name and version in the client's syntax."""
        return self.name + {"pip": "==", "npm": "@", "apt": "="}[self.client] + self.version


GOOGLE = Archive(
    "npm",
    "emoji-datasource-google",
    "16.0.0",
    "emoji-datasource-google-16.0.0.tgz",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
)
TWITTER = Archive(
    "npm",
    "emoji-datasource-twitter",
    "16.0.0",
    "emoji-datasource-twitter-16.0.0.tgz",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
)
FLUENT = Archive(
    "npm",
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
OPENMOJI = Archive(
    "npm",
    "openmoji",
    "17.0.0",
    "openmoji-17.0.0.tgz",
    "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
)
TUXPAINT = Archive(
    "apt",
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "tuxpaint-stamps-default_2022.06.04-1_all.deb",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
)
OPENCV_DOC = Archive(
    "apt",
    "opencv-doc",
    "4.6.0+dfsg-12",
    "opencv-doc_4.6.0+dfsg-12_all.deb",
    "4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a",
)


def fetch(archive: Archive, folder: Path) -> Path:
    """Download an archive into `folder`; an existing one is only checked.

    Raises:
        MllmEdgeError: the client is missing or failed (its last line is shown).
        BadInput: the file has the wrong hash.
    """
    path = folder / archive.file
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        commands = {
            "pip": [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", ".", archive.requirement],
            "npm": ["npm", "pack", archive.requirement],
            "apt": ["apt-get", "download", archive.requirement],
        }
        _run(commands[archive.client], folder, archive)
    if not path.is_file() or _sha256(path) != archive.sha256:
        raise BadInput(f"{path} is not the expected file of {archive.requirement}; delete it and try again")
    return path


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack an archive into `folder` once; nothing is written outside, and no partial result remains.

    Raises:
        MllmEdgeError: dpkg-deb is missing or failed.
        BadInput: the archive is damaged or holds paths that lead outside.
    """
    if folder.is_dir():
        return folder
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        if archive.suffix == ".deb":
            _run(["dpkg-deb", "-x", str(archive.resolve()), "."], part, None)
        elif archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(part)  # zipfile drops drive letters, roots and ".."
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(part, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise BadInput(f"{archive} cannot be unpacked ({error}); delete it and try again") from None
    part.rename(folder)
    return folder


def _run(command: list[str], folder: Path, archive: Archive | None) -> None:
    what = archive.requirement if archive else command[-2]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise MllmEdgeError(f"{what} needs {command[0]}, which is not installed; install it or copy the file") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise MllmEdgeError(f"{' '.join(command)} failed: {reason}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
