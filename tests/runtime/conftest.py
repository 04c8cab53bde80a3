"""A tiny bundle made without our export: a random LLaMA GGUF and two small ONNX stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

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

WIDTH, LAYERS, HEADS, FFN, CONTEXT = 64, 2, 2, 96, 128
SIZE, PATCH, FEATURES = 16, 8, 12
PATCHES = (SIZE // PATCH) ** 2
WORDS = ["▁the", "▁red", "▁circle", "▁what", "é", "▁USER", "▁ASSISTANT", "##", "▁🙂"]
CHARACTERS = ["▁", *"abcdefghijklmnopqrstuvwxyz:?.#\n</>USERAIT"]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(CHARACTERS), *WORDS]


def vocabulary_types() -> list[int]:
    """GGUF token types of `PIECES`."""
    kinds = gguf.TokenType
    return [
        kinds.UNKNOWN if i == 0 else kinds.CONTROL if i < 3 else kinds.BYTE if i < 259 else kinds.NORMAL
        for i in range(len(PIECES))
    ]


def llama_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under GGUF names, large enough that different inputs give different answers."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)

    tensors = {
        "token_embd.weight": normal(len(PIECES), WIDTH) * 8,
        "output_norm.weight": np.ones(WIDTH, np.float32),
        "output.weight": normal(len(PIECES), WIDTH) * 4,
    }
    for n in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{n}.{name}.weight"] = np.ones(WIDTH, np.float32)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors[f"blk.{n}.{name}.weight"] = normal(WIDTH, WIDTH)
        for name in ("ffn_gate", "ffn_up"):
            tensors[f"blk.{n}.{name}.weight"] = normal(FFN, WIDTH)
        tensors[f"blk.{n}.ffn_down.weight"] = normal(WIDTH, FFN)
    return tensors


def write_llama(path: Path, embedding: str = "F32", seed: int = 0) -> EmbeddingTable:
    """Write the GGUF; returns where its embedding table lies."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(PIECES))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_scores([0.0 if i < 259 else float(len(piece)) for i, piece in enumerate(PIECES)])
    writer.add_token_types(vocabulary_types())
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(True)
    for name, tensor in llama_tensors(seed).items():
        kind = gguf.GGMLQuantizationType[embedding if name == "token_embd.weight" else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    table = next(t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
    return EmbeddingTable(embedding, int(table.data_offset), [len(PIECES), WIDTH])


def write_stages(folder: Path) -> None:
    """vision_encoder: patches -> features; connector: features -> embeddings of the decoder's width."""
    rng = np.random.default_rng(7)
    kernel = rng.standard_normal((FEATURES, 3, PATCH, PATCH)).astype(np.float32) * 0.2
    bridge = rng.standard_normal((FEATURES, WIDTH)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["pixel_values", "kernel"], ["map"], strides=[PATCH, PATCH]),
        helper.make_node("Reshape", ["map", "flat"], ["columns"]),
        helper.make_node("Transpose", ["columns"], ["image_features"], perm=[0, 2, 1]),
    ]
    flat = numpy_helper.from_array(np.array([1, FEATURES, PATCHES], np.int64), "flat")
    _write_onnx(
        folder / "vision_encoder.onnx",
        nodes,
        {"pixel_values": [1, 3, SIZE, SIZE]},
        {"image_features": [1, PATCHES, FEATURES]},
        [numpy_helper.from_array(kernel, "kernel"), flat],
    )
    _write_onnx(
        folder / "connector.onnx",
        [helper.make_node("MatMul", ["image_features", "bridge"], ["image_embeds"])],
        {"image_features": [1, PATCHES, FEATURES]},
        {"image_embeds": [1, PATCHES, WIDTH]},
        [numpy_helper.from_array(bridge, "bridge")],
    )


def _write_onnx(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[int]],
    outputs: dict[str, list[int]],
    weights: list[onnx.TensorProto],
) -> None:
    def info(specs: dict[str, list[int]]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in specs.items()]

    graph = helper.make_graph(nodes, path.stem, info(inputs), info(outputs), weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


PROMPT = Prompt(
    name="vicuna_v1",
    system="the",
    first="{system} USER: {text} ASSISTANT:",
    next="USER: {text} ASSISTANT:",
    answer=" {text}</s>",
    stop=["</s>"],
    slots=[Slot("<image>", "pixels", ["image_embeds"], joint="<image>\n")],
)


def write_bundle(folder: Path, embedding: str = "F32", seed: int = 0) -> Manifest:
    """Write a whole bundle into `folder`; returns its manifest."""
    folder.mkdir(parents=True)
    table = write_llama(folder / "language_model.gguf", embedding, seed)
    write_stages(folder)
    pixels = TensorSpec("pixel_values", "float32", [1, 3, SIZE, SIZE])
    features = TensorSpec("image_features", "float32", [1, PATCHES, FEATURES])
    embeds = TensorSpec("image_embeds", "float32", [1, PATCHES, WIDTH])

    def stage(name: str, takes: TensorSpec, gives: TensorSpec) -> StageEntry:
        entry = file_entry(folder, f"{name}.onnx")
        return StageEntry(**vars(entry), name=name, engine="onnx", precision="fp32", inputs=[takes], outputs=[gives])

    manifest = Manifest(
        system="llava",
        config="test",
        target="cpu",
        created="2026-11-01T00:00:00Z",
        tool_version="0.1.0",
        licences={},
        source={"kind": "random"},
        tasks=["chat"],
        stages=[stage("vision_encoder", pixels, features), stage("connector", features, embeds)],
        language_model=LanguageModelEntry(
            name="language_model",
            engine="gguf",
            kind="causal",
            precision="f32",
            tokenizer="language_model",
            context=CONTEXT,
            width=WIDTH,
            vocabulary=len(PIECES),
            kv_bytes_per_token=4 * LAYERS * WIDTH,
            gguf=GgufDetails(
                **vars(file_entry(folder, "language_model.gguf")), layers=LAYERS, kv_width=WIDTH, embedding=table
            ),
        ),
        sources=[Pixels("pixel_values", SIZE, "pad", "bicubic", [122, 116, 104], [0.5] * 3, [0.25] * 3)],
        tokenizers=[Tokenizer("language_model", "gguf", "language_model.gguf")],
        prompt=PROMPT,
        generation=Generation(max_tokens=8),
    )
    write_manifest(manifest, folder)
    return manifest


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete bundle, F32. Tests that change it must copy it."""
    folder = tmp_path_factory.mktemp("bundles") / "tiny.bundle"
    write_bundle(folder)
    return folder


@pytest.fixture
def edit_bundle(tiny_bundle: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copy the tiny bundle with some fields of its manifest replaced."""
    import shutil

    def edit(**changes: object) -> Path:
        folder = tmp_path / "edited.bundle"
        shutil.copytree(tiny_bundle, folder)
        write_manifest(replace(read_manifest(folder), **changes), folder)  # type: ignore[arg-type]
        return folder

    return edit
