"""Which folders are ours, and places that cannot be."""

from pathlib import Path

import pytest

from mllm_edge import places
from mllm_edge.errors import BadInput, MllmEdgeError


def test_a_folder_is_ours_by_its_mark_alone(tmp_path: Path) -> None:
    ours = tmp_path / "deep" / "ours"
    places.claim(ours, "run")
    (ours / "file").write_text("")
    places.claim(ours, "run")  # again
    assert places.is_ours(ours, "run") and not places.is_ours(ours, "export")
    with pytest.raises(BadInput, match="but no export of ours"):
        places.claim(ours, "export")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("")
    with pytest.raises(BadInput, match="move it away"):
        places.claim(theirs, "run")
    assert [file.name for file in theirs.iterdir()] == ["thesis.tex"]


def test_a_link_is_never_ours(tmp_path: Path) -> None:
    places.claim(tmp_path / "ours", "run")
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    assert not places.is_ours(tmp_path / "link", "run")
    with pytest.raises(BadInput, match="is a link"):
        places.claim(tmp_path / "link", "run")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / places.MARK).symlink_to(tmp_path / "ours" / places.MARK)
    with pytest.raises(BadInput, match="move it away"):
        places.claim(tmp_path / "theirs", "run")


@pytest.mark.parametrize("name", ["file", "file/below", "a" * 300, "nul\0"])
def test_places_that_cannot_be(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for ask in (lambda place: places.claim(place, "run"), places.can_be_made):
        with pytest.raises(BadInput, match=r"choose another place|NUL"):
            ask(tmp_path / name)


def test_asking_makes_nothing(tmp_path: Path) -> None:
    places.can_be_made(tmp_path / "a" / "b")
    places.file_can_be_made(tmp_path / "c.csv")
    assert not list(tmp_path.iterdir())
    for file in (tmp_path, tmp_path / "a" / "c.csv"):
        with pytest.raises(BadInput, match="write elsewhere"):
            places.file_can_be_made(file)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_no_bad_input() -> None:
    with pytest.raises(MllmEdgeError, match="is full; make room") as caught, places.writing(Path("/dev/full")):
        Path("/dev/full").write_text("x")
    assert not isinstance(caught.value, BadInput)
