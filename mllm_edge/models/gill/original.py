"""GILL as its authors publish it: what was trained in two files, and beside them the bases that it was trained on.

A folder with these, under the names that they are downloaded by (reference: `gill/models.py` of kohjingyu/gill). The
bases may also lie beside the folder.

    model_args.json              how it was trained
    pretrained_ckpt.pth.tar      what was trained, with the rows of the picture tokens alone
    decision_model.pth.tar       the decision between retrieving and generating; may be missing
    opt-6.7b/                    OPT in Hugging Face's layout, with its tokenizer
    clip-vit-large-patch14/      CLIP, whole or its vision half
    stable-diffusion-v1-5/       with unet/, vae/, text_encoder/ and tokenizer/ in diffusers' layout
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm_edge.checkpoints.tensors import (
    Tensors,
    check_all_used,
    check_shapes,
    merged,
    open_file,
    open_folder,
    read_json,
    renamed,
)
from mllm_edge.checkpoints.tokenizer import read_tokenizer
from mllm_edge.checkpoints.tokenizer_files import extend, role_names
from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.unet import unet_dims
from mllm_edge.models.blocks.vae import vae_dims, vae_name
from mllm_edge.models.fields import Fields, check_fixed, refuse_quantized, whole
from mllm_edge.models.gill.heads import MapperDims
from mllm_edge.models.gill.model import CLASS_TOKEN, LM, TOKENS, GillDims
from mllm_edge.models.language.opt import TABLE, canonical, opt_dims
from mllm_edge.models.layouts import canonical_name
from mllm_edge.models.llava.dims import vit_dims
from mllm_edge.models.parts import filled

ARGS, TRAINED, DECISION = "model_args.json", "pretrained_ckpt.pth.tar", "decision_model.pth.tar"
DIFFUSION = "stable-diffusion-v1-5"
ROWS = "picture_rows"  # of the table
ROLES = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>", "add_bos_token": True}
_FIXED: dict[str, tuple[Any, ...]] = {
    "freeze_lm": (True,),
    "freeze_vm": (True,),
    "num_tokens": (len(TOKENS),),
    "ret_text_fc_mode": ("linear",),
    "share_ret_gen": (True,),
    "text_emb_layers": ([-1],),
    "text_fc_mode": ("gill_mapper",),
}
_SCHEDULE: dict[str, tuple[Any, ...]] = {
    "beta_end": (0.012,),
    "beta_schedule": ("scaled_linear",),
    "beta_start": (0.00085,),
    "num_train_timesteps": (1000,),
    "prediction_type": ("epsilon",),
    "set_alpha_to_one": (False,),
    "steps_offset": (1,),
    "trained_betas": (None,),
}
_NAMES = (
    (r"model\.input_embeddings\.weight$", ROWS),
    (r"model\.logit_scale$", "logit_scale"),
    (r"model\.(visual_embeddings|visual_fc)\.", r"connector.\1."),
    (r"model\.ret_text_hidden_fcs\.0\.model\.", "heads.retrieval."),
    (r"model\.gen_text_hidden_fcs\.0\.", "heads.mapper."),
)
_DECISION = ((r"1\.(weight|bias)$", r"heads.decision.\1"),)
_CLIP = (
    (r"(?:vision_model\.)?(embeddings\.|pre_layrnorm\.|encoder\.layers\.|post_layernorm\.)", r"vision_encoder.\1"),
)
_VAE = ((r"(decoder|post_quant_conv)\.", r"vae_decoder.\1."),)
WITHOUT_EFFECT = {
    ROWS: "in the table",
    r"clip\.(?:text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale)": "CLIP's half for text",
    r"clip\.(?:.*\.)?position_ids": "counts up",
    r"vae\.(?:encoder|quant_conv)\..*": "the half that reads pictures",
}


@dataclass(frozen=True)
class Opened:
    """Dims, tensors under our names (what has none keeps its own), the folders that they come from, and one with the
    tokenizer."""

    dims: GillDims
    tensors: Tensors
    folders: list[Path]
    tokenizer: Path


def is_original(folder: Path) -> bool:
    """Whether a folder holds GILL's own file."""
    return (folder / TRAINED).is_file()


