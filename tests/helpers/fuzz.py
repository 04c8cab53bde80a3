"""Mutated files and command lines, in children with limits of time and memory: nothing may abort, hang, ask the network
or end in a traceback. Seeded: a mutant is its kind and number.

    python tests/helpers/fuzz.py manifests gguf onnx checkpoints pictures commands -n 1000
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "tests" / "fixtures" / "schema1" / "glamm"
WEIGHTS = ROOT / "mllm_edge" / "weights" / "llava" / "tiny"
SECONDS, MEMORY = 20, 6 << 30
ODD = [
    0,
    -1,
    1,
    2**31,
    2**63,
    10**400,
    1e308,
    -0.0,
    "",
    "\x1b[2J",
    "../x",
    "/etc/passwd",
    "a" * 300,
    None,
    True,
    [],
    {},
]


def _call(*words: object) -> str:
    """The command line in this process: how it ended, or what is wrong with how it ended."""
    from mllm_edge.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    said = out.getvalue() + err.getvalue()
    if code not in (0, 1, 2) or "Traceback" in said or "--debug for the traceback" in said:
        return f"FAULT: exit code {code}: {said[-300:]!r}"
    if "\x1b" in said:
        return f"FAULT: raw control characters: {said[-300:]!r}"
    return "done" if code == 0 else "refused"


def _bytes(data: bytes, rng: np.random.Generator, head: int) -> bytes:
    """Some bytes changed, cut out, doubled or cut off, most of them near the beginning."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        most = min(len(changed), head if rng.random() < 0.8 else len(changed))
        at, what = int(rng.integers(0, most)), rng.integers(0, 5)
        if what < 3:
            changed[at] = int(rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))]))
        elif what == 3:
            changed[at : at + int(rng.integers(1, 9))] = rng.bytes(int(rng.integers(0, 9)))
        elif rng.random() < 0.2:
            del changed[at:]
        if not changed:
            changed += b"\0"
    return bytes(changed)


def _json(data: Any, rng: np.random.Generator) -> None:
    """One value somewhere in a document replaced, removed or doubled."""
    node = data
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = keys[int(rng.integers(len(keys)))]
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.8:
            node = node[key]
            continue
        what = rng.random()
        if what < 0.75:
            node[key] = ODD[int(rng.integers(len(ODD)))]
        elif what < 0.9:
            del node[key]
        elif isinstance(node, list):
            node.append(node[key])
        return


def _bundle(place: Path) -> Path:
    """A small bundle of today's schema."""
    from mllm_edge.bundle.read import read_manifest, write_manifest

    folder = place / "small.bundle"
    if not folder.exists():
        shutil.copytree(BUNDLE, folder)
        write_manifest(read_manifest(BUNDLE), folder)
    return folder


def manifests(rng: np.random.Generator, place: Path) -> str:
    """A manifest with one to three other values, inspected."""
    folder = _bundle(place)
    document = json.loads((BUNDLE if rng.random() < 0.3 else folder).joinpath("bundle.json").read_text("utf-8"))
    for _ in range(int(rng.integers(1, 4))):
        _json(document, rng)
    other = place / "mutant.bundle"
    if not other.exists():
        shutil.copytree(folder, other)
    (other / "bundle.json").write_text(json.dumps(document), encoding="utf-8")
    return _call("inspect", other)


