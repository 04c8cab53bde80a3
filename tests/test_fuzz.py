"""A sample of `helpers/fuzz.py`, which tries thousands when it is run by hand (docs/security.md has the counts)."""

from __future__ import annotations

import pytest
from fuzz import KINDS, fuzz

SAMPLE = {"manifests": 150, "gguf": 25, "onnx": 40, "checkpoints": 15, "pictures": 150, "commands": 60}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_mutants_end_in_a_line(kind: str) -> None:
    ended, faults = fuzz(kind, SAMPLE[kind], seed=1)
    assert faults == []
    assert sum(ended.values()) == SAMPLE[kind]
    assert ended["refused"] > 0
