"""The command line, through `main`: streams, exit codes, one line for each error. Bundles and engines are real."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calls_for_tests import Call

import mllm_edge
from mllm_edge import models
from mllm_edge.bundle.read import read_manifest
from mllm_edge.models import SYSTEMS
from mllm_edge.recipes.recipe import available

VERBS = [
    *("systems", "recipes", "inspect", "doctor"),
    *("train", "export", "build", "verify"),
    *("run", "chat"),
    *("bench", "compare", "eval", "plan"),
]
NESTED = {"index": ["build", "add", "search"]}


def test_help_lists_the_verbs(call: Call) -> None:
    said = call("--help")
    assert (said.code, said.err) == (0, "")
    listed = said.out.partition("Commands:")[2].partition("\n\n")[0]
    assert [line.split()[0] for line in listed.strip().splitlines()] == [*VERBS, *NESTED]
    assert "..." not in listed  # no summary is cut off
    assert call().out == said.out


@pytest.mark.parametrize("verb", [*VERBS, *(f"{group} {verb}" for group in NESTED for verb in NESTED[group])])
def test_every_verb_has_the_common_options_and_examples(verb: str, call: Call) -> None:
    said = call(*verb.split(), "--help")
    assert said.code == 0
    assert {"--json", "--quiet", "--debug"} <= set(said.out.split())
    assert f"  mllm-edge {verb}" in said.out.partition("Examples:")[2]


def test_version(call: Call) -> None:
    assert call("--version").out == f"mllm-edge {mllm_edge.__version__}\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["exprot"], "no such command 'exprot'; did you mean 'export'?"),
        (["zzz"], "no such command 'zzz'; see: mllm-edge --help"),
        (["run"], "missing argument 'BUNDLE'; see: mllm-edge run --help"),
        (["export", "lava"], "there is no system 'lava'; did you mean 'llava'?"),
        (["train", "lm-pretrian"], "there is no recipe 'lm-pretrian'; did you mean 'lm-pretrain'?"),
        (
            ["export", "llava", "--target", "cpu", "--device", "orin"],
            "--device goes with --target trt; leave it out for target cpu",
        ),
        (["inspect", "nowhere"], "nowhere is not a bundle (it has no bundle.json); make one with: mllm-edge export"),
        (["bench", "b", "--format", "xml"], "there is no output form 'xml'; use md, csv, json, jsonl"),
    ],
)
def test_bad_usage_is_one_line_that_says_what_to_do(words: list[str], line: str, call: Call) -> None:
    said = call(*words)
    assert said.code == 2
    assert said.error == line


@pytest.mark.parametrize("words", [["systems", "--no-such"], ["run", "b", "p", "--seed", "x"], ["systems", "surplus"]])
def test_wrong_options_are_one_line(words: list[str], call: Call) -> None:
    said = call(*words)
    assert said.code == 2
    assert said.error.endswith(f"see: mllm-edge {words[0]} --help")


def test_an_error_with_json_is_a_document_too(call: Call) -> None:
    said = call("inspect", "nowhere", "--json")
    assert said.code == said.document["exit_code"] == 2
    assert said.err == f"error: {said.document['error']}\n"


def test_systems_and_recipes_are_the_registries(call: Call) -> None:
    assert [system["name"] for system in call("systems", "--json").document["systems"]] == list(SYSTEMS)
    assert call("recipes", "--json").document == {"recipes": available()}
    assert models.get("llava").title in call("systems").out
    assert all(name in call("recipes").out for name in available())


def test_run_answers_on_stdout_and_says_times_on_stderr(folder: Path, picture: Path, call: Call) -> None:
    said = call("run", folder, "the red circle", "--image", picture, "--max-tokens", 5)
    with mllm_edge.load(folder) as model:
        expected = model.generate("the red circle", picture, max_tokens=5)
    assert said.code == 0
    assert said.out == expected.text + "\n"
    assert "vision_encoder" in said.err


def test_run_streams_the_same_answer(folder: Path, picture: Path, call: Call) -> None:
    words = ["run", folder, "the red circle", "--image", picture]
    assert call(*words, "--stream").out == call(*words).out


def test_quiet_leaves_the_answer_alone(folder: Path, call: Call) -> None:
    said = call("run", folder, "the", "--quiet")
    assert said.out
    assert said.err == ""


def test_run_json_is_the_designs_document(folder: Path, picture: Path, call: Call) -> None:
    said = call("run", folder, "the", "--image", picture, "--max-tokens", 3, "--json", "--stream", "--quiet")
    document = said.document
    assert list(document) == ["text", "tokens", "masks", "boxes", "images", "timings_ms", "memory_mb"]
    assert document["tokens"]["image"] == 4  # 16 px pictures in patches of 8
    assert document["tokens"]["generated"] == len(document["tokens"]["ids"]) == 3
    assert {"load", "preprocess", "vision_encoder", "connector", "prefill", "decode", "total"} == set(
        document["timings_ms"]
    )
    assert said.err == ""


def test_a_prompt_may_come_from_stdin(folder: Path, call: Call) -> None:
    assert call("run", folder, text="the red circle\n").out == call("run", folder, "the red circle").out
    said = call("run", folder)
    assert said.code == 2
    assert said.error == "there is no prompt; write it after the bundle, or pipe it in"


def test_raw_takes_no_template(folder: Path, call: Call) -> None:
    words = ["run", folder, "red", "--max-tokens", 1, "--json"]
    raw = call(*words, "--raw").document["tokens"]["prompt"]
    assert raw == 5  # BOS, and " red" letter by letter: this vocabulary cannot merge it
    assert call(*words).document["tokens"]["prompt"] > raw


def test_options_reach_the_decoder(folder: Path, call: Call) -> None:
    words = ["run", folder, "the", "--json", "--temperature", 5, "--top-k", 0, "--top-p", 1]
    first, again, other = (call(*words, "--seed", seed).document["tokens"]["ids"] for seed in (1, 1, 2))
    assert first == again != other


def test_loading_options_reach_the_engines(folder: Path, call: Call) -> None:
    assert "context has 8 " in call("run", folder, "the red circle", "--context", 8).error
    assert "'f17'" in call("run", folder, "the", "--kv-type", "f17").error
    assert "threads is 0" in call("run", folder, "the", "--threads", 0).error
    assert call("run", folder, "the", "--target", "tpu").code == 2


@pytest.mark.parametrize(("option", "value"), [("--box", "1,2,3,4"), ("--out", "answers")])
def test_text_bundles_refuse_boxes_and_folders(option: str, value: str, folder: Path, call: Call) -> None:
    said = call("run", folder, "the", option, value)
    assert said.code == 2
    assert "leave" in said.error
    assert option in said.error


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--task", "rec"], "there is no task 'rec'; this bundle has none to choose"),
        (["--beams", "2"], "beams is 2, and this bundle's language model holds one sequence; use beams 1"),
        (["--beams", "0"], "beams is 0; it must be 1"),
        (["--index", "nowhere"], "nowhere is no index of pictures"),
        (["--steps", "9", "--draw", "2"], "draws no pictures; leave out --steps, --draw"),
        (["--guidance", "2", "--schedule", "ddim"], "draws no pictures; leave out --guidance, --schedule"),
        (["--draw-seed", "1"], "draws no pictures; leave out --draw-seed"),
        (["--preview-every", "1", "--out", "nowhere"], "draws no pictures; leave out --preview-every"),
    ],
)
def test_what_a_bundle_cannot_do_is_refused(words: list[str], reason: str, folder: Path, call: Call) -> None:
    said = call("run", folder, "the", *words)
    assert said.code == 2
    assert reason in said.error


def test_run_and_chat_have_the_same_options_for_answers(call: Call) -> None:
    shared = {"--out", "--task", "--steps", "--guidance", "--draw-seed", "--index", "--beams", "--seed", "--image"}
    for verb in ("run", "chat"):
        said = call(verb, "--help").out.replace(",", " ")
        assert shared | {"-o"} <= set(said.split())


def test_a_bad_picture_is_found_before_the_bundle_is_loaded(
    folder: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mllm_edge.runtime.load", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "text.png").write_text("not a picture")
    said = call("run", folder, "the", "--image", tmp_path / "text.png")
    assert said.code == 2
    assert "is not a picture" in said.error


def test_chat_encodes_its_picture_once(folder: Path, picture: Path, call: Call) -> None:
    said = call("chat", folder, "--image", picture, "--max-tokens", 3, "--json", text="the\n\nred\n/quit\nblue\n")
    first, second = said.document["turns"]
    assert (first["prompt"], second["prompt"]) == ("the", "red")
    assert first["timings_ms"]["vision_encoder"] > 0
    assert second["timings_ms"]["vision_encoder"] == 0
    assert first["tokens"]["image"] == second["tokens"]["image"] == 4
    assert second["tokens"]["prompt"] > first["tokens"]["prompt"] + 3


def test_chat_shows_another_picture(folder: Path, picture: Path, call: Call) -> None:
    words = ["chat", folder, "--max-tokens", 3, "--json"]
    turns = call(*words, text=f"the\n/image {picture}\nred\n").document["turns"]
    assert [turn["tokens"]["image"] for turn in turns] == [0, 4]


def test_what_was_answered_is_shown_before_the_turn_that_fails(folder: Path, call: Call) -> None:
    words, text = ["chat", folder, "--max-tokens", 3], "the\nred\n/image nowhere.png\nblue\n"
    said = call(*words, "--json", text=text)
    assert said.code == said.document["exit_code"] == 2
    assert [turn["prompt"] for turn in said.document["turns"]] == ["the", "red"]
    assert said.document["error"] == "nowhere.png does not exist; check the path"
    assert call(*words, text=text).out == call(*words, text="the\nred\n").out


def test_text_is_bounded(folder: Path, call: Call) -> None:
    assert "over 1048576 characters" in call("run", folder, text="a" * (1 << 21)).error
    assert "stop strings are over" in call("run", folder, "the", "--stop", "a" * 20_000).error
    assert "threads is 100000; it must be" in call("run", folder, "the", "--threads", 100_000).error


def test_nothing_of_a_file_commands_the_terminal(folder: Path, tmp_path: Path, call: Call) -> None:
    evil = tmp_path / "evil.bundle"
    shutil.copytree(folder, evil)
    manifest = json.loads((evil / "bundle.json").read_text())
    manifest["licences"] = {"code": "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp"}
    (evil / "bundle.json").write_text(json.dumps(manifest))
    shown = call("inspect", evil)
    assert r"\x1b]0;owned" in shown.out and r"\x1b[2J\x9b31m\u202egnp" in shown.out
    document = call("inspect", evil, "--json")
    assert document.document["licences"] == manifest["licences"]
    error = call("run", "\x1b[2J", "the")
    for text in (shown.out, document.out, error.err):
        assert not set(text) & {"\x1b", "\x07", "\x9b", "\u202e"}


@pytest.mark.parametrize("place", ["afile", "afile/below", "link"])
def test_out_that_cannot_be_is_found_before_the_bundle_is_loaded(
    place: str, folder: Path, tmp_path: Path, call: Call
) -> None:
    (tmp_path / "afile").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    for verb in (["run", tmp_path / "no.bundle", "the"], ["chat", tmp_path / "no.bundle"]):
        said = call(*verb, "--out", tmp_path / place)
        assert said.code == 2 and place in said.error


def test_a_path_that_the_system_refuses_is_one_line(call: Call) -> None:
    said = call("compare", "a" * 300, "b.json")
    assert said.code == 2 and "debug" not in said.error


def test_chat_answers_on_stdout(folder: Path, call: Call) -> None:
    said = call("chat", folder, "--max-tokens", 3, text="the red circle\n")
    assert said.out == call("run", folder, "the red circle", "--max-tokens", 3).out


def test_inspect_shows_the_manifest(folder: Path, call: Call) -> None:
    manifest = read_manifest(folder)
    assert call("inspect", folder, "--json").document == dataclasses.asdict(manifest)
    shown = call("inspect", folder).out
    for part in (manifest.stages[0].sha256[:12], "pixel_values float32 [1, 3, 16, 16]", "connector", "vicuna_v1"):
        assert part in shown


def test_hashes_are_compared_unless_told_otherwise(folder: Path, tmp_path: Path, call: Call) -> None:
    flipped = tmp_path / "flipped.bundle"
    shutil.copytree(folder, flipped)
    data = bytearray((flipped / "connector.onnx").read_bytes())
    data[-1] ^= 1
    (flipped / "connector.onnx").write_bytes(data)
    for words in (["inspect", flipped], ["run", flipped, "the"]):
        said = call(*words)
        assert said.code == 2
        assert "does not match its SHA-256" in said.error
    assert call("inspect", flipped, "--no-verify-hash").code == 0


def test_export_passes_its_options_and_reports_steps(
    folder: Path, call: Call, stub_export: Callable[[Callable[..., Path]], None]
) -> None:
    given: dict[str, Any] = {}

    def export(system: str, weights: str, config: str | None, *, report: Any, **options: Any) -> Path:
        given.update(options, system=system, weights=weights, config=config)
        print("a library's chatter")
        report("language_model", 1, 2, None)
        report("language_model", 1, 2, None, 0.25)  # a second has not passed: not worth a line
        report("language_model", 1, 2, 0.25)
        return folder

    stub_export(export)
    words = ["export", "llava", "--target", "cuda", "--weights", "random", "--config", "1b", "--precision", "fp16"]
    said = call(
        *words, "--quant", "q4_k_m", "-o", "x.bundle", "--merge-tokens", "10", "--mmproj", "--force", "--template", "x"
    )
    assert given == {
        "template": "x",
        "devices": [],
        "system": "llava",
        "weights": "random",
        "config": "1b",
        "target": "cuda",
        "precision": "fp16",
        "quant": "q4_k_m",
        "llm": None,
        "out": Path("x.bundle"),
        "merge_tokens": 10,
        "mmproj": True,
        "force": True,
    }
    assert said.out == f"{folder}\n"
    assert said.err.splitlines()[:3] == [
        "a library's chatter",
        "[1/2] language_model ...",
        "[1/2] language_model 0.2 s",
    ]
    document, size = call(*words, "--json").document, sum(entry.bytes for entry in read_manifest(folder).files())
    assert (document["bundle"], document["bytes"], document["parity"]) == (str(folder), size, [])


def test_a_text_system_takes_parts_and_writes_a_page(folder: Path, picture: Path, tmp_path: Path, call: Call) -> None:
    (tmp_path / "noise.png").write_bytes(picture.read_bytes())
    parts, page = tmp_path / "parts.json", tmp_path / "answer.html"
    parts.write_text('[{"image": "noise.png"}, "the red"]')
    said = call("run", folder, "--prompt-file", parts, "-o", page, "--json")
    assert said.document["tokens"] == call("run", folder, "the red", "--image", picture, "--json").document["tokens"]
    assert page.read_text().count("<img ") == 1
    parts.write_text('["the", {"image": "none.png"}]')
    assert "item 2: " in call("run", folder, "--prompt-file", parts).error
    assert "no tokens that others follow" in call("run", folder, "the", "--picture-scale", 2).error