def _asked(file: str, rng: np.random.Generator, place: Path, head: int) -> str:
    """A bundle of which one file is another, with a manifest that agrees, asked."""
    import hashlib

    folder, other = _bundle(place), place / "other.bundle"
    if not other.exists():
        shutil.copytree(folder, other)
    data = _bytes((folder / file).read_bytes(), rng, head)
    (other / file).write_bytes(data)
    document = json.loads((folder / "bundle.json").read_text("utf-8"))

    def agree(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("file") == file and "sha256" in node:
                node |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for value in node.values():
                agree(value)
        elif isinstance(node, list):
            for value in node:
                agree(value)

    agree(document)
    (other / "bundle.json").write_text(json.dumps(document), encoding="utf-8")
    result = _call("run", other, "Segment it.", "--image", _picture(place), "--threads", 1, "--max-tokens", 2)
    shutil.copy(folder / file, other / file)
    return result


def gguf(rng: np.random.Generator, place: Path) -> str:
    """A language model's file with other bytes, most of them in its head."""
    return _asked("language_model.gguf", rng, place, 40_000)


def onnx(rng: np.random.Generator, place: Path) -> str:
    """A graph with other bytes."""
    files = sorted(file.name for file in BUNDLE.glob("*.onnx"))
    return _asked(files[int(rng.integers(len(files)))], rng, place, 1 << 30)


def checkpoints(rng: np.random.Generator, place: Path) -> str:
    """A checkpoint with another config, tokenizer or head of its weights, loaded as export does before it lowers."""
    from mllm_edge.checkpoints.tensors import check_finite
    from mllm_edge.errors import MllmEdgeError
    from mllm_edge.models import get
    from mllm_edge.models.resolve import resolve

    folder = place / "checkpoint"
    if not folder.exists():
        shutil.copytree(WEIGHTS, folder)
    files = sorted(file.name for file in folder.iterdir() if file.is_file())
    file = folder / files[int(rng.integers(len(files)))]
    whole = (WEIGHTS / file.name).read_bytes()
    if file.suffix == ".json" and rng.random() < 0.7:
        document = json.loads(whole)
        _json(document, rng)
        file.write_text(json.dumps(document), encoding="utf-8")
    else:
        file.write_bytes(_bytes(whole, rng, 10_000))
    try:
        module = get("llava").load_module()
        checkpoint = resolve("llava", str(folder))
        module.plan(checkpoint)
        check_finite(checkpoint.tensors, module.tensor_shapes(checkpoint.dims))
    except MllmEdgeError as error:
        return "refused" if "\n" not in str(error) else f"FAULT: several lines: {error}"
    finally:
        file.write_bytes(whole)
    return "done"


def _picture(place: Path) -> Path:
    from PIL import Image

    path = place / "picture.png"
    if not path.exists():
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)).save(path)
    return path


def pictures(rng: np.random.Generator, place: Path) -> str:
    """A picture's file with other bytes, read and preprocessed."""
    from PIL import Image

    from mllm_edge.bundle.sources import Pixels
    from mllm_edge.errors import MllmEdgeError
    from mllm_edge.runtime.images import load_image
    from mllm_edge.runtime.preprocess import preprocess

    mode = ("RGB", "RGBA", "L", "P", "I;16", "F", "CMYK")[int(rng.integers(7))]
    kinds = {"F": ["TIFF"], "CMYK": ["JPEG", "TIFF"], "I;16": ["PNG", "TIFF"], "RGBA": ["PNG", "WEBP", "TIFF"]}
    form = str(rng.choice(kinds.get(mode, ["PNG", "BMP", "TIFF", "GIF"])))
    stream = io.BytesIO()
    Image.new(mode, (37, 23)).save(stream, form)
    path = place / f"mutant.{form.lower()}"
    path.write_bytes(_bytes(stream.getvalue(), rng, 200))
    fit = str(rng.choice(["pad", "crop", "longest", "squash"]))
    source = Pixels("pixel_values", 28, fit, "bicubic", [0, 0, 0], [0.5] * 3, [0.5] * 3)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            preprocess(load_image(path), source)
    except MllmEdgeError as error:
        return "refused" if "\n" not in str(error) else f"FAULT: several lines: {error}"
    return "done"


