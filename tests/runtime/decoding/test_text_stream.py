import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_edge.errors import BadInput
from mllm_edge.runtime.decoding.text_stream import MOST_STOP, TextStream


def feed(stream: TextStream, *pieces: bytes) -> list[str]:
    return [stream.feed(piece) for piece in pieces]


def test_a_character_is_shown_when_its_last_byte_is_there() -> None:
    stream = TextStream([], strip=False)
    smile = "🙂".encode()
    assert feed(stream, b"a", smile[:1], smile[1:3], smile[3:], b"b") == ["a", "", "", "🙂", "b"]
    assert stream.finish() == ""


def test_a_character_cut_by_the_end_is_replaced() -> None:
    stream = TextStream([], strip=False)
    assert feed(stream, b"a", "é".encode()[:1]) == ["a", ""]
    assert stream.finish() == "\ufffd"


def test_a_stop_string_across_token_borders_is_never_shown() -> None:
    stream = TextStream(["###", "</s>"], strip=False)
    assert feed(stream, b"red#", b"#") == ["red", ""]
    assert feed(stream, b"#x") == [""]
    assert (stream.stopped, stream.text, stream.size) == (True, "red", 3)


def test_what_only_began_like_a_stop_string_is_shown_after_all() -> None:
    stream = TextStream(["###"], strip=False)
    assert feed(stream, b"a##", b"b#") == ["a", "##b"]
    assert stream.finish() == "#"
    assert stream.text == "a##b#" and not stream.stopped


def test_the_first_of_several_stop_strings_wins() -> None:
    stream = TextStream(["yz", "b"], strip=False)
    assert feed(stream, b"abyz") == ["a"]


def test_long_stop_strings_are_refused() -> None:
    TextStream(["a" * MOST_STOP], strip=False)
    with pytest.raises(BadInput, match="stop strings are over"):
        TextStream(["a" * MOST_STOP, "b"], strip=False)


def test_what_overlaps_itself_is_held_back_as_long_as_it_may_stop() -> None:
    stream = TextStream(["aab"], strip=False)
    assert feed(stream, b"aa", b"a", b"a", b"b") == ["", "a", "a", ""]
    assert stream.stopped


def test_leading_space_is_dropped_but_counted() -> None:
    stream = TextStream([], strip=True)
    assert feed(stream, b" ", b" red", b" dot") == ["", "red", " dot"]
    assert stream.size == len(b"  red dot")


def test_a_stop_string_that_opens_the_answer_may_be_a_part_of_it() -> None:
    stream = TextStream(["\n"], strip=False, late=True)
    assert "".join(feed(stream, b"\n", b" a dog", b" runs\nand")) == "\n a dog runs"
    assert stream.stopped
    alone, twice = TextStream(["\n"], False, late=True), TextStream(["\n"], False, late=True)
    assert alone.feed(b"\n") + alone.finish() == "\n" and not alone.stopped
    assert twice.feed(b"\n\n") == "\n" and twice.stopped


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=3), st.data())
def test_any_cut_into_tokens_gives_the_same_text(text: str, stops: list[str], data: st.DataObject) -> None:
    encoded = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(encoded)), max_size=6)))
    stream, shown = TextStream(stops, strip=False), []
    for start, end in zip([0, *cuts], [*cuts, len(encoded)]):
        if not stream.stopped:
            shown.append(stream.feed(encoded[start:end]))
    shown.append(stream.finish())
    places = [at for at in map(text.find, stops) if at >= 0]
    if not stream.stopped:
        assert not places and "".join(shown) == text
    else:  # a token may end with a later stop string before an earlier, longer one is complete
        assert "".join(shown) == stream.text and text.startswith(stream.text)
        assert any(text[len(stream.text) :].startswith(stop) for stop in stops)
        assert not any(stop in stream.text for stop in stops)