def open_original(folder: Path) -> Opened:
    """Open the published layout.

    Raises:
        BadInput: a base is missing (named), a field or a number is not as it is built here, or a tensor has no place.
    """
    args, where = read_json(folder / ARGS), folder / ARGS
    check_fixed(args, _FIXED, where)
    opt = _base(folder, args, "opt_version", "the language model")
    clip = _base(folder, args, "visual_encoder", "CLIP")
    parts = {name: _diffusion(folder, name) for name in ("unet", "vae", "text_encoder", "tokenizer")}
    # 1. What was trained.
    trained = renamed(open_file(folder / TRAINED, "state_dict"), lambda n: canonical_name(_bare(n), _NAMES) or n)
    decides = (folder / DECISION).is_file()
    if decides:
        decision = open_file(folder / DECISION, "state_dict")
        trained = merged([trained, renamed(decision, lambda n: canonical_name(_bare(n), _DECISION) or n)])
    # 2. The language model, with the rows of the picture tokens in its table.
    base = renamed(open_folder(opt), lambda name: f"{LM}{known}" if (known := canonical(name)) else None)
    tokenizer = Path(_extended(opt).name)
    start = len(read_tokenizer(tokenizer).tokens) - len(TOKENS)
    _check_ids(args, start, where)
    table = _table(base, trained, start, folder)
    # 3. CLIP and the diffusion model.
    eyes = renamed(open_folder(clip), lambda name: canonical_name(name, _CLIP) or f"clip.{name}")
    unet = renamed(open_folder(parts["unet"]), lambda name: f"unet.{name}")
    vae = renamed(open_folder(parts["vae"]), lambda n: canonical_name(vae_name(n), _VAE) or f"vae.{vae_name(n)}")
    mapper = _mapper(trained, folder)
    empty = _one("empty_text", (1, mapper.queries, mapper.out_width), lambda: empty_text(parts, mapper.queries))
    configs = {place: _config(place) for place in (opt, clip, parts["unet"], parts["vae"])}
    if (schedule := parts["unet"].parent / "scheduler" / "scheduler_config.json").is_file():
        check_fixed(read_json(schedule), _SCHEDULE, schedule)
    dims = GillDims(
        vit_dims(configs[clip].get("vision_config") or configs[clip], -1, clip / "config.json"),
        opt_dims(configs[opt], start + len(TOKENS), opt / "config.json"),
        mapper,
        unet_dims(configs[parts["unet"]], parts["unet"] / "config.json"),
        vae_dims(configs[parts["vae"]], parts["vae"] / "config.json"),
        rows=whole(args, "n_visual_tokens", where, 1),
        query_width=whole(args, "ret_emb_dim", where, 256),
        decides=decides,
    )
    check_fitting(dims, where)
    tensors = merged([eyes, unet, vae, base, trained, table, empty])
    return Opened(dims, tensors, [folder, opt, clip, *parts.values()], tokenizer)


def check_fitting(dims: GillDims, where: Path) -> None:
    """Raise BadInput where the parts do not go together."""
    unet, vae, read = dims.unet, dims.vae, dims.mapper.out_width
    if dims.vision.depth != dims.vision.layers:
        raise BadInput(
            f"{where} taps CLIP at layer {dims.vision.depth} of {dims.vision.layers}; the last one is needed"
        )
    if unet.text_width != read:
        raise BadInput(f"{where}: the mapper gives rows of {read}, the UNet reads {unet.text_width}; they do not fit")
    if not unet.channels == unet.out_channels == vae.latent_channels or vae.channels != 3:
        raise BadInput(
            f"{where}: UNet and autoencoder have {unet.channels} and {vae.latent_channels} channels; they do not fit"
        )
    if dims.mapper.width % dims.mapper.heads or dims.language.vocabulary <= len(TOKENS):
        raise BadInput(f"{where} has a mapper or a vocabulary that cannot be; copy it again")


