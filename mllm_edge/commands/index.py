"""Make an index of pictures for answers, add to it, search it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mllm_edge.commands.frame import BundleFolder, Embedding, Loading, verb
from mllm_edge.commands.screen import Screen
from mllm_edge.errors import BadInput

if TYPE_CHECKING:
    from mllm_edge.index import Made

Folders = Annotated[
    list[Path], typer.Argument(metavar="FOLDER", help="Pictures, in it and below it.", show_default=False)
]
IndexFolder = Annotated[Path, typer.Argument(metavar="INDEX", help="The index's folder.", show_default=False)]
BundleOption = Annotated[
    Path, typer.Option("--bundle", metavar="BUNDLE", help="The bundle that the index is of.", show_default=False)
]
KEPT = "the vectors so far are kept, the same command goes on behind them"


@verb("index build my.bundle photos -o photos.index", "index build my.bundle photos more/photos -o all.index --json")
def build(
    screen: Screen,
    embedding: Embedding,
    bundle: BundleFolder,
    folders: Folders,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The index's folder.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace an index that is there.")] = False,
) -> None:
    """Embed folders of pictures as an index. Cut off, the same command goes on; bad files are skipped and listed."""
    from mllm_edge import index as indexing

    screen.kept = KEPT
    started = time.monotonic()
    with _progress(screen) as report, embedding.embedder(bundle) as embedder:
        made = indexing.build(embedder, folders, out, force, report)
    _show(screen, bundle, made, started)


@verb("index add photos.index new/photos --bundle my.bundle")
def add(screen: Screen, embedding: Embedding, index: IndexFolder, folders: Folders, bundle: BundleOption) -> None:
    """Add pictures to an index. Those that it has stay; the old index is there until the new one is complete."""
    from mllm_edge import index as indexing

    screen.kept = f"the index is as it was; {KEPT}"
    started = time.monotonic()
    with _progress(screen) as report, embedding.embedder(bundle) as embedder:
        made = indexing.add(embedder, index, folders, report)
    _show(screen, bundle, made, started)


@verb(
    'index search photos.index --bundle my.bundle --text "a dog on a beach"',
    "index search photos.index --bundle my.bundle --image dog.jpg -n 3 --json",
)
def search(
    screen: Screen,
    loading: Loading,
    index: IndexFolder,
    bundle: BundleOption,
    text: Annotated[str | None, typer.Option(metavar="WORDS", help="What is looked for.")] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="A picture whose likes are looked for.")] = None,
    number: Annotated[int, typer.Option("-n", "--number", help="How many.")] = 10,
) -> None:
    """Find the pictures nearest to words or to a picture. Each with the cosine, the nearest first."""
    from mllm_edge.bundle.read import read_manifest
    from mllm_edge.runtime.answers.index import Index
    from mllm_edge.runtime.images import load_image

    if (text is None) == (image is None):
        raise BadInput("a search is for words or for a picture; give one of --text and --image")
    if number < 1:
        raise BadInput(f"{number} pictures are none; give 1 or more (-n)")
    searched = Index(index)
    if image is not None:
        picture = load_image(image)
        with loading.embedder(bundle) as embedder:
            searched.require(embedder.made_by)
            (query,) = embedder.vectors([embedder.prepare(picture)])
    else:
        searched.check(read_manifest(bundle, verify_hash=False))  # before gigabytes are loaded
        with loading.open(bundle) as model:
            query = model.query(text or "")
    found = searched.nearest(query, min(number, searched.about.count))
    document = {"index": str(index), "found": [{"file": str(each.path), "score": each.score} for each in found]}
    screen.result(document, *(f"{each.score:7.4f}  {each.path}" for each in found))


@contextlib.contextmanager
def _progress(screen: Screen) -> Iterator[Callable[[float], None]]:
    with screen.steps() as report:
        started = time.monotonic()
        yield lambda part: report("pictures", 1, 1, None, part)
        report("pictures", 1, 1, time.monotonic() - started)


def _show(screen: Screen, bundle: Path, made: Made, started: float) -> None:
    seconds = time.monotonic() - started
    skipped = [{"file": str(Path(root, file)), "reason": reason} for file, root, reason in made.skipped]
    document: dict[str, Any] = {"index": str(made.folder), "pictures": made.pictures, "added": made.added}
    document |= {"skipped": skipped, "seconds": round(seconds, 3)}
    screen.aside(
        f"{made.added} pictures added, {made.pictures} in all, {len(skipped)} files skipped, in {seconds:.1f} s; "
        f"search it: mllm-edge index search {made.folder} --bundle {bundle} --text WORDS"
    )
    screen.result(document, str(made.folder))
