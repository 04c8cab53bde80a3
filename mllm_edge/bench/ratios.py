"""Compares two measurements, for use in CI."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mllm_edge.bench.result import Result, Spread, from_document
from mllm_edge.bundle.read import read_text
from mllm_edge.errors import BadInput


@dataclass(frozen=True)
class Ratio:
    """New over old for one measure; above 1 is always worse: slower, or more memory.

    `low` and `high` bound the ratio over the repetitions (minimum of one over 90th percentile of the other): if 1 lies
    between them, the difference may be chance.
    """

    bundle: str
    measure: str
    old: float
    new: float
    ratio: float
    low: float
    high: float


def compare(old: Path, new: Path) -> list[Ratio]:
    """Ratios of every measure that two files of `mllm-edge bench --json` share, bundle by bundle.

    Bundles are matched by name; two files of one bundle each are compared whatever the names.

    Raises:
        BadInput: a file is not a result of `bench`, or nothing in common.
    """
    before, after = read_results(old), read_results(new)
    if len(before) == len(after) == 1:
        pairs = [(before[0], after[0])]
    else:
        names = {result.bundle: result for result in before}
        pairs = [(names[result.bundle], result) for result in after if result.bundle in names]
    if not pairs:
        raise BadInput(f"{old} and {new} have no bundle in common; measure the same ones")
    return [ratio for pair in pairs for ratio in _ratios(*pair)]


def read_results(path: Path) -> list[Result]:
    """Read the output of `mllm-edge bench --json`.

    Raises:
        BadInput: it cannot be read, or is something else.
    """
    try:
        return from_document(json.loads(read_text(path)), str(path))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(
            f"cannot read {path} ({' '.join(str(error).split())}); write one with: mllm-edge bench --json"
        ) from None


def _ratios(old: Result, new: Result) -> list[Ratio]:
    times = {
        f"{stage}, ms": (old.stages_ms[stage], new.stages_ms[stage])
        for stage in new.stages_ms
        if stage in old.stages_ms
    }
    times["time to first token, ms"] = old.first_token_ms, new.first_token_ms
    rates = {
        "prefill, tokens/s": (old.prefill_tokens_per_s, new.prefill_tokens_per_s),
        "decode, tokens/s": (old.decode_tokens_per_s, new.decode_tokens_per_s),
    }
    singles = {"load again, ms": (old.load_ms, new.load_ms), "size, MB": (old.size_mb, new.size_mb)}
    if old.peak_rss_mb and new.peak_rss_mb:
        singles["peak memory, MB"] = old.peak_rss_mb, new.peak_rss_mb
    found = [_ratio(new.bundle, name, *pair) for name, pair in times.items() if pair[0].median]
    for name, (slow, fast) in rates.items():  # more is better, so inverted
        turned = _ratio(new.bundle, name, fast, slow)
        found.append(Ratio(new.bundle, name, slow.median, fast.median, turned.ratio, turned.low, turned.high))
    for name, (was, now) in singles.items():
        found.append(Ratio(new.bundle, name, was, now, *[round(now / was, 4)] * 3))
    return found


def _ratio(bundle: str, measure: str, old: Spread, new: Spread) -> Ratio:
    low, high = new.min / max(old.p90, 1e-9), new.p90 / max(old.min, 1e-9)
    ratio = new.median / old.median
    return Ratio(bundle, measure, old.median, new.median, *(round(value, 4) for value in (ratio, low, high)))
