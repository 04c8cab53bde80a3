"""Parts of answers against the reference's: a system with two kinds of answers that are both pictures."""

import types

import numpy as np
import pytest
from PIL import Image

from mllm_edge.bundle.manifest import Generation
from mllm_edge.bundle.sources import States
from mllm_edge.export.verify import answers
from mllm_edge.runtime.answer import Picture
from mllm_edge.runtime.turn import Drawing

END, MARK = 2, 5
GREEN, RED = (Image.new("RGB", (4, 4), color) for color in ("green", "red"))
DRAWN = Picture((0, 1), "a dog", "generated", GREEN)
FOUND = Picture((0, 1), "a dog", "retrieved", RED, "dog.png", 0.5)


class Reference:
    """Answers with the mark and ends."""

    def generate(self, prompt, most, is_end):
        return [MARK, END]

    def forced(self, prompt, tokens):
        rows = np.zeros((len(tokens) + 1, 4), np.float32)
        return rows, rows


def rows(parts, monkeypatch):
    """The rows of a bundle that answers with `parts` where the reference has one picture drawn and one found."""
    monkeypatch.setattr(answers, "KINDS", {"pictures": lambda *_: iter([DRAWN]), "retrieved": lambda *_: iter([FOUND])})
    entries = [types.SimpleNamespace(kind=kind, states="marks") for kind in ("pictures", "retrieved")]
    plan = types.SimpleNamespace(
        answers=entries, stages=[], generation=Generation(), sources=[States("marks", ["[M]"])], question="a dog"
    )
    told = types.SimpleNamespace(tokens=types.SimpleNamespace(ids=[MARK, END]), parts=parts)
    model = types.SimpleNamespace(
        manifest=types.SimpleNamespace(stages=[], language_model=types.SimpleNamespace(precision="f32")),
        language_model=types.SimpleNamespace(context=64),
        tokenizer=types.SimpleNamespace(
            control_tokens={"[M]": MARK}, user_defined={}, is_end=lambda token: token == END
        ),
        generate=lambda *_, **__: told,
    )
    samples = types.SimpleNamespace(need=lambda number, values: None)
    seen, prompts = [np.zeros((4, 4, 3), np.uint8)], [np.zeros((1, 4), np.float32)]
    found = answers.answer_rows(model, plan, samples, seen, prompts, Reference(), Drawing())
    return {row.name: row for row in found}


def test_drawn_pictures_are_compared_with_drawn_ones_and_found_with_found(monkeypatch):
    result = rows([DRAWN, FOUND], monkeypatch)
    assert all(row.passed for row in result.values())
    assert result["pictures"].measured == {"same_tokens": 1.0, "pictures": 1.0, "mean_levels": 0.0}
    assert result["retrieved"].measured == {"same_tokens": 1.0, "pictures": 1.0, "same_files": 1.0, "score_off": 0.0}


@pytest.mark.parametrize(("parts", "passed"), [([DRAWN], [True, False]), ([FOUND], [False, True]), ([], [False] * 2)])
def test_a_missing_picture_fails_its_own_kind(parts, passed, monkeypatch):
    assert [row.passed for row in rows(parts, monkeypatch).values()] == passed
