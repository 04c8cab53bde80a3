"""How far long work has come, said in lines."""

import pytest

from mllm_edge import progress
from mllm_edge.progress import Pace, PlainSteps, PlainTraining


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_rest_is_told_by_the_pace_of_this_run(clock: list[float]) -> None:
    pace = Pace()
    assert pace.left(0.5) == ""  # an earlier run did this half
    clock[0] += 30
    assert pace.left(0.75) == ", 30 s left"


def test_long_steps_get_a_line_now_and_then(clock: list[float]) -> None:
    lines: list[str] = []
    steps = PlainSteps(lines.append)
    steps("language_model", 2, 3, None)
    for part in range(1, 10):
        clock[0] += 4
        steps("language_model", 2, 3, None, part / 10)
    steps("language_model", 2, 3, 40.0)
    assert lines == [
        "[2/3] language_model ...",
        "[2/3] language_model 30%, 28 s left",
        "[2/3] language_model 60%, 16 s left",
        "[2/3] language_model 90%, 4 s left",
        "[2/3] language_model 40.0 s",
    ]


def test_training_tells_its_first_and_last_step(clock: list[float]) -> None:
    lines: list[str] = []
    training = PlainTraining(lines.append)
    for step in range(1, 5):
        training(step, 4, {"loss": 1 / step})
        clock[0] += 6
    assert lines == ["step 1/4: loss 1", "step 3/4: loss 0.3333, 6 s left", "step 4/4: loss 0.25, 0 s left"]
