"""LION as its authors publish it: what was trained in one file, and beside it the bases that it was trained on.

A folder with these, under the names that they are downloaded by (reference: `models/lion_t5.py` and the yaml files of
JiuTian-LION):

    LION-FlanT5-XL.pth           what was trained, also under the key "model"
    eva_vit_g.pth                EVA's vision transformer
    flan-t5-xl/                  Flan-T5 in Hugging Face's layout, with its tokenizer
    bert-base-uncased/           the Q-Former's tokenizer
    ram_swin_large_14m.pth       the tagger; without it the bundle takes tags from the user alone
    ram_tag_list.txt, ram_tag_list_threshold.txt     its words, and what each must exceed
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mllm_edge.bundle.read import read_text
from mllm_edge.checkpoints.tensors import Tensors, check_all_used, merged, open_file, open_folder, read_json, renamed
from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.eva import EvaDims
from mllm_edge.models.blocks.qformer import QFormerDims
from mllm_edge.models.blocks.swin import SwinDims
from mllm_edge.models.language.t5 import t5_dims
from mllm_edge.models.layouts import canonical_name
from mllm_edge.models.lion.model import LionDims, TaggerDims, tensor_shapes

EVA, RAM_FILE, BERT = "eva_vit_g.pth", "ram_swin_large_14m.pth", "bert-base-uncased"
TAG_LIST, THRESHOLDS = "ram_tag_list.txt", "ram_tag_list_threshold.txt"
TAPS = (38, 28, 18)
_TRAINED = (
    (r"Qformer\.bert\.", "queries.qformer."),
    (r"query_tokens$", "queries.qformer.query_tokens"),
    (r"ln_vision\.", "queries.norm."),
    (r"t5_proj\.", "queries.proj."),
    (r"fusion_adapter\.", "aggregator."),
    (r"ln_adapter\.", "aggregator.norm."),
    (r"adapter_proj\.", "aggregator.proj."),
    (r"soft_prompt_hint$", "soft_prompt"),
    (r"t5_model\.", "language_model."),
    (r"visual_encoder\.", "eva."),
)
_EVA = (
    (r"eva\.patch_embed\.proj\.", "vision_encoder.patch_embedding."),
    (r"eva\.blocks\.(\d+)\.norm([12])\.", r"vision_encoder.layers.\1.layer_norm\2."),
    (r"eva\.blocks\.(\d+)\.attn\.proj\.", r"vision_encoder.layers.\1.self_attn.out_proj."),
    (r"eva\.blocks\.(\d+)\.mlp\.", r"vision_encoder.layers.\1.mlp."),
)
_RAM = (
    (r"(?:tagging_head|vision_multi)\.encoder\.layer\.", "tagger.layers."),
    (r"(visual_encoder|image_proj|wordvec_proj|fc)\.(?!.*(?:relative_position_index|attn_mask))", r"tagger.\1."),
    (r"label_embed$", "tagger.label_embed"),
)
_WITHOUT_EFFECT = {
    r"eva\.blocks\.\d+\..*": "blocks after the last tap",
    r"(?:eva\.)?(?:fc_norm|norm|head)\..*": "EVA's classifier",
    r"(?:encoder|decoder)\.embed_tokens\.weight|t5_model\.(?:encoder|decoder)\.embed_tokens\.weight": "`shared` again",
    r"Qformer\..*position_ids": "counts upwards",
    r"(?:queries\.qformer\.)?cls\..*|Qformer\.cls\..*": "the Q-Former's head for words",
    r"(?:tag_encoder|text_decoder|text_proj|tag_fc)\..*": "RAM's captioner",
    r"visual_encoder\..*(?:relative_position_index|attn_mask)": "constants of windows",
    r"(?:tagging_head|vision_multi)\.embeddings\..*": "tags are given as vectors",
}


def is_original(folder: Path) -> bool:
    """Whether a folder holds LION's own file."""
    return _trained_file(folder) is not None


