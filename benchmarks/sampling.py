"""What choosing a token costs, beside a decoding step: `python benchmarks/sampling.py`."""

from __future__ import annotations

import argparse
import timeit

import numpy as np

from mllm_edge.bundle.manifest import Generation
from mllm_edge.machine.facts import cpu_name
from mllm_edge.runtime.decoding.loop import settings_for
from mllm_edge.runtime.decoding.sampling import Sampler

WAYS = {
    "greedy": {"temperature": 0.0},
    "top-k 40": {"temperature": 0.7, "top_k": 40},
    "all": {"temperature": 0.7, "top_k": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    given = parser.parse_args()
    logits = np.random.default_rng(0).standard_normal(given.vocabulary).astype(np.float32)
    print(f"{cpu_name()}, {given.vocabulary} logits, milliseconds a token, best of 5 x 200")
    for name, options in WAYS.items():
        sampler = Sampler(settings_for(Generation(), **options), 0)
        best = min(timeit.repeat(lambda: sampler.sample(logits), number=200, repeat=5)) / 200  # noqa: B023
        print(f"{name:9} {1000 * best:.4f}")


if __name__ == "__main__":
    main()
