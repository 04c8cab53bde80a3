"""Manifests of schema 1 as schema 2. What schema 1 knew by reserved names becomes a default here, and nowhere else."""

from __future__ import annotations

from typing import Any


def upgrade(old: dict[str, Any]) -> dict[str, Any]:
    """The manifest of schema 1 in the form of schema 2; anything else as it is.

    Raises:
        KeyError, TypeError, AttributeError, ValueError, IndexError: it is no manifest of schema 1.
    """
    if old.get("schema") != 1:
        return old
    new = {key: value for key, value in old.items() if key not in ("preprocessing", "schema")}
    prompt, lm, build = dict(old["prompt"]), old["language_model"], dict(old.get("build", {}))
    profile = build.pop("profile", [1, 4, 16])
    tensors = {spec["name"]: spec for stage in old["stages"] for spec in (*stage["inputs"], *stage["outputs"])}
    axes = [size for spec in tensors.values() for size in spec["shape"] if isinstance(size, str)]
    new["build"] = {**build, "axes": dict.fromkeys(axes, profile)}
    new["stages"] = [_stage(stage) for stage in old["stages"]]
    new["sources"] = _sources(old, tensors)
    new["tokenizers"] = [
        {
            "name": "language_model",
            "kind": "gguf",
            "file": lm["file"],
            "lead": prompt.pop("lead"),
            "added": prompt.pop("added", []),
        }
    ]
    new["language_model"] = _language_model(lm)
    phrase = prompt.pop("phrase", [])
    slots = _slots(prompt) if "image_embeds" in tensors else []
    new["prompt"] = {**_without(prompt, "image", "image_joint", "image_open", "image_close", "box"), "slots": slots}
    if "mask_logits" in tensors:
        new["answers"] = [
            {
                "kind": "masks",
                "states": "seg_states",
                "logits": "mask_logits",
                "frame": _frame(old, "mask_logits"),
                "phrase": phrase,
            }
        ]
    return {**new, "schema": 2}


def _sources(old: dict[str, Any], tensors: dict[str, Any]) -> list[dict[str, Any]]:
    steps = old["preprocessing"]
    sources = [{**_without(step, "stage", "input"), "name": step["input"], "kind": "pixels"} for step in steps]
    if "boxes" in tensors:
        sources.append({"kind": "boxes", "name": "boxes"})
    if "seg_states" in tensors:
        at = old["language_model"]["state_positions"]["[SEG]"]
        sources.append({"kind": "states", "name": "seg_states", "tokens": ["[SEG]"], "at": at})
    return sources


def _slots(prompt: dict[str, Any]) -> list[dict[str, Any]]:
    texts = {new: prompt.get(old, "") for new, old in (("open", "image_open"), ("close", "image_close"))}
    texts["joint"] = prompt["image_joint"]
    slots = [{"placeholder": prompt["image"], "of": "pixels", "tensors": ["image_embeds"], **texts}]
    if prompt.get("box"):
        slots.append({"placeholder": prompt["box"], "of": "boxes", "tensors": ["region_embeds"]})
    return slots


def _language_model(lm: dict[str, Any]) -> dict[str, Any]:
    kept = ("name", "engine", "precision", "vocabulary", "flops_per_token", "bytes_per_token")
    details = ("file", "bytes", "sha256", "layers", "kv_width", "embedding")
    return {
        **{key: lm[key] for key in kept if key in lm},
        "kind": "causal",
        "tokenizer": "language_model",
        "context": lm["context_length"],
        "width": lm["hidden_width"],
        "kv_bytes_per_token": 4 * lm["layers"] * lm["kv_width"],
        "gguf": {key: lm[key] for key in details},
    }


def _stage(stage: dict[str, Any]) -> dict[str, Any]:
    inputs = [size for spec in stage["inputs"] for size in spec["shape"] if isinstance(size, str)]
    engines = []
    for engine in stage.get("engines", []):
        profile = engine.get("profile", [])
        engines.append({**_without(engine, "profile"), "axes": dict.fromkeys(inputs, profile) if profile else {}})
    return {**stage, "engines": engines}


def _frame(old: dict[str, Any], logits: str) -> int:
    """Pixels along the square that masks are cut out of: what the stage before the mask decoder reads."""
    makers = {spec["name"]: stage for stage in old["stages"] for spec in stage["outputs"]}
    decoder = makers[logits]
    maker = next(makers[spec["name"]]["name"] for spec in decoder["inputs"] if spec["name"] in makers)
    return int(next(step["size"] for step in old["preprocessing"] if step["stage"] == maker))


def _without(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in keys}
