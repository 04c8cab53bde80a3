"""The training loop: it learns, resumes to the same losses, and its tasks save what the next recipe reads."""

import json
from pathlib import Path

import pytest
import torch

from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.recipes import train
from mllm_edge.recipes.origin import hours
from mllm_edge.recipes.parts import read_part
from mllm_edge.recipes.trainer import schedule


def quiet(step: int, steps: int, metrics: dict[str, float]) -> None:
    pass


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_schedule_warms_up_and_ends_at_zero() -> None:
    values = [schedule(step, 100, 0.1) for step in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == values[10] == 1.0
    assert values[55] == pytest.approx(0.5)
    assert values[100] == pytest.approx(0.0)


SMALL = ["batch=4", "log_every=1", "precision=fp32", "warmup=0.0"]


def test_resume_gives_the_same_losses(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train("encoder-pretrain", [*SMALL, f"out={whole}", "steps=4", "evaluate=0"], False, quiet)

    class Killed(Exception):
        pass

    def kill(step: int, steps: int, metrics: dict[str, float]) -> None:
        if step == 3:
            raise Killed

    settings = [*SMALL, f"out={parts}", "steps=4", "evaluate=0", "save_every=2"]
    with pytest.raises(Killed):
        train("encoder-pretrain", settings, False, kill)
    train("encoder-pretrain", settings, True, quiet)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
    assert (parts / "loss.png").stat().st_size > 1000


def test_a_long_run_is_announced_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [*SMALL, "steps=3", "evaluate=0"]
    train("encoder-pretrain", [*settings, f"out={tmp_path / 'quick'}"], False, quiet)
    monkeypatch.setattr("mllm_edge.recipes.trainer.MANY", 0)
    monkeypatch.setattr("mllm_edge.recipes.trainer.LONG", 0)
    with pytest.warns(RuntimeWarning, match=r"3 steps take about 0 h \d+ min on this machine.*--resume"):
        report = train("encoder-pretrain", [*settings, f"out={tmp_path / 'long'}"], False, quiet)
    assert losses(tmp_path / "long") == losses(tmp_path / "quick")
    assert report["machine"] and report["threads"] >= 1 and report["commit"]
    assert hours(3 * 3600 + 20 * 60 + 5) == "3 h 20 min"


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nothing to resume"):
        train("encoder-pretrain", [*SMALL, f"out={tmp_path / 'new'}", "steps=1"], True, quiet)


def test_a_kill_at_any_rename_loses_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        pass

    for number in (1, 2):  # of the second save: state to state.old, state.new to state
        out, left, whole = tmp_path / str(number), iter(range(number, -1, -1)), Path.rename

        def rename(self: Path, target: Path) -> Path:
            if next(left) == 0:  # noqa: B023
                raise Killed
            return whole(self, target)  # noqa: B023

        settings = [*SMALL, f"out={out}", "steps=3", "evaluate=0", "save_every=1"]
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", rename)
            with pytest.raises(Killed):
                train("encoder-pretrain", settings, False, quiet)
        train("encoder-pretrain", settings, True, quiet)
        assert len(losses(out)) == 3
        assert not (out / "state.new").exists() and not (out / "state.old").exists()


def test_a_run_takes_no_place_of_others(tmp_path: Path) -> None:
    theirs, link, old = tmp_path / "theirs", tmp_path / "link", tmp_path / "old"
    theirs.mkdir()
    (theirs / "report.json").write_text("mine")
    link.symlink_to(theirs)
    (old / "state").mkdir(parents=True)
    file = theirs / "report.json"
    for place, reason in [(theirs, "move it away"), (link, "is a link"), (old, "--resume"), (file, "cannot be")]:
        with pytest.raises(BadInput, match=reason):
            train("lm-pretrain", [f"out={place}"], False, quiet)
    assert (theirs / "report.json").read_text() == "mine"


def test_accumulation_equals_a_large_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Texts alone: all samples then have as many labels, and the mean of two means is the mean of all.
    monkeypatch.setattr("mllm_edge.recipes.tasks.language.FORMS", {"text": 1.0})
    one, two = tmp_path / "one", tmp_path / "two"
    train(
        "lm-pretrain", [*SMALL, f"out={one}", "steps=3", "evaluate=0", "data.length=32", "data.opening=0"], False, quiet
    )
    again = [*SMALL, f"out={two}", "steps=3", "evaluate=0", "data.length=32", "data.opening=0", "accumulate=2"]
    train("lm-pretrain", again, False, quiet)
    assert losses(two) == pytest.approx(losses(one), abs=2e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_the_whole_chain(tmp_path: Path, lora: bool) -> None:
    from mllm_edge.models.llava.model import build
    from mllm_edge.models.resolve import resolve

    parts = {name: tmp_path / name for name in ("encoder", "lm", "stage1", "stage2")}
    train("encoder-pretrain", [*SMALL, f"out={parts['encoder']}", "steps=1", "evaluate=2"], False, quiet)
    train("lm-pretrain", [*SMALL, f"out={parts['lm']}", "steps=1", "evaluate=1"], False, quiet)
    init = [f"init.vision_encoder={parts['encoder']}", f"init.language_model={parts['lm']}"]
    train("llava-pretrain", [*SMALL, *init, f"out={parts['stage1']}", "steps=1"], False, quiet)
    init += [f"init.connector={parts['stage1']}", "evaluate=2", *(["lora.r=4"] if lora else [])]
    report = train("llava-finetune", [*SMALL, *init, f"out={parts['stage2']}", "steps=2"], False, quiet)
    assert 0 <= report["metrics"]["validation_exact"] <= 1
    model = build(resolve("llava", str(parts["stage2"] / "checkpoint"), None))
    frozen = read_part(str(parts["encoder"]), "vision_encoder")
    for name, tensor in model.vision_encoder.state_dict().items():
        assert torch.equal(tensor, frozen[name]), name
    start = read_part(str(parts["lm"]), "language_model")["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(model.language_model.state_dict()["model.layers.0.mlp.up_proj.weight"], start)


def test_user_conversations_are_trained_on(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A red picture."}]
    text = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]
    data = [{"id": "0", "image": "a.png", "conversations": turns}, {"id": "1", "conversations": text}]
    (tmp_path / "data.json").write_text(json.dumps(data))
    train("encoder-pretrain", [*SMALL, f"out={tmp_path / 'e'}", "steps=1", "evaluate=0"], False, quiet)
    train("lm-pretrain", [*SMALL, f"out={tmp_path / 'l'}", "steps=1", "evaluate=0"], False, quiet)
    settings = [
        f"init.vision_encoder={tmp_path / 'e'}",
        f"init.language_model={tmp_path / 'l'}",
        f"data.conversations={tmp_path / 'data.json'}",
        f"data.images={tmp_path}",
        f"out={tmp_path / 's'}",
        "steps=3",
    ]
    train("llava-pretrain", [*SMALL, *settings], False, quiet)
    values = losses(tmp_path / "s")
    assert values[-1] < values[0]


def test_a_disk_that_fills_up_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0\nframe #0: ...")

    settings = [*SMALL, f"out={tmp_path / 'run'}", "steps=3", "evaluate=0", "save_every=1"]
    with monkeypatch.context() as patch:
        whole, saves = torch.save, iter(range(100))
        patch.setattr(torch, "save", lambda *a, **k: whole(*a, **k) if next(saves) < 4 else full())
        with pytest.raises(MllmEdgeError, match=r"state of step \d could not be written .*--resume$"):
            train("encoder-pretrain", settings, False, quiet)
    train("encoder-pretrain", settings, True, quiet)
    assert len(losses(tmp_path / "run")) == 3
