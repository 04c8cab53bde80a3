"""Indexes of pictures, made and searched by a bundle with one small graph."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls_for_tests import Call
from eye_bundle import WIDTH, photographs, seen, write_bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mllm_edge import index as indexing
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.runtime.answers import index as reading
from mllm_edge.runtime.answers.index import Index
from mllm_edge.runtime.embedding import Embedder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("eye") / "eye.bundle")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return photographs(tmp_path / "photos", range(11))


@pytest.fixture
def made(bundle: Path, photos: Path, tmp_path: Path) -> Path:
    return build(bundle, photos, out=tmp_path / "photos.index").folder


def build(bundle: Path, *folders: Path, out: Path, **options: Any) -> indexing.Made:
    with Embedder(bundle, threads=1) as embedder:
        return indexing.build(embedder, folders, out, **options)


def content(index: Path) -> dict[str, np.ndarray]:
    """The vectors of an index, by the names of their files."""
    found, vectors = Index(index), np.load(index / "vectors.npy")
    return {found.item(number)[0].name: vector for number, vector in enumerate(vectors)}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_it_holds_what_the_stages_make(bundle: Path, photos: Path, made: Path) -> None:
    files = sorted(photos.rglob("*.png"))
    assert same(content(made), {file.name: vector for file, vector in zip(files, seen(files))})
    assert np.load(made / "vectors.npy", mmap_mode="r").dtype == np.float32
    assert sorted(file.name for file in made.iterdir()) == ["index.json", "items.jsonl", "skipped.jsonl", "vectors.npy"]
    assert json.loads((made / "index.json").read_text())["roots"] == ["../photos"]
    found = Index(made).nearest(seen([files[4]])[0], 3)
    assert found[0].path.name == files[4].name and found[0].score == pytest.approx(1, abs=1e-6)
    scores = np.sort(seen(files) @ seen([files[4]])[0])[::-1]
    np.testing.assert_allclose([each.score for each in found], scores[:3], atol=1e-6)


@pytest.mark.parametrize("pictures", [1, "pictures"])
def test_batches_are_as_large_as_the_stages_take(pictures: int | str, photos: Path, made: Path, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "other.bundle", pictures)
    with Embedder(other, threads=1) as embedder:
        assert (embedder.batch, embedder.width) == (4 if pictures == "pictures" else 1, WIDTH)
    assert same(content(build(other, photos, out=tmp_path / "again.index").folder), content(made))


def test_what_a_kill_leaves_is_gone_on_with(bundle: Path, photos: Path, made: Path, tmp_path: Path) -> None:
    class KillError(Exception):
        pass

    def kill(part: float) -> None:
        if part > 0.5:
            raise KillError

    out = tmp_path / "killed.index"
    with pytest.raises(KillError):
        build(bundle, photos, out=out, report=kill)
    partial = tmp_path / "killed.index.partial"
    assert not out.exists() and 0 < len((partial / "items.jsonl").read_bytes().splitlines()) < 11
    for name in ("vectors.npy", "items.jsonl", "skipped.jsonl"):  # in the middle of a row and of a line
        with (partial / name).open("ab") as stream:
            stream.write(b'["half')
    shares: list[float] = []
    assert build(bundle, photos, out=out, report=shares.append).pictures == 11
    assert len(shares) == 1  # one batch was left
    assert same(content(out), content(made))


def test_one_that_was_left_of_other_folders_is_begun_anew(bundle: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="has no picture that can be read"):
        build(bundle, tmp_path / "empty", out=tmp_path / "index")
    assert build(bundle, photos, out=tmp_path / "index").pictures == 11


def test_an_index_is_replaced_only_when_told(bundle: Path, photos: Path, made: Path) -> None:
    before = content(made)
    with pytest.raises(BadInput, match="use --force"):
        build(bundle, photos, out=made)
    photographs(photos, range(11, 13))
    build(bundle, photos, out=made, force=True)
    assert len(content(made)) == 13 == len(before) + 2
    with pytest.raises(BadInput, match="exists and is not an index of pictures"):
        build(bundle, photos, out=photos, force=True)


def test_bad_files_are_skipped_and_listed(bundle: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "words.png").write_text("no picture")
    (photos / "half.png").write_bytes((photos / "1.png").read_bytes()[:60])
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "out.png").symlink_to(Image.new("RGB", (3, 3)).save(tmp_path / "out.png") or tmp_path / "out.png")
    Image.new("RGB", (4, 4), (0, 0, 0)).save(photos / ".hidden.png")
    (photos / "notes.txt").write_text("not looked at")
    with pytest.warns(RuntimeWarning, match="skipped") as warned:
        made = build(bundle, photos, out=tmp_path / "index")
    assert made.pictures == made.added == 11
    assert sorted(file for file, _, _ in made.skipped) == ["empty.jpg", "half.png", "out.png", "words.png"]
    assert len([each for each in warned if "skipped" in str(each.message)]) == 4
    listed = [json.loads(line) for line in (made.folder / "skipped.jsonl").read_text().splitlines()]
    assert {file: root for file, root, _ in listed} == dict.fromkeys(
        ["empty.jpg", "half.png", "out.png", "words.png"], 0
    )
    assert any("link out of its folder" in reason for _, _, reason in listed)


def test_a_picture_without_direction_is_skipped(bundle: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Embedder(bundle, threads=1) as embedder:
        black = embedder.prepare(Image.new("RGB", (4, 4)))
        assert np.isnan(embedder.vectors([{"pixels": np.zeros_like(black["pixels"])}, black])[0]).all()
        assert embedder.vectors([]).shape == (0, WIDTH)


def test_names_of_any_bytes(bundle: Path, photos: Path, tmp_path: Path) -> None:
    odd = os.fsencode(photos) + b"/caf\xe9 \n\x1b.png"
    shutil.copyfile(photos / "1.png", odd)
    made = build(bundle, photos, out=tmp_path / "index")
    assert made.pictures == 12
    found = Index(made.folder).nearest(seen([photos / "1.png"])[0], 2)
    assert {os.fsencode(each.path.name) for each in found} == {b"1.png", b"caf\xe9 \n\x1b.png"}


@settings(max_examples=8, deadline=None)
@given(st.sets(st.integers(0, 11), min_size=1), st.sets(st.integers(0, 11), min_size=1), st.booleans())
def test_add_to_one_equals_build_of_both(
    bundle: Path, tmp_path_factory: pytest.TempPathFactory, first: set[int], second: set[int], below: bool
) -> None:
    place = tmp_path_factory.mktemp("both")
    one = place / "one"
    other = one / "inner" if below else place / "other"
    for folder, numbers in ((one, first), (other, second)):
        for number in numbers:
            photographs(folder, range(number, number + 1))
    both = build(bundle, one, other, out=place / "both.index")
    build(bundle, one if not below else one / "inner", out=place / "grown.index")
    with Embedder(bundle, threads=1) as embedder:
        added = indexing.add(embedder, place / "grown.index", [other if not below else one])
        again = indexing.add(embedder, place / "grown.index", [one, other])
    assert added.pictures == both.pictures == again.pictures == len(first) + len(second)
    assert again.added == 0
    assert Index(place / "grown.index").about.count == both.pictures
    query = np.random.default_rng(0).standard_normal(WIDTH).astype(np.float32)
    scores = [[each.score for each in Index(place / name).nearest(query, 30)] for name in ("both.index", "grown.index")]
    np.testing.assert_allclose(*scores, atol=1e-6)


def test_add_tries_again_what_was_skipped(bundle: Path, photos: Path, made: Path) -> None:
    with warnings.catch_warnings(), Embedder(bundle, threads=1) as embedder:
        warnings.simplefilter("ignore")
        (photos / "late.png").write_text("not yet")
        assert [file for file, _, _ in indexing.add(embedder, made, [photos]).skipped] == ["late.png"]
        Image.fromarray(np.full((4, 4, 3), 200, np.uint8)).save(photos / "late.png")
        grown = indexing.add(embedder, made, [photos])
    assert (grown.added, grown.skipped) == (1, []) and "late.png" in content(made)


def test_add_refuses_the_index_of_another_bundle(made: Path, photos: Path, tmp_path: Path) -> None:
    for changes in ({"seed": 1}, {"width": 3}):
        other = write_bundle(tmp_path / f"{next(iter(changes))}.bundle", **changes)
        with Embedder(other, threads=1) as embedder, pytest.raises(BadInput, match="was made by another model"):
            indexing.add(embedder, made, [photos])


# Searching.


def written(folder: Path, vectors: np.ndarray) -> Path:
    """An index of these vectors whose pictures are files with other contents than pictures."""
    folder.mkdir(exist_ok=True)
    np.save(folder / "vectors.npy", vectors.astype(np.float32))
    (folder / "pictures").mkdir(exist_ok=True)
    lines = []
    for number in range(len(vectors)):
        file = folder / "pictures" / str(number)
        file.write_text(str(number))
        lines.append(json.dumps([str(number), 0, reading.sha256(file)]))
    (folder / "items.jsonl").write_text("\n".join([*lines, ""]))
    about = {"schema": 1, "made_by": "me", "width": vectors.shape[1], "count": len(vectors), "roots": ["pictures"]}
    (folder / "index.json").write_text(json.dumps(about))
    return folder


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_blocks_equal_one_sort(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Small whole numbers, so that sums are exact and equals are frequent."""
    count, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 4))
    vectors = np.array(
        data.draw(
            st.lists(st.lists(st.integers(-2, 2), min_size=width, max_size=width), min_size=count, max_size=count)
        ),
        np.float32,
    )
    query = np.zeros(width, np.float32)
    query[data.draw(st.integers(0, width - 1))] = data.draw(st.sampled_from([-4.0, 0.5, 8.0]))
    most, rows = data.draw(st.integers(1, 45)), data.draw(st.integers(1, 50))
    folder = written(tmp_path_factory.mktemp("blocks"), vectors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK", max(16, 4 * width * rows))
        found = Index(folder).search(query, most)
    scores = vectors @ (query / np.linalg.norm(query))
    order = np.argsort(-scores, kind="stable")[:most]
    assert found == [(int(number), float(scores[number])) for number in order]


def test_not_a_number_is_never_near(tmp_path: Path) -> None:
    vectors = np.eye(4, dtype=np.float32)
    vectors[0], vectors[1, 0] = np.nan, np.inf
    index = Index(written(tmp_path, vectors))
    assert [number for number, _ in index.search(np.array([1, 0, 1, 0], np.float32), 9)] == [2, 3]
    for bad in (np.zeros(4), np.full(4, np.nan)):
        with pytest.raises(MllmEdgeError, match="no direction"):
            index.search(bad.astype(np.float32), 1)
    with pytest.raises(BadInput, match="vectors of 4 values, this bundle's have 3"):
        index.search(np.ones(3, np.float32), 1)


def test_the_next_is_taken_for_pictures_that_are_gone_or_changed(tmp_path: Path) -> None:
    index = Index(written(tmp_path, np.array([[1, n / 10] for n in range(20)])))
    query = np.array([1, 0], np.float32)
    assert [each.path.name for each in index.nearest(query, 2)] == ["0", "1"]
    (tmp_path / "pictures" / "0").unlink()
    (tmp_path / "pictures" / "2").write_text("another")
    with pytest.warns(UserWarning, match="2 nearer pictures of the index .* are gone or changed"):
        assert [each.path.name for each in index.nearest(query, 3)] == ["1", "3", "4"]
    shutil.rmtree(tmp_path / "pictures")
    with pytest.raises(BadInput, match=r"leads to no picture .*put them back"):
        index.nearest(query)


# Indexes from outside.


def lines(index: Path, *items: Any) -> None:
    (index / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


def change(index: Path, **fields: Any) -> None:
    about = json.loads((index / "index.json").read_text())
    (index / "index.json").write_text(json.dumps(about | fields))


HOSTILE = {
    "no index": (lambda i: (i / "index.json").unlink(), "is no index of pictures"),
    "no JSON": (lambda i: (i / "index.json").write_text("{"), "is not valid JSON"),
    "a list": (lambda i: (i / "index.json").write_text("[]"), "must be an object; make it again"),
    "another schema": (lambda i: change(i, schema=2), "has schema 2"),
    "empty": (lambda i: change(i, count=0), "is empty"),
    "many": (lambda i: change(i, count=1 << 40), "which cannot be"),
    "more than there are": (lambda i: change(i, count=21), r"holds float32 \[20, 2\] where"),
    "wide": (lambda i: change(i, width=3), r"holds float32 \[20, 2\] where"),
    "no roots": (lambda i: change(i, roots=[]), "line 1 is no item"),
    "a root of NUL": (lambda i: change(i, roots=["\0"]), "no system can have"),
    "cut vectors": (lambda i: os.truncate(i / "vectors.npy", 200), "has 200 bytes, not the 288"),
    "cut header": (lambda i: os.truncate(i / "vectors.npy", 20), "is no array"),
    "no vectors": (lambda i: (i / "vectors.npy").unlink(), "is missing"),
    "another type": (lambda i: np.save(i / "vectors.npy", np.ones((20, 2))), "holds float64"),
    "columns": (lambda i: np.save(i / "vectors.npy", np.ones((20, 2), np.float32, "F")), "holds float32"),
    "objects": (
        lambda i: np.save(i / "vectors.npy", np.array([[{}]], object), allow_pickle=True),
        "holds Python objects, which are programs",
    ),
    "a zip": (lambda i: np.savez((i / "vectors.npy").open("wb"), a=np.ones(3)), "is no array"),
    "a link": (
        lambda i: ((i / "vectors.npy").rename(i.with_name("v")), (i / "vectors.npy").symlink_to(i.with_name("v"))),
        "is a link out of its folder",
    ),
    "cut lines": (lambda i: os.truncate(i / "items.jsonl", 300), "is not 20 lines"),
    "no lines": (lambda i: (i / "items.jsonl").write_text(""), "cannot be read"),
    "more lines": (lambda i: lines(i, *([["0", 0, ""]] * 21)), "is not 20 lines"),
    "a bare line": (lambda i: lines(i, *(["0"] * 20)), "line 1 is no item"),
    "deep": (lambda i: (i / "items.jsonl").write_text(("[" * 9999 + "\n") * 20), "line 1 is no item"),
    "another root": (lambda i: lines(i, *([["0", 1, ""]] * 20)), "line 1 is no item"),
    "absolute": (lambda i: lines(i, *([["/etc/passwd", 0, ""]] * 20)), "points outside its folder"),
    "escaping": (lambda i: lines(i, *([["../secret.png", 0, ""]] * 20)), "points outside its folder"),
    "NUL": (lambda i: lines(i, *([["a\0", 0, ""]] * 20)), "points outside its folder"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_indexes_from_outside_are_refused_by_name(what: str, tmp_path: Path) -> None:
    index = written(tmp_path / "index", np.array([[1, n / 10] for n in range(20)]))
    spoil, named = HOSTILE[what]
    spoil(index)
    with pytest.raises(BadInput, match=named):
        Index(index).nearest(np.array([1, 0], np.float32))


def test_links_out_of_the_folder_of_pictures_are_refused(tmp_path: Path) -> None:
    index = written(tmp_path / "index", np.eye(2))
    (tmp_path / "secret").write_text("0")
    (index / "pictures" / "0").unlink()
    (index / "pictures" / "0").symlink_to(tmp_path / "secret")
    with pytest.raises(BadInput, match="points outside its folder of pictures"):
        Index(index).nearest(np.array([1, 0], np.float32))


def test_a_file_that_its_author_has_not_seen_is_not_shown(tmp_path: Path) -> None:
    index = written(tmp_path / "index", np.eye(2))
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "0").write_text("mine")
    change(index, roots=["../private"])
    with pytest.raises(BadInput, match="leads to no picture"):
        Index(index).nearest(np.array([1, 0], np.float32))


# The command line.


def test_commands(bundle: Path, photos: Path, tmp_path: Path, call: Call) -> None:
    index = tmp_path / "photos.index"
    (photos / "words.png").write_text("no picture")
    said = call("index", "build", bundle, photos, "-o", index, "--threads", 1, "--json")
    assert said.code == 0
    assert {key: said.document[key] for key in ("index", "pictures", "added")} == {
        "index": str(index),
        "pictures": 11,
        "added": 11,
    }
    assert [each["file"] for each in said.document["skipped"]] == [str(photos / "words.png")]
    assert "warning: skipped" in said.err and "words.png" in said.err and "[1/1] pictures" in said.err
    more = photographs(tmp_path / "more", range(20, 22))
    said = call("index", "add", index, more, "--bundle", bundle, "--threads", 1)
    assert (said.code, said.out) == (0, f"{index}\n") and "2 pictures added, 13 in all, 1 files skipped" in said.err
    words = ("index", "search", index, "--bundle", bundle, "--threads", 1)
    said = call(*words, "--image", more / "20.png", "-n", 2)
    first, second = said.out.splitlines()
    assert first.split(maxsplit=1)[0] == "1.0000" and Path(first.split(maxsplit=1)[1]).samefile(more / "20.png")
    found = call(*words, "--image", more / "20.png", "--json").document["found"]
    assert len(found) == 10 and found[1]["file"] == second.split(maxsplit=1)[1]


def test_what_commands_refuse(bundle: Path, photos: Path, made: Path, folder: Path, call: Call, tmp_path: Path) -> None:
    search = ("index", "search", made, "--bundle")
    wrong = write_bundle(tmp_path / "wrong.bundle", seed=1)
    pickled = tmp_path / "cc3m.pkl"
    pickled.write_bytes(b"\x80\x04.")
    for words, part in (
        ((*search, bundle), "a search is for words or for a picture"),
        ((*search, bundle, "--text", "a", "--image", photos / "1.png"), "give one of --text and --image"),
        ((*search, bundle, "--image", photos / "1.png", "-n", 0), "0 pictures are none"),
        ((*search, bundle, "--image", photos / "none.png"), "does not exist"),
        ((*search, wrong, "--image", photos / "1.png"), "was made by another model"),
        ((*search, wrong, "--text", "a cat"), "was made by another model"),
        ((*search, folder, "--image", photos / "1.png"), "retrieves no pictures"),
        (("index", "search", pickled, "--bundle", bundle, "--text", "a"), "pickled ones are programs"),
        (("index", "build", folder, photos, "-o", tmp_path / "x"), "retrieves no pictures"),
        (("index", "build", bundle, photos / "1.png", "-o", tmp_path / "x"), "is no folder"),
        (("index", "build", bundle, photos, "-o", made), "use --force"),
        (("index", "build", bundle, photos), "missing option '-o'"),
        (("index", "add", photos, photos, "--bundle", bundle), "is no index of pictures"),
        (("index", "nope"), "see: mllm-edge index --help"),
        (("run", folder, "the", "--index", made), "retrieves no pictures"),
    ):
        said = call(*words)
        assert said.code == 2 and part in said.error, (words, said.err)
    assert call("index").out == call("index", "--help").out != ""
