"""LoRA adapters of peft, merged into their base tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from mllm_edge.checkpoints.tensors import Shape, Tensors, open_file, read_json, some
from mllm_edge.errors import BadInput

CONFIG = "adapter_config.json"
# Settings that change the product, and the values at which they do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "fan_in_fan_out": (None, False),
    "lora_bias": (None, False),
    "layer_replication": (None, []),
}
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")


def merge_lora(base: Tensors, adapter: Path, rename: Callable[[str], str] = str) -> Tensors:
    """`base` with a peft LoRA added: W + scale * B @ A, tensor by tensor (peft's `merge_and_unload`). Whole tensors of
    the adapter (`modules_to_save`, trained biases) take the place of the base's.

    Args:
        base: weights under the names that `rename` gives.
        adapter: a folder with `adapter_config.json` and `adapter_model.safetensors` or `.bin`.
        rename: a tensor's name in the adapter's model -> its name in `base`.

    Raises:
        BadInput: the configuration or weights are missing, a kind of LoRA that is not known, or weights (named) that
            match no tensor of `base`.
    """
    scale = _scale(adapter)
    found = [adapter / f"adapter_model.{suffix}" for suffix in ("safetensors", "bin")]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        raise BadInput(f"{adapter} has no adapter_model.safetensors; copy the whole adapter")
    weights = open_file(path)
    pairs, whole = dict[str, dict[str, str]](), dict[str, str]()
    for name in weights:
        inner = name.removeprefix("base_model.model.")
        if factor := _FACTOR.fullmatch(inner):
            pairs.setdefault(rename(f"{factor[1]}.weight"), {})[f"{factor[2] or ''}{factor[3]}"] = name
        else:
            whole[rename(re.sub(r"\.(?:modules_to_save(?:\.default)?|base_layer)\.", ".", inner))] = name
    complete = ({"A", "B"}, {"embedding_A", "embedding_B"})
    unknown = [name for name, pair in pairs.items() if name not in base or pair.keys() not in complete]
    unknown += [name for name in whole if name not in base]
    if unknown:
        raise BadInput(f"{path} fits no weight of the base model ({some(unknown)}); give the base it was made for")

    def shape_of(name: str) -> Shape:
        return weights.shape(whole[name]) if name in whole else base.shape(name)

    for name, pair in pairs.items():
        shape = _product_shape(weights, pair)
        if shape != shape_of(name):
            raise BadInput(
                f"{path}: the LoRA of {name} is for {shape}, the base has {shape_of(name)}; give its own base"
            )

    def get(name: str) -> Tensor:
        tensor = weights[whole[name]] if name in whole else base[name]
        if name not in pairs:
            return tensor
        return (tensor.float() + scale * _product(weights, pairs[name])).to(tensor.dtype)

    def origin(name: str) -> str:
        return weights.origin(whole[name]) if name in whole else base.origin(name)

    return Tensors(list(base), get, shape_of, origin)


def base_of(adapter: Path) -> str:
    """Where an adapter's base is, as its configuration says. Raises BadInput when it does not."""
    name = read_json(adapter / CONFIG).get("base_model_name_or_path")
    if not name:
        raise BadInput(f"{adapter / CONFIG} names no base_model_name_or_path; add where the base model is")
    return str(name)


def _scale(adapter: Path) -> float:
    config = read_json(adapter / CONFIG)
    for key, plain in _PLAIN.items():
        if key in config and config[key] not in plain:
            raise BadInput(
                f"{adapter / CONFIG} has {key} {config[key]!r}, which is not known; merge it with peft first"
            )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or rank < 1:
        raise BadInput(f"{adapter / CONFIG} has no usable r and lora_alpha; copy it again")
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _product_shape(weights: Tensors, pair: dict[str, str]) -> Shape:
    if "A" in pair:
        return weights.shape(pair["B"])[0], weights.shape(pair["A"])[-1]
    return weights.shape(pair["embedding_A"])[-1], weights.shape(pair["embedding_B"])[0]


def _product(weights: Tensors, pair: dict[str, str]) -> Tensor:
    if "A" in pair:
        return weights[pair["B"]].float() @ weights[pair["A"]].float()
    return (weights[pair["embedding_B"]].float() @ weights[pair["embedding_A"]].float()).T