@torch.no_grad()
def empty_text(parts: dict[str, Path], length: int) -> Tensor:
    """What the diffusion model reads for an empty prompt, float32 [1,length,D]: states after the final norm of the text
    encoder, whose input is BOS, an end and padding (diffusers `StableDiffusionPipeline.encode_prompt`).

    Raises:
        BadInput: the text encoder or its tokenizer is not what that needs.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    folder, where = parts["text_encoder"], parts["text_encoder"] / "config.json"
    config = CLIPTextConfig.from_dict(_config(folder))
    if config.max_position_embeddings != length:
        raise BadInput(f"{where} has {config.max_position_embeddings} positions, the mapper {length}; they do not fit")
    model = CLIPTextModel(config)
    bare = functools.partial(re.sub, r"^text_model\.", "")  # which transformers 5 has no more
    shapes = {bare(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = renamed(open_folder(folder), bare)
    check_shapes(weights, shapes, str(folder))
    check_all_used(weights, shapes, {r"(?:.*\.)?position_ids": "counts up"}, str(folder))
    filled(model, {name: weights[bare(name)] for name in model.state_dict()})
    states: Tensor = model(torch.tensor([_empty_ids(parts["tokenizer"], length)])).last_hidden_state
    return states


def _empty_ids(folder: Path, length: int) -> list[int]:
    ids, roles = read_json(folder / "vocab.json"), role_names(folder)
    try:
        first, end, pad = (ids[roles[role]] for role in ("bos", "eos", "pad"))
    except KeyError as error:
        raise BadInput(f"{folder} does not say what its {error} is; copy the tokenizer again") from None
    return [first, end, *[pad] * (length - 2)]


def _bare(name: str) -> str:
    """Without what training on several GPUs puts in front."""
    return name.removeprefix("module.")


def _base(folder: Path, args: Fields, field: str, what: str) -> Path:
    """The folder of a base, called as the last part of its hub id."""
    name = args.get(field)
    if not isinstance(name, str) or not Path(name).name:
        raise BadInput(f"{folder / ARGS} has {field} {name!r}, which names no base; copy it again")
    return _place(folder, Path(name).name, what)


def _diffusion(folder: Path, name: str) -> Path:
    place = _place(folder, DIFFUSION, "the diffusion model") / name
    if not place.is_dir():
        raise BadInput(f"{place} is missing: a part of the diffusion model; copy it there")
    return place


def _place(folder: Path, name: str, what: str) -> Path:
    for place in (folder / name, folder.absolute().parent / name):
        if place.is_dir():
            return place
    raise BadInput(f"{folder / name} is missing: {what}; copy it there")


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    refuse_quantized(config, folder / "config.json")
    return config


@functools.cache
def _extended(opt: Path) -> tempfile.TemporaryDirectory[str]:
    """OPT's tokenizer with GILL's tokens, in a folder that lasts as long as this process: a base is not written to."""
    place = tempfile.TemporaryDirectory(prefix="mllm-edge-tokenizer-")
    extend(opt, Path(place.name), [CLASS_TOKEN], TOKENS, ROLES)
    return place


def _check_ids(args: Fields, start: int, where: Path) -> None:
    expected = list(range(start, start + len(TOKENS)))
    for field in ("retrieval_token_idx", "gen_token_idx"):
        if args.get(field, expected) != expected:
            raise BadInput(f"{where} has {field} {args[field]}, the tokenizer {expected}; copy OPT's tokenizer again")


def _table(base: Tensors, trained: Tensors, start: int, folder: Path) -> Tensors:
    """The table of embeddings: OPT's first `start` rows, whose last ones are padding, and the picture tokens'."""
    name = f"{LM}{TABLE}"
    if ROWS not in trained or name not in base:
        raise BadInput(f"{folder} lacks the embeddings of OPT or of the picture tokens; copy the whole checkpoint")
    rows, width = base.shape(name)
    if trained.shape(ROWS) != (len(TOKENS), width) or rows < start:
        raise BadInput(
            f"{folder / TRAINED} has {trained.shape(ROWS)} for the picture tokens, OPT's table {rows} x {width}; "
            f"{len(TOKENS)} x {width} and {start} rows or more are needed"
        )
    return _one(name, (start + len(TOKENS), width), lambda: torch.cat([base[name][:start], trained[ROWS]]))


def _one(name: str, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Tensors:
    return Tensors([name], lambda _: make(), lambda _: shape)


def _mapper(trained: Tensors, folder: Path) -> MapperDims:
    """Every dim but the number of heads shows in a tensor's shape."""
    home = "heads.mapper."
    needed = [f"{home}{name}" for name in ("query_embs", "model.weight", "tfm.encoder.layers.0.linear1.weight")]
    if lacking := [name for name in needed if name not in trained]:
        raise BadInput(f"{folder / TRAINED} lacks {lacking[0]}; copy it again")
    numbers = [re.match(rf"{re.escape(home)}tfm\.encoder\.layers\.(\d{{1,3}})\.", name) for name in trained]
    queries, out, mlp = (trained.shape(name) for name in needed)
    if len(queries) != 3 or len(out) != 2:
        raise BadInput(f"{folder / TRAINED} has {needed[0]} {queries} and {needed[1]} {out}; copy it again")
    return MapperDims(
        width=queries[2],
        layers=1 + max(int(found[1]) for found in numbers if found),
        mlp_width=mlp[0],
        queries=queries[1],
        out_width=out[0],
    )
