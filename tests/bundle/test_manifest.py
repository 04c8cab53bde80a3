"""The manifest: round trip, and every way in which a bundle can be broken."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_edge.bundle.manifest import (
    EmbeddingTable,
    Generation,
    GgufDetails,
    LanguageModelEntry,
    Manifest,
    Prompt,
    Slot,
    StageEntry,
    TensorSpec,
    Tokenizer,
)
from mllm_edge.bundle.read import file_entry, read_manifest, write_manifest
from mllm_edge.bundle.sources import Pixels
from mllm_edge.errors import BadInput


def make(folder: Path) -> Manifest:
    """A well-formed bundle of two stages and a language model, whose files hold a few bytes."""
    for name in ("vision.onnx", "connector.onnx", "model.gguf"):
        (folder / name).write_bytes(name.encode())

    def stage(name: str, file: str, inputs: TensorSpec, outputs: TensorSpec) -> StageEntry:
        entry = vars(file_entry(folder, file))
        return StageEntry(**entry, name=name, engine="onnx", precision="fp32", inputs=[inputs], outputs=[outputs])

    pixels = TensorSpec("pixel_values", "float32", [1, 3, 28, 28])
    features = TensorSpec("image_features", "float32", [1, 4, 32])
    embeds = TensorSpec("image_embeds", "float32", [1, 4, 64])
    manifest = Manifest(
        system="llava",
        config="small",
        target="cpu",
        created="2026-01-01T00:00:00Z",
        tool_version="0.1.0",
        licences={"weights": "Apache-2.0"},
        source={"kind": "random"},
        tasks=["chat"],
        stages=[
            stage("vision_encoder", "vision.onnx", pixels, features),
            stage("connector", "connector.onnx", features, embeds),
        ],
        language_model=LanguageModelEntry(
            name="language_model",
            engine="gguf",
            kind="causal",
            precision="f32",
            tokenizer="language_model",
            context=128,
            width=64,
            vocabulary=100,
            kv_bytes_per_token=512,
            gguf=GgufDetails(
                **vars(file_entry(folder, "model.gguf")),
                layers=2,
                kv_width=64,
                embedding=EmbeddingTable("F32", 0, [100, 64]),
            ),
        ),
        sources=[Pixels("pixel_values", 28, "pad", "bicubic", [1, 2, 3], [0.5] * 3, [0.5] * 3)],
        tokenizers=[Tokenizer("language_model", "gguf", "model.gguf")],
        prompt=Prompt(
            "plain",
            "",
            "{text}",
            "{text}",
            "{text}",
            [],
            [Slot("<image>", "pixels", ["image_embeds"], joint="<image>\n")],
        ),
        generation=Generation(),
    )
    write_manifest(manifest, folder)
    return manifest


def test_round_trip(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert json.loads((tmp_path / "bundle.json").read_text())["schema"] == 2


def edit(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        node: Any = data
        for part in parents:
            node = node[int(part)] if part.isdecimal() else node[part]
        if value is ...:
            del node[last]
        else:
            node[int(last) if last.isdecimal() else last] = value

    return change


def boxes(pattern: str, unit: float = 1.0) -> dict[str, Any]:
    return {"kind": "boxes", "pattern": pattern, "decimals": 3, "unit": unit}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("schema", 3), "has schema 3, this tool reads up to 2; install mllm-edge >= 0.1.0"),
        (edit("schema", "1"), "no schema version"),
        (edit("schema", True), "no schema version"),
        (edit("stages", ...), "lacks stages"),
        (edit("stages", {}), "must be a list"),
        (edit("language_model.gguf.layers", "two"), "wrong type"),
        (edit("stages.0.inputs.0.shape", [1, 3, None, 28]), "wrong type"),
        (edit("stages.0.file", "../vision.onnx"), "outside its folder"),
        (edit("stages.0.file", "/etc/passwd"), "outside its folder"),
        (edit("stages.0.file", ""), "outside its folder"),
        (edit("stages.0.engine", "shell"), "engine 'shell'"),
        (edit("stages.1.inputs.0.shape", [1, 4, 48]), "vision.onnx gives .* but connector.onnx takes"),
        (edit("stages.1.outputs.0.shape", [1, 4, 48]), "connector.onnx gives .*48 but model.gguf takes 64"),
        (edit("language_model.gguf.embedding.shape", [100, 32]), "model.gguf: embedding"),
        (edit("sources.0.size", 14), "14x14"),
        (edit("sources.0.size", 100_000), "the size of pixel_values is 100000"),
        (edit("sources.0.kind", "smell"), "of kind 'smell'.*; install mllm-edge >= 0.1.0"),
        (edit("answers", [{"kind": "music"}]), "of kind 'music'.*; install mllm-edge >= 0.1.0"),
        (edit("prompt.slots.0.of", "sounds"), "of 'sounds'; install mllm-edge >= "),
        (edit("prompt.questions", {"sing": "Sing."}), "a question 'sing'; install mllm-edge >= "),
        (edit("prompt.questions", {"segment": "Segment it."}), "question segment is 'Segment it.'"),
        (edit("prompt.questions", {"describe": "What of {what}?"}), "question describe is"),
        (edit("prompt.questions", {"region": "What is <bbox>?"}), "question region is"),
        (edit("answers", [boxes("[")]), "no regular expression"),
        (edit("answers", [boxes("(a)(b)(c)")]), "must have four groups"),
        (edit("answers", [boxes("((a+)+)(b)(c)")]), "none of them repeated"),
        (edit("answers", [boxes("(a)(b)(c)(d)", unit=0.0)]), "unit of boxes is 0.0"),
        (
            lambda data: data["prompt"]["slots"].append(data["prompt"]["slots"][0] | {"placeholder": "<second>"}),
            "pictures have several placeholders",
        ),
        (edit("prompt.slots.0.tensors", ["nothing"]), "no stage and no source gives nothing"),
        (edit("stages.1.outputs.0.name", "image_features"), "image_features is given twice"),
        (edit("language_model.context", 0), "language_model.context is 0"),
        (edit("language_model.kind", "seq2seq"), "seq2seq by gguf"),
        (edit("language_model.tokenizer", "mine"), "no tokenizer 'mine'"),
        (edit("tokenizers.0.file", "other.gguf"), "other.gguf\\) cannot be"),
        (edit("stages.0.sha256", "0" * 64), "does not match its SHA-256"),
        (edit("stages.0.bytes", 5), "not 5"),
    ],
)
def test_broken_manifest(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    make(tmp_path)
    path = tmp_path / "bundle.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(BadInput, match=message):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\x00"])
def test_not_a_manifest(tmp_path: Path, text: str) -> None:
    make(tmp_path)
    (tmp_path / "bundle.json").write_text(text)
    with pytest.raises(BadInput):
        read_manifest(tmp_path)


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="mllm-edge export"):
        read_manifest(tmp_path)


def test_missing_truncated_flipped_and_swapped_files(tmp_path: Path) -> None:
    make(tmp_path)
    model = tmp_path / "model.gguf"
    original = model.read_bytes()
    model.write_bytes(original[:-1])
    with pytest.raises(BadInput, match="bytes"):
        read_manifest(tmp_path)
    model.write_bytes(bytes([original[0] ^ 1]) + original[1:])
    with pytest.raises(BadInput, match="SHA-256"):
        read_manifest(tmp_path)
    assert read_manifest(tmp_path, verify_hash=False)
    model.unlink()
    with pytest.raises(BadInput, match=r"model\.gguf is missing"):
        read_manifest(tmp_path)
    model.write_bytes((tmp_path / "vision.onnx").read_bytes())
    with pytest.raises(BadInput, match=r"model\.gguf"):
        read_manifest(tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "bundle"
    inside.mkdir()
    make(inside)
    (inside / "model.gguf").unlink()
    (tmp_path / "elsewhere").write_bytes(b"model.gguf")
    (inside / "model.gguf").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="outside its folder"):
        read_manifest(inside)


def test_links_inside_a_hubs_cache_are_honest(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    bundle, blobs = repository / "snapshots" / "0a1b" / "llava.bundle", repository / "blobs"
    bundle.mkdir(parents=True)
    blobs.mkdir()
    manifest = make(bundle)
    for number, path in enumerate(sorted(bundle.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("../../../blobs") / str(number))
    assert read_manifest(bundle) == manifest
    for outside in (tmp_path / "elsewhere", repository / "refs"):
        (bundle / "model.gguf").unlink()
        outside.write_bytes(b"model.gguf")
        (bundle / "model.gguf").symlink_to(outside)
        with pytest.raises(BadInput, match="outside its folder"):
            read_manifest(bundle)


def test_a_large_file_of_holes_is_not_hashed(tmp_path: Path) -> None:
    make(tmp_path)
    with (tmp_path / "vision.onnx").open("r+b") as stream:
        stream.truncate(40 << 30)
    manifest = json.loads((tmp_path / "bundle.json").read_text())
    manifest["stages"][0]["bytes"] = 40 << 30
    (tmp_path / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match=r"vision\.onnx has 42949672960 bytes, nearly all of them holes"):
        read_manifest(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [field.name for field in dataclasses.fields(Manifest)]


@settings(deadline=None, max_examples=60)
@given(field=st.sampled_from(FIELDS), value=json_values)
def test_any_value_anywhere_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, field: str, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("bundle")
    make(folder)
    path = folder / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    message = ""
    try:
        read_manifest(folder)
    except BadInput as error:
        message = str(error)
    assert "\n" not in message
