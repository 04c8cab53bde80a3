"""What a measurement says: one schema for every form, and for `compare`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mllm_edge.errors import BadInput


@dataclass(frozen=True)
class Spread:
    """Of the repetitions."""

    min: float
    median: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Limits:
    """What the machine can do at most, as measured beside the bundle: GB read from memory and 10^12 floating-point
    operations of fp32 matrix products, per second."""

    memory_gb_per_s: float
    matmul_tflops: float


@dataclass(frozen=True)
class Environment:
    """What a measurement depends on beside the bundle."""

    cpu: str
    threads: int
    target: str
    system: str
    python: str
    versions: dict[str, str]
    build: str
    limits: Limits | None
    gpu: str = ""


@dataclass(frozen=True)
class Result:
    """One bundle's measurements: milliseconds, tokens per second, MB (10^6 bytes).

    `stages_ms` has `preprocess`, the stages in order and `prefill`. `first_token_ms` runs from the call to the first
    token, everything included but loading. `load_cold_ms` is the load of files that are not in the page cache, None
    where they cannot be put out of it. `share_of_limit` says for stages, `prefill` and `decode` which part of what
    `environment.limits` allows was reached (above 1 where narrower numbers than fp32 are multiplied). `lazy` names the
    stages that run for some answers only and are not in `first_token_ms`. `energy_j` is what `power_sensor` told during
    an answer to a picture and a question, `generated_tokens` long; None where the machine has no sensor. `quality` has
    scores in percent by name, on `quality_data`, where they were asked for.
    """

    bundle: str
    system: str
    config: str
    precision: str
    size_mb: float
    repetitions: int
    prompt_tokens: int
    image_tokens: int
    generated_tokens: int
    load_cold_ms: float | None
    load_ms: float
    stages_ms: dict[str, Spread]
    first_token_ms: Spread
    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    peak_rss_mb: float | None
    share_of_limit: dict[str, float]
    environment: Environment
    lazy: list[str] = field(default_factory=list)
    energy_j: Spread | None = None
    power_sensor: str = ""
    quality: dict[str, float] = field(default_factory=dict)
    quality_data: str = ""


SPREADS = ("first_token_ms", "prefill_tokens_per_s", "decode_tokens_per_s")


def document(results: Sequence[Result]) -> dict[str, Any]:
    """What `mllm-edge bench --json` prints."""
    return {"results": [asdict(result) for result in results]}


def from_document(told: Any, source: str) -> list[Result]:
    """Read what `document` made.

    Raises:
        BadInput: `told` is something else, or of another version.
    """
    try:
        return [_result(result) for result in told["results"]]
    except (KeyError, TypeError, AttributeError):
        raise BadInput(
            f"{source} is not a result of this version's bench; write one with: mllm-edge bench --json"
        ) from None


def _result(told: dict[str, Any]) -> Result:
    limits = told["environment"]["limits"]
    environment = Environment(**{**told["environment"], "limits": limits and Limits(**limits)})
    spreads = {key: Spread(**told[key]) for key in (*SPREADS, *(["energy_j"] if told.get("energy_j") else []))}
    stages = {stage: Spread(**values) for stage, values in told["stages_ms"].items()}
    known = {field.name for field in dataclasses.fields(Result)}
    if unknown := told.keys() - known:
        raise KeyError(*unknown)
    return Result(**{**told, **spreads, "stages_ms": stages, "environment": environment})
