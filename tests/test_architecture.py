"""The plan of the house, held: which folder may import which, and what may be named where."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import mllm_edge
from mllm_edge.models import SYSTEMS

ROOT = Path(mllm_edge.__file__).parent
# Each may import what stands before it (functions' own imports and those for types included).
ORDER = (
    *("errors", "places", "growing", "progress", "typed_json", "tables", "version", "targets", "quants"),
    *("machine", "bundle", "scenes", "kernels", "runtime", "checkpoints", "models"),
    *("index", "export", "recipes", "evaluate", "bench", "doctor", "commands", "cli", "__main__"),
)
SHARED = (
    "commands",
    "cli.py",
    "export",
    "runtime",
    "bundle",
    "bench",
    "machine",
    "checkpoints",
    "targets.py",
    "quants.py",
)
RESERVED = r"image_embeds|region_embeds|seg_states|mask_logits|(?<!added)\[SEG\]|<bbox>|name == \"boxes\"|\bBOXES\b"


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "mllm_edge")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mllm_edge":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


GRAPH = {name: set(imports(path)) - {name} for name, path in MODULES.items()}


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def test_imports_go_one_way() -> None:
    rank = {name: place for place, name in enumerate(ORDER)}
    assert {room(module) for module in MODULES} - {""} == set(ORDER)
    against = [
        (module, other)
        for module, others in GRAPH.items()
        for other in others
        if room(module) and room(module) != room(other) and rank[room(module)] < rank.get(room(other), len(ORDER))
    ]
    assert against == []


def test_no_circle_of_files() -> None:
    state: dict[str, int] = {}

    def visit(module: str, path: list[str]) -> None:
        if state.get(module) == 2:
            return
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        for other in GRAPH[module]:
            visit(other, [*path, module])
        state[module] = 2

    for module in MODULES:
        visit(module, [])


def test_no_file_is_long() -> None:
    rooms = [ROOT, *(ROOT.parent / name for name in ("tests", "benchmarks", "examples"))]
    files = [path for room in rooms for path in room.rglob("*.py")]
    assert {str(path): lines for path in files if (lines := len(path.read_text("utf-8").splitlines())) > 400} == {}


@pytest.mark.parametrize("place", SHARED)
def test_no_system_is_named_where_all_are_served(place: str) -> None:
    named = re.compile(r"\b(" + "|".join([*SYSTEMS, "smartedit"]) + r")\b", re.IGNORECASE)
    home = ROOT / place
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in ([home] if home.is_file() else sorted(home.rglob("*.py")))
        for line in path.read_text(encoding="utf-8").splitlines()
        if named.search(line)
    ]
    assert found == []


def test_tensors_and_tokens_of_systems_stand_in_models_alone() -> None:
    """Names that schema 1 knew; the runtime sees them in the manifest."""
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in MODULES.values()
        if path.relative_to(ROOT).parts[0] != "models" and path != ROOT / "bundle" / "upgrade.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(RESERVED, line)
    ]
    assert found == []
