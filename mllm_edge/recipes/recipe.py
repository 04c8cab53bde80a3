"""A recipe: a YAML file that trains or fine-tunes one part of a system."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mllm_edge.bundle.read import read_text
from mllm_edge.errors import BadInput, first_line, no_such

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


LARGEST = 1 << 20  # bytes of a recipe


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adaptation of the linears `targets`; the defaults are LLaVA's."""

    r: int = 128
    alpha: int = 256
    dropout: float = 0.05
    targets: list[str] = field(default_factory=lambda: list(LINEARS))


@dataclass(frozen=True)
class Recipe:
    """All settings of a training run.

    `batch` counts samples per optimizer step over all processes and accumulation steps. `init` maps a part of the model
    to the folder of an earlier run. `data` is specific to the task (empty: our scenes). `precision` "auto" selects bf16
    if the hardware multiplies it natively, else fp32. `connector_lr` is a separate learning rate for the connector, as
    in LLaVA-1.5 (0: as `lr`); `connector` replaces the config's and begins anew, with `tokens` rows for each picture
    where its kind lets their number be chosen (`models/blocks/connectors.py`).
    """

    task: str
    out: str
    summary: str = ""
    config: str = "tiny"
    seed: int = 0
    steps: int = 1000
    batch: int = 32
    accumulate: int = 1
    lr: float = 1e-3
    connector_lr: float = 0.0
    connector: str = ""
    tokens: int = 0
    weight_decay: float = 0.0
    warmup: float = 0.03
    clip: float = 1.0
    precision: str = "auto"
    save_every: int = 500
    log_every: int = 10
    evaluate: int = 0
    workers: int = 0
    init: dict[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    lora: LoraSettings | None = None
    dtype: str = "float16"


def available() -> dict[str, str]:
    """Name -> one-line summary of every recipe that ships with the package."""
    files = sorted(_folder().glob("*.yaml"))
    return {file.stem: str(yaml.safe_load(file.read_text(encoding="utf-8")).get("summary", "")) for file in files}


def load(name: str, overrides: list[str]) -> Recipe:
    """Read a recipe by name or YAML path and apply `key=value` overrides (dots reach into `init`, `data`, `lora`).

    Raises:
        BadInput: unknown recipe or key (with the nearest known one), or a value of the wrong type.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _folder() / f"{name}.yaml"
    if not path.is_file():
        raise no_such("recipe", name, available(), "see: mllm-edge recipes")
    values = _parse(read_text(path, LARGEST), str(path))
    if not isinstance(values, dict):
        raise BadInput(f"{path} must hold `key: value` lines; see the shipped recipes")
    for override in overrides:
        _apply(values, override)
    return _build(Recipe, values, path.name)


def _folder() -> Path:
    return Path(str(importlib.resources.files("mllm_edge"))) / "recipes" / "hub"


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise BadInput(f"{override!r} is not an override; write key=value")
    *parents, last = key.split(".")
    for parent in parents:
        values[parent] = values.get(parent) or {}
        values = values[parent]
        if not isinstance(values, dict):
            raise BadInput(f"{key} reaches into {parent}, which holds a plain value; correct the key")
    values[last] = _parse(text, key) if text else text


def _parse(text: str, where: str) -> Any:
    """YAML without aliases: a few lines of them unfold to more than any memory."""
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise BadInput(f"{where} has an alias (*name), which recipes do not use; write the value out")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInput(f"{where} is not valid YAML ({first_line(error)}); correct it") from None


def _build(kind: type[Any], values: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            raise BadInput(
                f"{where} has no setting {key!r}; " + (f"did you mean {near[0]!r}?" if near else "remove it")
            )
    needed = dataclasses.MISSING
    missing = [n for n, f in fields.items() if n not in values and f.default is needed and f.default_factory is needed]
    if missing:
        raise BadInput(f"{where} lacks {', '.join(missing)}; add it")
    return kind(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if hint == (LoraSettings | None):
        return None if value is None else _build(LoraSettings, value, where)
    plain = typing.get_origin(hint) or hint
    if plain is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as a string
        except ValueError:
            pass
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise BadInput(f"{where} must be {plain.__name__}, not {value!r}; correct it")
    return value
