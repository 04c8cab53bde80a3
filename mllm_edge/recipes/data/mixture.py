"""The mixture of scenes that a recipe trains on: `data.wide` is the share of wide ones."""

from __future__ import annotations

from typing import Any

from mllm_edge.errors import BadInput


def wide_share(data: dict[str, Any]) -> float:
    """The share of wide scenes, 0 unless the recipe gives one. Raises BadInput unless it is in 0..1."""
    share = data.get("wide", 0.0)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise BadInput(f"data.wide is {share!r}; give the share of wide scenes, 0 to 1")
    return float(share)
