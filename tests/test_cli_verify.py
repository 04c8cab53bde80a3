"""`mllm-edge verify`: the rows, and the exit code where one is out of tolerance."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from calls_for_tests import Call

from mllm_edge.bundle.manifest import Parity
from mllm_edge.bundle.read import read_manifest, write_manifest
from mllm_edge.errors import OutOfTolerance

ROWS = [Parity("connector", False, {"cosine": 0.5}, {"cosine": 0.99})]


@pytest.fixture
def verification(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import mllm_edge.export.verify.verify as module

    return module


def test_verify_shows_the_rows(
    folder: Path, verification: ModuleType, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = [dataclasses.replace(ROWS[0], passed=True)]
    monkeypatch.setattr(verification, "verify_bundle", lambda _folder, _weights: passed)
    said = call("verify", folder, "--json")
    assert said.code == 0
    assert said.document == {"bundle": str(folder), "passed": True, "parity": [dataclasses.asdict(passed[0])]}
    assert "cosine 0.5" in call("verify", folder).out


def test_verify_out_of_tolerance_shows_the_rows_and_fails(
    folder: Path, tmp_path: Path, verification: ModuleType, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = tmp_path / "off.bundle"
    shutil.copytree(folder, off)

    def fail(at: Path, weights: str | None) -> list[Parity]:
        assert weights == "elsewhere"
        write_manifest(dataclasses.replace(read_manifest(at), parity=ROWS), at)
        raise OutOfTolerance("out of tolerance: connector cosine 0.5; export again")

    monkeypatch.setattr(verification, "verify_bundle", fail)
    said = call("verify", off, "--weights", "elsewhere", "--json")
    assert said.code == 1
    assert said.document["passed"] is False
    assert said.document["parity"][0]["name"] == "connector"
    assert said.err == "error: out of tolerance: connector cosine 0.5; export again\n"