def open_original(folder: Path) -> tuple[LionDims, Tensors, Path]:
    """Dims, tensors under our names, and the folder of the T5 with its tokenizer.

    Raises:
        BadInput: a base is missing (named), or a tensor has no place.
    """
    file, t5 = _trained_file(folder), _t5_folder(folder)
    assert file is not None
    for path, what in ((folder / EVA, "EVA's weights"), (folder / BERT, "the Q-Former's tokenizer")):
        if not path.exists():
            raise BadInput(f"{path} is missing: {what}; copy it there")
    trained = renamed(
        open_file(file, "model"), lambda name: canonical_name(name, _TRAINED) or _kept(name, "position_ids")
    )
    eva = renamed(open_file(folder / EVA), lambda name: f"eva.{name}")
    base = renamed(open_folder(t5), lambda name: _kept(f"language_model.{name}", "embed_tokens.weight"))
    sources = [_split_attention(merged([eva, trained])), base]
    ram = None
    if (folder / RAM_FILE).is_file():
        ram = renamed(open_file(folder / RAM_FILE, "model"), lambda name: canonical_name(name, _RAM) or name)
        sources.append(ram)
    tensors = merged([*sources, trained])
    dims = _dims(tensors, t5, tagger_dims(ram) if ram else None)
    check_all_used(tensors, tensor_shapes(dims), _WITHOUT_EFFECT, str(folder))
    return dims, tensors, t5


def original_tags(folder: Path) -> tuple[list[str], list[float]]:
    """RAM's words and thresholds. Raises BadInput where a file is missing or they do not match."""
    tags = [line.strip() for line in read_text(folder / TAG_LIST).splitlines() if line.strip()]
    try:
        least = [float(line) for line in read_text(folder / THRESHOLDS).split()]
    except ValueError as error:
        raise BadInput(f"{folder / THRESHOLDS} has a line that is no number ({error}); copy it again") from None
    if len(tags) != len(least):
        raise BadInput(f"{folder} has {len(tags)} tags and {len(least)} thresholds; copy both files again")
    return tags, least


def _kept(name: str, unwanted: str) -> str | None:
    return None if name.endswith(unwanted) else name


def _trained_file(folder: Path) -> Path | None:
    found = sorted(path for path in folder.glob("LION*") if path.suffix in (".pth", ".bin", ".safetensors"))
    return found[0] if found else None


def _t5_folder(folder: Path) -> Path:
    found = sorted(path.parent for path in folder.glob("flan-t5-*/config.json"))
    if not found:
        raise BadInput(f"{folder} has no flan-t5-xl or flan-t5-xxl, the base of its language model; copy it there")
    return found[0]


