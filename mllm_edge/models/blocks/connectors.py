"""Connectors from a vision encoder's features into the decoder's embedding space."""

from __future__ import annotations

import math

from torch import Tensor, nn

from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.qformer import QFormer, QFormerDims
from mllm_edge.models.blocks.resamplers import CAbstractor, Perceiver


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


RESAMPLERS = ("qformer", "perceiver", "cabstractor")  # kinds whose number of rows is chosen
HEAD = 64  # channels of a head of theirs


def image_tokens(kind: str, features: int, merge: int, tokens: int) -> int:
    """Rows that a picture becomes: see `connector`."""
    return tokens if kind in RESAMPLERS else features // merge**2


def connector(kind: str, width: int, out_width: int, features: int, merge: int = 1, tokens: int = 0) -> nn.Sequential:
    """The connector between vision encoder and decoder: [B,N,Dv] -> [B,M,D], with M = N / merge**2, or `tokens`.

    Merging comes last, on the projected embeddings, so that a background cell does not blur its neighbours' features.

    Args:
        kind: "linear" (v1) or "mlp{N}x_gelu" (v1.5: N=2), as in llava/model/multimodal_projector/builder.py; or one of
            `RESAMPLERS`: BLIP-2's Q-Former without words, Flamingo's Perceiver resampler, HoneyBee's C-Abstractor.
        width: Dv, of the features.
        out_width: D, of the decoder.
        features: N.
        merge: side of the square of neighbouring features whose embeddings are averaged into one.
        tokens: M of a resampler.

    Raises:
        BadInput: an unknown kind, a feature grid that is not divisible by `merge`, or tokens that cannot be.
    """
    if kind in RESAMPLERS:
        return _resampler(kind, width, out_width, features, tokens)
    if tokens:
        others = ", ".join(RESAMPLERS)
        raise BadInput(f"connector {kind} gives a row for each feature; leave out tokens, or use {others}")
    depth = "1" if kind == "linear" else kind.removeprefix("mlp").removesuffix("x_gelu")
    if not depth.isdecimal() or int(depth) < 1:
        raise BadInput(f"connector {kind!r} is not known; use linear, mlp2x_gelu, {', '.join(RESAMPLERS)}")
    layers: list[nn.Module] = [nn.Linear(width, out_width)]
    for _ in range(int(depth) - 1):
        layers += [nn.GELU(), nn.Linear(out_width, out_width)]
    if merge > 1:
        if math.isqrt(features) % merge:
            raise BadInput(f"{features} features do not fall into squares of {merge} x {merge}")
        layers.append(MergeCells(merge))
    return nn.Sequential(*layers)


def _resampler(kind: str, width: int, out_width: int, features: int, tokens: int) -> nn.Sequential:
    if not 1 <= tokens <= features:
        raise BadInput(f"connector {kind} needs tokens, 1 to {features} (the encoder's features); got {tokens}")
    heads = max(1, width // HEAD)
    if width % heads:
        raise BadInput(f"connector {kind} needs features whose channels are a multiple of {HEAD}; got {width}")
    if kind == "cabstractor":
        if math.isqrt(tokens) ** 2 != tokens or math.isqrt(features) ** 2 != features:
            raise BadInput(
                f"connector {kind} gives squares of tokens of squares, as 16 of 64; got {tokens} of {features}"
            )
        abstractor = CAbstractor(features, width, tokens)
        return nn.Sequential(abstractor, nn.Linear(width, out_width), nn.SiLU(), nn.Linear(out_width, out_width))
    if kind == "perceiver":
        return nn.Sequential(Perceiver(width, tokens, heads=heads), nn.Linear(width, out_width))
    dims = QFormerDims(width, 2, heads, 4 * width, queries=tokens, read_width=width)
    return nn.Sequential(nn.LayerNorm(width), QFormer(dims), nn.Linear(width, out_width))
