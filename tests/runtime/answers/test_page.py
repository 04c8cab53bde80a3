"""An answer as one page."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mllm_edge.errors import BadInput
from mllm_edge.runtime.answer import Answer, Mask, Picture, Tokens
from mllm_edge.runtime.answers import page as pages
from mllm_edge.runtime.answers.page import POLICY, check_place, is_page, page, write_page

RED, BLUE = Image.new("RGB", (4, 6), (255, 0, 0)), Image.new("RGB", (5, 3), (0, 0, 255))
ELEMENTS = {
    *("html", "head", "meta", "title", "style", "body", "section", "h2", "p", "figure", "img", "figcaption"),
}
ATTRIBUTES = {"charset", "http-equiv", "content", "name", "class", "dir", "alt", "width", "height", "src"}


class Seen(HTMLParser):
    """The elements of a page, its words and its pictures, in order."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.parts: list[str | Image.Image] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.inside = tag
        if tag == "p":
            self.parts.append("")
            self.words.append("")
        if tag == "img":
            source = dict(attrs)["src"] or ""
            assert source.startswith("data:image/png;base64,")
            self.parts.append(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "p":
            self.parts[-1] += data  # type: ignore[operator]
            self.words[-1] += data
        elif self.inside == "figcaption":
            self.parts.append(f"({data})")


def answer(text: str, *parts: Picture | Mask, picture: Image.Image | None = None) -> Answer:
    return Answer(text, Tokens(1, 0, 1, [1]), {}, {}, parts, picture)


def picture(span: tuple[int, int], image: Image.Image = BLUE, **more: object) -> Picture:
    return Picture(span, "asked", str(more.pop("origin", "generated")), image, **more)  # type: ignore[arg-type]


def test_question_and_answer_stand_in_their_order() -> None:
    told = answer(
        "One <m> two <m><m> end",
        picture((4, 7), decided={"retrieve": 0.25, "generate": 0.75}),
        picture((12, 15), RED, origin="retrieved", file="/secret/place/dog.png", score=1.5),
        picture((15, 18)),
    )
    seen = Seen(page([RED, "Is it", BLUE, "so?"], told))
    names = [part if isinstance(part, str) else {(4, 6): "RED", (5, 3): "BLUE"}[part.size] for part in seen.parts]
    first = ["RED", "Is it", "BLUE", "so?"]
    one = ["One", "BLUE", "(generated picture, retrieve 25%, generate 75%)"]
    two = ["two", "RED", "(retrieved picture, dog.png, score 1.5000)", "BLUE", "(generated picture)", "end"]
    assert names == [*first, *one, *two]
    assert isinstance(seen.parts[0], Image.Image) and seen.parts[0].getpixel((0, 0)) == (255, 0, 0)


HOSTILE = st.one_of(
    st.text(st.characters()),  # halves of characters, controls and marks of direction among them
    st.sampled_from(
        [
            "<script>alert(1)</script>",
            '"><img src=x onerror=alert(1)>',
            "</p></section><iframe src='http://x'>",
            "<!-- ",
            "]]>",
            "&lt;b&gt; &#60;",
            "</style><base href=//x>",
            "\u202egnp.exe",
            "a\0b\x1b[2J",
        ]
    ),
)


@given(HOSTILE, HOSTILE, HOSTILE)
def test_whatever_is_said_is_text(asked: str, said: str, file: str) -> None:
    told = answer(said, picture((len(said), len(said)), origin="retrieved", file=f"x/{file}", score=1.0))
    text = page([asked], told)
    text.encode()  # no half of a character
    seen = Seen(text)
    assert seen.elements <= ELEMENTS and seen.attributes <= ATTRIBUTES
    assert text.count("<img ") == 1 and text.count("<style>") == 1 and "<script" not in text
    assert f'content="{POLICY}"' in text and text.index(POLICY) < text.index("<style>")
    assert not set(text) & {*map(chr, (*range(9), *range(14, 32), 0x7F, 0x202E, 0x2066))}
    shown = [pages._HIDDEN.sub("\ufffd", words.strip()) for words in (asked, said) if words.strip()]
    assert seen.words == shown


def test_masks_are_shown_over_the_picture() -> None:
    pixels = np.zeros((6, 4), np.bool_)
    pixels[:3] = True
    mask = Mask("it", (0, 2), "it", 0.9, [0, 0, 4, 3], pixels)
    seen = Seen(page(["Where?"], answer("it.", mask, picture=RED)))
    (over,) = [part for part in seen.parts if isinstance(part, Image.Image)]
    assert over.width == 640  # an overlay for people
    assert seen.parts[:2] == ["Where?", "it."]


def test_large_pictures_are_made_smaller() -> None:
    (seen,) = [
        part for part in Seen(page([Image.new("RGB", (4000, 100))], answer(""))).parts if isinstance(part, Image.Image)
    ]
    assert seen.size == (2048, 51)


def test_a_page_replaces_a_page_of_ours_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "answer.html"
    for words in ("one", "two"):
        assert write_page([words], answer("x"), file) == file
    assert "two" in file.read_text() and [path.name for path in tmp_path.iterdir()] == ["answer.html"]
    file.write_text("<!doctype html>mine")
    with pytest.raises(BadInput, match=r"answer\.html is not from an answer of ours; move it away"):
        write_page(["three"], answer("x"), file)
    assert file.read_text() == "<!doctype html>mine"
    (tmp_path / "link.html").symlink_to(file)
    with pytest.raises(BadInput, match="is a link"):
        check_place(tmp_path / "link.html")
    with pytest.raises(BadInput, match="is no folder; make it"):
        check_place(tmp_path / "none" / "answer.html")
    with pytest.raises(BadInput):
        check_place(tmp_path / ("a" * 300 + ".html"))


def test_what_counts_as_a_page(tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    names = {"a.html": True, "a.HTML": True, "a": False, "folder.html": False, "a.png": False}
    assert {name: is_page(tmp_path / name) for name in names} == names