def commands(rng: np.random.Generator, place: Path) -> str:
    """Words of the command line in any order, with odd values."""
    bundle, picture = _bundle(place), _picture(place)
    verbs = ["systems", "recipes", "inspect", "run", "plan", "compare", "eval", "export", "train", "verify", "build"]
    options = [
        *(
            "--image",
            "--box",
            "--region",
            "--segment",
            "--describe",
            "--max-tokens",
            "--temperature",
            "--top-p",
            "--top-k",
        ),
        *("--seed", "--stop", "--beams", "--threads", "--context", "--kv-type"),
        *("--memory-budget", "--json", "--raw", "--device", "--quant", "--precision"),
        *("--config", "--task", "--steps", "--guidance", "--index", "--out"),
    ]
    values = [
        bundle,
        picture,
        place / "none",
        "0",
        "-1",
        "1",
        "1e9",
        "nan",
        "1,2,3,4",
        "a,b",
        "\x1b[2J",
        "9" * 400,
        "ü",
        "",
    ]
    words: list[object] = [str(rng.choice(verbs))]
    if words[0] in ("inspect", "run", "eval", "verify", "build"):
        words.append(bundle)
    for _ in range(int(rng.integers(0, 6))):
        words.append(str(rng.choice(options)) if rng.random() < 0.6 else values[int(rng.integers(len(values)))])
    if words[0] in ("export", "train", "eval", "verify"):
        words.append("--no-such-option")  # the long work itself is not what is tried here
    old, sys.stdin = sys.stdin, io.StringIO("What?")
    try:
        return _call(*words, *(["--max-tokens", "2"] if words[0] == "run" else []))
    finally:
        sys.stdin = old


KINDS: dict[str, Callable[[np.random.Generator, Path], str]] = {
    made.__name__: made for made in (manifests, gguf, onnx, checkpoints, pictures, commands)
}


def child(kind: str, first: int, last: int, seed: int, place: Path) -> None:
    """Try mutants; a line `number result` for each on stdout, its number before it is tried."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.chdir(place)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("a network request")

    socket.socket.connect = refuse  # type: ignore[assignment]
    socket.getaddrinfo = refuse  # type: ignore[assignment]
    for number in range(first, last):
        print(number, flush=True)
        signal.alarm(SECONDS)
        try:
            result = KINDS[kind](np.random.default_rng([seed, sum(kind.encode()), number]), place)
        except BaseException as error:  # noqa: BLE001  whatever it is, it is the finding
            result = f"FAULT: {type(error).__name__}: {error}"
        signal.alarm(0)
        print(number, " ".join(result.split())[:500], flush=True)


def fuzz(kind: str, count: int, seed: int = 0, first: int = 0) -> tuple[Counter[str], list[str]]:
    """Try mutants of a kind: how many ended how, and the faults."""
    ended: Counter[str] = Counter()
    faults: list[str] = []
    number, last = first, first + count
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        environment = {**os.environ, "XDG_CACHE_HOME": folder, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        while number < last:
            words = [sys.executable, __file__, "--child", kind, str(number), str(last), str(seed), folder]
            done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", env=environment)
            lines = [line.split(" ", 1) for line in done.stdout.splitlines() if line[:1].isdigit()]
            results = {int(line[0]): line[1] for line in lines if len(line) == 2}
            for at, result in results.items():
                ended[result.partition(":")[0]] += 1
                if result.startswith("FAULT"):
                    faults.append(f"{kind} {at}: {result}")
            tried = max((int(line[0]) for line in lines), default=number)
            if tried not in results:
                ended["FAULT"] += 1
                faults.append(f"{kind} {tried}: the child ended with {done.returncode}: {done.stderr[-300:]!r}")
            number = tried + 1
    return ended, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=list(KINDS))
    parser.add_argument("-n", "--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first mutant")
    given = parser.parse_args()
    bad = 0
    for kind in given.kinds:
        started = time.monotonic()
        ended, faults = fuzz(kind, given.count, given.seed, given.first)
        print(f"{kind}: {dict(ended)} in {time.monotonic() - started:.0f} s", flush=True)
        print("\n".join(faults), flush=True)
        bad += len(faults)
    return int(bad > 0)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), Path(sys.argv[6]))
    else:
        sys.exit(main())
