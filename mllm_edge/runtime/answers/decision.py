"""Whether a picture of an answer is looked for or drawn, where a bundle can do both."""

from __future__ import annotations

import numpy as np

from mllm_edge.runtime.turn import Need

RETRIEVE, GENERATE = "retrieve", "generate"


def chances(need: Need, decision: str) -> dict[str, float]:
    """How likely each of the two is by the logits [1,2] of the tensor `decision`; nothing where it is ""."""
    if not decision:
        return {}
    logits = np.asarray(need(decision), np.float64)[0, :2]
    shares = np.exp(logits - logits.max())
    retrieve, generate = shares / shares.sum()
    return {RETRIEVE: float(retrieve), GENERATE: float(generate)}


def is_retrieved(decided: dict[str, float]) -> bool:
    """Whether a picture is looked for where there is an index; of equals, it is."""
    return bool(decided) and decided[RETRIEVE] >= decided[GENERATE]
