"""llama.cpp's multimodal projector file, so that the same LLaVA runs in llama.cpp's tools (`--mmproj`).

The graph that reads it is `tools/mtmd` of llama.cpp with architecture `clip` and projector `mlp`. It runs the blocks up
to the tapped one, drops the class token and applies Linear, tanh-GELU, Linear. A one-layer connector is written as two
layers by GELU(x) - GELU(-x) = x, which holds exactly for the tanh form too.

llama.cpp's issue 25814 (seen in llama-cpp-python 0.3.36): its graph puts the class token last but numbers positions and
picks patches as if it came first, for every CLIP file. Our files are right for builds where that is fixed; `run` does
not use them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np

from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.vit import VitDims

if TYPE_CHECKING:
    import torch

    from mllm_edge.models.llava.model import LlavaDims

BLOCK_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def write_mmproj(tensors: Mapping[str, torch.Tensor], dims: LlavaDims, path: Path, half: bool = True) -> None:
    """Write the vision encoder and connector of a LLaVA.

    Args:
        tensors: canonical names (`vision_encoder.*`, `connector.*`).
        dims: the system's shape.
        path: the file; it appears only when complete.
        half: matrices as F16 instead of F32 (vectors are always F32).

    Raises:
        BadInput: a connector or an activation that llama.cpp's graph does not have.
    """
    vision = dims.vision
    if not isinstance(vision, VitDims):
        raise BadInput("llama.cpp's projector file holds a CLIP, and this encoder is none; export without --mmproj")
    if dims.connector not in ("linear", "mlp2x_gelu") or dims.merge > 1:
        merged = f" that merges {dims.merge} x {dims.merge} cells" if dims.merge > 1 else ""
        raise BadInput(f"llama.cpp has no projector like {dims.connector!r}{merged}; export without --mmproj")
    if vision.activation not in ("quick_gelu", "gelu"):
        raise BadInput(f"llama.cpp's CLIP has no activation {vision.activation!r}; export without --mmproj")
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, "clip")
    try:
        _write_dims(writer, dims, vision, half)
        for name, array in _tensors(tensors, dims, vision.depth):
            matrix = half and array.ndim > 1
            writer.add_tensor(name, np.ascontiguousarray(array.astype(np.float16 if matrix else np.float32)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
        warnings.warn(
            f"{path.name}: llama.cpp builds with its issue 25814 misplace CLIP's class token and see worse than this "
            "bundle does; mllm-edge itself does not use the file",
            stacklevel=2,
        )
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def _write_dims(writer: gguf.GGUFWriter, dims: LlavaDims, vision: VitDims, half: bool) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_uint32("clip.vision.image_size", vision.image_size)
    writer.add_uint32("clip.vision.patch_size", vision.patch_size)
    writer.add_uint32("clip.vision.embedding_length", vision.width)
    writer.add_uint32("clip.vision.feed_forward_length", vision.mlp_width)
    writer.add_uint32("clip.vision.projection_dim", dims.language.width)
    writer.add_uint32("clip.vision.block_count", vision.depth)
    writer.add_array("clip.vision.feature_layer", [vision.depth])
    writer.add_uint32("clip.vision.attention.head_count", vision.heads)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision.eps)
    writer.add_array("clip.vision.image_mean", list(dims.mean))
    writer.add_array("clip.vision.image_std", list(dims.std))
    writer.add_bool("clip.use_gelu", vision.activation == "gelu")


def _tensors(tensors: Mapping[str, torch.Tensor], dims: LlavaDims, depth: int) -> list[tuple[str, np.ndarray]]:
    def get(name: str) -> np.ndarray:
        array: np.ndarray = tensors[name].float().numpy()
        return array

    eyes = "vision_encoder.embeddings."
    result = [
        ("v.class_embd", get(eyes + "class_embedding")),
        ("v.patch_embd.weight", get(eyes + "patch_embedding.weight")),
        ("v.position_embd.weight", get(eyes + "position_embedding.weight")),
        ("v.pre_ln.weight", get("vision_encoder.pre_layrnorm.weight")),
        ("v.pre_ln.bias", get("vision_encoder.pre_layrnorm.bias")),
    ]
    for number in range(depth):
        for ours, theirs in BLOCK_NAMES.items():
            for kind in ("weight", "bias"):
                source = f"vision_encoder.encoder.layers.{number}.{ours}.{kind}"
                result.append((f"v.blk.{number}.{theirs}.{kind}", get(source)))
    weight, bias = get("connector.0.weight"), get("connector.0.bias")
    if dims.connector == "linear":
        identity = np.eye(len(bias), dtype=np.float32)
        return [
            *result,
            ("mm.0.weight", np.concatenate([weight, -weight])),
            ("mm.0.bias", np.concatenate([bias, -bias])),
            ("mm.2.weight", np.concatenate([identity, -identity], axis=1)),
            ("mm.2.bias", np.zeros_like(bias)),
        ]
    return [
        *result,
        ("mm.0.weight", weight),
        ("mm.0.bias", bias),
        ("mm.2.weight", get("connector.2.weight")),
        ("mm.2.bias", get("connector.2.bias")),
    ]
