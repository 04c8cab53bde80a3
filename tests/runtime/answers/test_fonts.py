"""What an overlay's text is drawn with: Pillow's own font, then the system's."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from mllm_edge.runtime.answer import Answer, Mask, Tokens
from mllm_edge.runtime.answers import fonts
from mllm_edge.runtime.answers.fonts import drawable, font_for
from mllm_edge.runtime.answers.write import overlay, write

HERE = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # DejaVu Sans, whatever the machine has


@pytest.fixture(params=["none", "dejavu"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setattr(fonts, "FOLDERS", (str(HERE if request.param == "dejavu" else tmp_path / "none"),))
    caches = (fonts._files, fonts._font, fonts._lacks)
    for cache in caches:
        cache.cache_clear()
    yield request.param
    for cache in caches:
        cache.cache_clear()


def test_letters_are_drawn_where_a_font_has_them(system: str) -> None:
    own, others, none = "A cat, “big”.\n", "éßłαωЖ→", "一猫قطשल🐈\x1b"
    assert all(map(drawable, own)) and not any(map(drawable, none))
    assert {drawable(letter) for letter in others} == {system == "dejavu"}
    assert font_for("cat", 16).getname()[0] == "Aileron"
    assert font_for("chłopięcy", 16).getname()[0] == ("DejaVu Sans" if system == "dejavu" else "Aileron")


def test_an_answer_with_greek_letters(system: str, tmp_path: Path) -> None:
    text = "The angle Φ is Ω."
    whole = Mask("", (17, 17), "", 0.9, [0, 0, 64, 48], np.ones((48, 64), np.bool_))
    answer = Answer(text, Tokens(1, 0, 1, [1]), {}, {}, [whole], Image.new("RGB", (64, 48)))
    if system == "none":
        with pytest.warns(UserWarning, match=r"overlay\.txt"):
            files = write(answer, tmp_path)
    else:
        files = write(answer, tmp_path)
    assert (tmp_path / "overlay.txt" in files) == (system == "none")


def test_the_base_line_is_one_for_all_fonts(system: str) -> None:
    """A word of the system's font beside one of Pillow's: their letters end on one row."""
    drawn = np.asarray(overlay(Image.new("RGB", (64, 48)), [], "HHHHH ΓΓΓΓΓ"))[480:]
    rows = [np.flatnonzero((half < 128).any(axis=(1, 2)))[-1] for half in (drawn[:, :65], drawn[:, 85:])]
    assert system == "none" or abs(rows[0] - rows[1]) <= 1


def test_a_file_that_is_no_font_is_passed_over(tmp_path: Path, system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "DejaVuSans.ttf").write_bytes(b"no font")
    monkeypatch.setattr(fonts, "FOLDERS", (str(tmp_path),))
    fonts._files.cache_clear()
    assert not drawable("Ω") and drawable("O")
