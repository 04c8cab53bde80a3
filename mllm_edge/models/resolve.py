"""Weights by name, at random, from a folder or the hub: one way for every system."""

from __future__ import annotations

import importlib.resources
from dataclasses import replace
from pathlib import Path

from mllm_edge import models
from mllm_edge.checkpoints.tensors import random_weights, resolve_folder
from mllm_edge.errors import BadInput, look_up
from mllm_edge.models.info import SystemModule
from mllm_edge.models.plan import Checkpoint


def resolve(system: str, weights: str = "", config: str | None = None, template: str = "") -> Checkpoint:
    """Find a system's weights.

    Args:
        system: its name.
        weights: shipped ones by their name, "" for those of `config`, "random", a folder or a hub id in any layout
            that the system's loader knows.
        config: of shipped or random weights; by default the first that ships.
        template: the name of the prompt, by default the one that the checkpoint says.

    Raises:
        BadInput: an unknown system, config or template, weights that cannot be found, or that are not the system's.
        MissingPackage: PyTorch or transformers is not installed.
    """
    module = models.get(system).load_module()
    checkpoint = _opened(module, system, weights, config)
    if not template:
        return checkpoint
    prompt = look_up("template", template, module.PROMPTS)
    return replace(checkpoint, prompt=lambda: (prompt, "--template"))


def _opened(module: SystemModule, system: str, weights: str, config: str | None) -> Checkpoint:
    if config is not None and config not in module.CONFIGS:
        raise BadInput(f"{system} has no config {config!r}; it has {', '.join(module.CONFIGS)}")
    if weights == "random":
        name = config or module.SHIPPED[0]
        dims = module.CONFIGS[name]
        source = {"kind": "random", "config": name, "seed": "0"}
        tensors = random_weights(module.tensor_shapes(dims))
        return Checkpoint(system, name, dims, tensors, shipped(system) / module.SHIPPED[0], source)
    if weights in ("", *module.SHIPPED):
        name = weights or config or module.SHIPPED[0]
        if name not in module.SHIPPED or config not in (None, name):
            raise BadInput(
                f"weights of {' and '.join(module.SHIPPED)} come with the package, none of {config or weights!r}; "
                "add --weights random or a path"
            )
        return module.load(shipped(system) / name)
    if config is not None:
        raise BadInput("--config goes with --weights random; a checkpoint brings its own config")
    return module.load(resolve_folder(weights))


def shipped(system: str) -> Path:
    """The folder of the checkpoints that our recipes trained and that come with the package."""
    return Path(str(importlib.resources.files("mllm_edge"))) / "weights" / system
