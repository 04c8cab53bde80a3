"""Projectors from a vision encoder's features into the decoder's embedding space."""

from __future__ import annotations

import math

from torch import Tensor, nn

from mllm_edge.errors import BadInput


class MergeCells(nn.Module):
    """The mean of each square of `side` x `side` neighbours: [B,N,D] -> [B,N/side**2,D], features by rows."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, embeds: Tensor) -> Tensor:
        batch, number, width = embeds.shape
        cells = math.isqrt(number) // self.side
        squares = embeds.reshape(batch, cells, self.side, cells, self.side, width)  # [B,cells,side,cells,side,D]
        return squares.mean(dim=(2, 4)).reshape(batch, cells * cells, width)


def connector(kind: str, width: int, out_width: int, features: int, merge: int = 1) -> nn.Sequential:
    """The projector between vision encoder and decoder: [B,N,Dv] -> [B,M,D], with M = N / merge**2.

    Merging comes last, on the projected embeddings, so that a background cell does not blur its neighbours' features.

    Args:
        kind: "linear" (v1) or "mlp{N}x_gelu" (v1.5: N=2), as in llava/model/multimodal_projector/builder.py.
        width: Dv, of the features.
        out_width: D, of the decoder.
        features: N.
        merge: side of the square of neighbouring features whose embeddings are averaged into one.

    Raises:
        BadInput: an unknown kind, or a feature grid that is not divisible by `merge`.
    """
    depth = "1" if kind == "linear" else kind.removeprefix("mlp").removesuffix("x_gelu")
    if not depth.isdecimal() or int(depth) < 1:
        raise BadInput(f"connector {kind!r} is not known; use linear or mlp2x_gelu")
    layers: list[nn.Module] = [nn.Linear(width, out_width)]
    for _ in range(int(depth) - 1):
        layers += [nn.GELU(), nn.Linear(out_width, out_width)]
    if merge > 1:
        if math.isqrt(features) % merge:
            raise BadInput(f"{features} features do not fall into squares of {merge} x {merge}")
        layers.append(MergeCells(merge))
    return nn.Sequential(*layers)
