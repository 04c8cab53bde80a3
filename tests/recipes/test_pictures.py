"""Pictures with names: archives that can be trusted, drawings on grounds, files in LLaVA's layout."""

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.recipes.data.pictures import __main__ as command
from mllm_edge.recipes.data.pictures.archives import Archive, fetch, unpack
from mllm_edge.recipes.data.pictures.compose import SIDE, Pasteboard, TrainingPictures
from mllm_edge.recipes.data.pictures.sprites import Concept, plain
from mllm_edge.recipes.data.readers import read_llava


def archive(content: bytes, client: str = "npm") -> Archive:
    return Archive(client, "drawings", "1.0", "drawings-1.0.tgz", hashlib.sha256(content).hexdigest())


def test_a_file_that_is_there_is_taken_when_its_hash_is_right(tmp_path: Path) -> None:
    (tmp_path / "drawings-1.0.tgz").write_bytes(b"as published")
    assert fetch(archive(b"as published"), tmp_path) == tmp_path / "drawings-1.0.tgz"
    with pytest.raises(BadInput, match=r"is not the expected file of drawings@1\.0; delete it"):
        fetch(archive(b"something else"), tmp_path)


def test_a_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MllmEdgeError, match=r"drawings@1\.0 needs npm, which is not installed"):
        fetch(archive(b""), tmp_path)


def test_archives_are_unpacked_once_and_never_outside(tmp_path: Path) -> None:
    good, evil = tmp_path / "good.tgz", tmp_path / "evil.tgz"
    for path, name in ((good, "package/a.txt"), (evil, "../outside.txt")):
        with tarfile.open(path, "w:gz") as tar:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    home = unpack(good, tmp_path / "good")
    assert (home / "package" / "a.txt").read_bytes() == b"abc"
    good.unlink()
    assert unpack(good, tmp_path / "good") == home
    with pytest.raises(BadInput, match="cannot be unpacked"):
        unpack(evil, tmp_path / "evil")
    assert not (tmp_path / "outside.txt").exists()
    assert not (tmp_path / "evil").exists()


def test_a_damaged_wheel_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("a/b.txt", "text")
    assert (unpack(tmp_path / "a.whl", tmp_path / "a") / "a" / "b.txt").read_text() == "text"
    (tmp_path / "b.whl").write_bytes(b"no zip")
    with pytest.raises(BadInput, match="cannot be unpacked"):
        unpack(tmp_path / "b.whl", tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("A Guinea fowl.", "guinea fowl"),
        ("RED APPLE", "red apple"),
        ("kick_scooter", "kick scooter"),
        ("an", "an"),
        ("The t-rex!", "t rex"),
    ],
)
def test_plain_names(name: str, expected: str) -> None:
    assert plain(name) == expected


def red_square() -> Image.Image:
    drawing = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    drawing.paste((255, 0, 0, 255), (0, 0, 20, 20))
    return drawing


@pytest.fixture
def board(tmp_path: Path) -> Pasteboard:
    Image.new("RGB", (300, 400), (0, 0, 255)).save(tmp_path / "blue.png")
    return Pasteboard([tmp_path / "blue.png"])


def test_a_drawing_is_pasted_by_its_transparency(board: Pasteboard) -> None:
    picture = np.array(board.pasted(red_square(), np.random.default_rng(0)))
    assert picture.shape == (SIDE, SIDE, 3)
    red, blue = (picture == (255, 0, 0)).all(-1), (picture == (0, 0, 255)).all(-1)
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    assert 0.45 * SIDE / 2 - 2 <= len(columns) <= 0.8 * SIDE / 2  # the opaque half of a drawing of 45 to 80 %
    assert abs(len(rows) - len(columns)) <= 3
    assert (red | blue).mean() > 0.98
    again = np.array(board.pasted(red_square(), np.random.default_rng(0)))
    np.testing.assert_array_equal(again, picture)


def test_alone_it_stands_on_one_color(board: Pasteboard) -> None:
    grounds = set()
    for seed in range(20):
        picture = np.array(board.alone(red_square(), np.random.default_rng(seed))).reshape(-1, 3)
        colors, counts = np.unique(picture, axis=0, return_counts=True)
        grounds.add(tuple(colors[counts.argmax()].tolist()))
    assert (255, 255, 255) in grounds
    assert len(grounds) > 5


def test_training_never_shows_the_same_picture_twice(tmp_path: Path, board: Pasteboard) -> None:
    red_square().save(tmp_path / "red.png")
    Image.new("RGB", (10, 10), (1, 2, 3)).save(tmp_path / "flat.png")
    (tmp_path / "grounds").mkdir()
    (tmp_path / "blue.png").rename(tmp_path / "grounds" / "blue.png")
    pictures = TrainingPictures(str(tmp_path / "grounds"))
    rng = np.random.default_rng(0)
    shown = [np.asarray(pictures.open(tmp_path / "red.png", rng)) for _ in range(12)]
    assert len({picture.tobytes() for picture in shown}) == 12
    assert all(picture.shape == (SIDE, SIDE, 3) for picture in shown)
    # a drawing in every one, whatever its tint: the ground is plain, or blue and smooth
    assert all(len(np.unique(picture.reshape(-1, 3), axis=0)) > 1 for picture in shown)
    again = np.asarray(pictures.open(tmp_path / "red.png", np.random.default_rng(0)))
    np.testing.assert_array_equal(again, shown[0])
    assert pictures.open(tmp_path / "flat.png", rng).size == (10, 10)  # nothing to put on a ground
    assert TrainingPictures("").open(tmp_path / "red.png", rng).size == (40, 20)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"data\.grounds: .* holds no pictures"):
        TrainingPictures(str(tmp_path / "empty"))


def test_the_files_are_llavas_and_the_test_style_is_not_in_training(
    tmp_path: Path, board: Pasteboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    styles = ("fluent", "google", "twitter")
    rare = Concept("rarity", frozenset(["rarity"]), {"google": red_square, "twitter": red_square})
    kind = Concept("red apple", frozenset(["red apple"]), dict.fromkeys(styles, red_square))
    things = [rare, kind] + [
        Concept(name, frozenset([name]), dict.fromkeys(styles, red_square), symbol)
        for name, symbol in (("apple", "A"), ("owl", "O"), ("skis", "S"))
    ]
    monkeypatch.setattr(command, "concepts", lambda _: things)
    monkeypatch.setattr(command, "train_photos", lambda _: [tmp_path / "blue.png"])
    monkeypatch.setattr(command, "test_photos", lambda: [tmp_path / "blue.png"])
    command.write(tmp_path / "out")
    train = list(read_llava(tmp_path / "out" / "train.json", tmp_path / "out"))
    assert len(train) == 3 * 2  # a drawing in each style of training
    assert {entry.turns[0][1] for entry in train} == {"An apple.", "An owl.", "Skis."}
    assert not any("twitter" in str(entry.image) for entry in train)
    assert all(Image.open(str(entry.image)).mode == "RGBA" for entry in train)
    assert [path.name for path in (tmp_path / "out" / "grounds").iterdir()] == ["blue.jpg"]
    for name in ("style", "photos"):
        entries = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert sorted((entry["symbol"], *entry["names"]) for entry in entries) == [
            ("A", "apple"),
            ("O", "owl"),
            ("S", "skis"),
        ]
        assert all((tmp_path / "out" / entry["image"]).is_file() for entry in entries)