def _split_attention(source: Tensors) -> Tensors:
    """EVA's tensors under our names: one matrix of queries, keys and values becomes three, and keys get no bias."""
    names: dict[str, Callable[[], Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def put(name: str, shape: tuple[int, ...], get: Callable[[], Tensor]) -> None:
        names[name], shapes[name] = get, shape

    for name in [name for name in source if name.startswith("eva.")]:
        shape = source.shape(name)
        if name == "eva.cls_token":
            put("vision_encoder.class_embedding", shape[-1:], lambda name=name: source[name].flatten())  # type: ignore[misc]
        elif name == "eva.pos_embed":
            put("vision_encoder.position_embedding.weight", shape[1:], lambda name=name: source[name][0])  # type: ignore[misc]
        elif found := re.fullmatch(r"eva\.blocks\.(\d+)\.attn\.(qkv\.weight|[qv]_bias)", name):
            width, place = shape[0] // 3, f"vision_encoder.layers.{found[1]}.self_attn."
            if found[2] == "qkv.weight":
                for at, part in enumerate("qkv"):
                    get = lambda name=name, at=at, width=width: source[name][at * width : (at + 1) * width]  # noqa: E731
                    put(f"{place}{part}_proj.weight", (width, shape[1]), get)
                put(f"{place}k_proj.bias", (width,), lambda width=width: torch.zeros(width))  # type: ignore[misc]
            else:
                put(f"{place}{found[2][0]}_proj.bias", shape, lambda name=name: source[name])  # type: ignore[misc]
        else:
            put(canonical_name(name, _EVA) or name, shape, lambda name=name: source[name])  # type: ignore[misc]
    last = max(TAPS)
    return Tensors(
        [name for name in names if not _beyond(name, last)],
        lambda name: names[name](),
        lambda name: shapes[name],
        lambda name: f"{name} of EVA",
    )


def _beyond(name: str, last: int) -> bool:
    found = re.match(r"vision_encoder\.layers\.(\d+)\.", name)
    return found is not None and int(found[1]) > last


def _dims(tensors: Tensors, t5: Path, tagger: TaggerDims | None) -> LionDims:
    """Every dim shows in a tensor's shape or stands in the T5's config."""
    patch = tensors.shape("vision_encoder.patch_embedding.weight")
    positions = tensors.shape("vision_encoder.position_embedding.weight")[0]
    width = patch[0]
    vision = EvaDims(
        image_size=round((positions - 1) ** 0.5) * patch[2],
        patch_size=patch[2],
        width=width,
        heads=width // 88,
        mlp_width=tensors.shape("vision_encoder.layers.0.mlp.fc1.weight")[0],
        taps=TAPS,
    )
    vocabulary, text = tensors.shape("queries.qformer.embeddings.word_embeddings.weight")
    qformer = QFormerDims(
        width=text,
        layers=1 + max(int(n.split(".")[4]) for n in tensors if n.startswith("queries.qformer.encoder.layer.")),
        heads=text // 64,
        mlp_width=tensors.shape("queries.qformer.encoder.layer.0.intermediate.dense.weight")[0],
        queries=tensors.shape("queries.qformer.query_tokens")[1],
        read_width=width,
        vocabulary=vocabulary,
        positions=tensors.shape("queries.qformer.embeddings.position_embeddings.weight")[0],
    )
    bottleneck = tensors.shape("language_model.encoder.block.0.layer.1.adapter.adapters.0.down_proj.weight")[0]
    heads, mlp = width // 88, tensors.shape("aggregator.blocks.0.intermediate.dense.weight")[0]
    return LionDims(
        vision,
        qformer,
        replace(t5_dims(read_json(t5 / "config.json"), t5 / "config.json"), activation="gelu", bottleneck=bottleneck),
        heads,
        mlp,
        tagger=tagger,
    )


def tagger_dims(tensors: Tensors) -> TaggerDims:
    """RAM's. Its pictures are so large that one window covers the last map, as those that are published."""
    swin = "tagger.visual_encoder."
    blocks = [
        name for name in tensors if re.fullmatch(rf"{re.escape(swin)}layers\.\d+\.blocks\.\d+\.norm1\.weight", name)
    ]
    stages = 1 + max(int(name.split(".")[3]) for name in blocks)
    tables = [tensors.shape(f"{swin}layers.{n}.blocks.0.attn.relative_position_bias_table") for n in range(stages)]
    window = (math.isqrt(tables[0][0]) + 1) // 2
    width, _, patch, _ = tensors.shape(f"{swin}patch_embed.proj.weight")
    tags, label_width = tensors.shape("tagger.label_embed")
    return TaggerDims(
        SwinDims(
            image_size=window * patch << stages - 1,
            width=width,
            depths=tuple(sum(name.split(".")[3] == str(stage) for name in blocks) for stage in range(stages)),
            heads=tuple(heads for _, heads in tables),
            window=window,
            patch_size=patch,
        ),
        tags=tags,
        label_width=label_width,
        width=tensors.shape("tagger.wordvec_proj.weight")[0],
        mlp_width=tensors.shape("tagger.layers.0.intermediate.dense.weight")[0],
        layers=1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("tagger.layers.")),
    )
