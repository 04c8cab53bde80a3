"""T5 with gated feed-forwards (T5 v1.1, Flan-T5), and beside each of them LION's mixture of adapters.

Ours and not transformers' class because it is exported with keys and values as inputs, and because the adapters stand
inside it. Parameter names are those of `transformers.T5ForConditionalGeneration`, adapters have LION's
(`models/lion_adapters.py`); tests show equal outputs with both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_edge.errors import BadInput
from mllm_edge.models.fields import check_fixed, real, whole


@dataclass(frozen=True)
class T5Dims:
    """Shape of a T5. `layers` are those of the encoder and, as many, of the decoder; `head_width` the channels of a
    head; `bottleneck` the width of each adapter (0: there are none), of which there are as many as `adapters`.
    `context` is what a prompt, and an answer, may have of positions: T5's are relative and have no end of their own."""

    vocabulary: int
    width: int
    ffn_width: int
    layers: int
    heads: int
    head_width: int
    context: int = 2048
    activation: str = "gelu_new"
    bottleneck: int = 0
    adapters: int = 2
    buckets: int = 32
    furthest: int = 128
    eps: float = 1e-6

    @property
    def attention_width(self) -> int:
        """Channels of a layer's queries."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Channels of one layer's keys (as many for its values)."""
        return self.attention_width

    @property
    def weights(self) -> int:
        """Number of weights, norms and biases neglected."""
        attention = 4 * self.width * self.attention_width
        feed = 3 * self.width * self.ffn_width + 2 * self.adapters * self.width * self.bottleneck
        layers = self.layers * (3 * attention + 2 * feed)
        return layers + 2 * self.vocabulary * self.width

    @property
    def product_weights(self) -> int:
        """Number of weights that a token of the answer is multiplied with: the decoder's without the keys and values of
        the prompt, and the head."""
        attention = 6 * self.width * self.attention_width
        feed = 3 * self.width * self.ffn_width + 2 * self.adapters * self.width * self.bottleneck
        return self.layers * (attention + feed) + self.vocabulary * self.width

    @property
    def prompt_weights(self) -> int:
        """Number of weights that a token of the prompt is multiplied with: the encoder's, and the decoder's that make
        its keys and values."""
        return self.weights - self.product_weights - self.vocabulary * self.width


def t5_dims(config: Mapping[str, Any], where: Path) -> T5Dims:
    """Dims of a Flan-T5 from its fields in transformers' spelling.

    Args:
        config: the fields; those that are left out have transformers' defaults.
        where: the file of the fields.

    Raises:
        BadInput: a field (named, with its value) that such a T5 cannot have.
    """
    check_fixed(config, {"feed_forward_proj": ("gated-gelu",), "is_encoder_decoder": (None, True)}, where)
    # transformers 5 writes the second and always true for the first, whatever the head is; see T5Config.__post_init__.
    if config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False):
        raise BadInput(f"{where} has a T5 that scales its outputs (v1.0), which is not supported; use a Flan-T5")
    layers = whole(config, "num_layers", where, 6)
    if whole(config, "num_decoder_layers", where, layers) != layers:
        raise BadInput(f"{where} has another number of layers in the decoder; use another checkpoint")
    return T5Dims(
        vocabulary=whole(config, "vocab_size", where, 32128),
        width=whole(config, "d_model", where, 512),
        ffn_width=whole(config, "d_ff", where, 2048),
        layers=layers,
        heads=whole(config, "num_heads", where, 8),
        head_width=whole(config, "d_kv", where, 64),
        buckets=whole(config, "relative_attention_num_buckets", where, 32),
        furthest=whole(config, "relative_attention_max_distance", where, 128),
        eps=real(config, "layer_norm_epsilon", where, 1e-6),
    )


class RmsNorm(nn.Module):
    """x / rms(x) * weight, in fp32 (T5LayerNorm)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight


def buckets(distances: Tensor, both_ways: bool, number: int, furthest: int) -> Tensor:
    """The bucket of each distance (a key's position less the query's), int64 of its shape: near ones have a bucket
    each, far ones share them logarithmically (`T5Attention._relative_position_bucket`)."""
    if both_ways:
        number //= 2
        base, distances = (distances > 0).long() * number, distances.abs()
    else:
        base, distances = torch.zeros_like(distances), -distances.clamp(max=0)
    near = number // 2
    ratio = torch.log(distances.clamp(min=1).float() / near) / math.log(furthest / near)
    far = (near + (ratio * (number - near)).long()).clamp(max=number - 1)
    return base + torch.where(distances < near, distances, far)


KeysValues = tuple[Tensor, Tensor]  # [B,H,S,d] each
Seen = tuple[Tensor, Tensor, Tensor | None]  # with what is added to their scores, [B or 1,H or 1,T,S]


class Attention(nn.Module):
    """T5's attention: no biases, no scaling; the first layer of a stack holds the table of relative positions."""

    def __init__(self, dims: T5Dims, has_table: bool):
        super().__init__()
        self.dims = dims
        self.q = nn.Linear(dims.width, dims.attention_width, bias=False)
        self.k = nn.Linear(dims.width, dims.attention_width, bias=False)
        self.v = nn.Linear(dims.width, dims.attention_width, bias=False)
        self.o = nn.Linear(dims.attention_width, dims.width, bias=False)
        if has_table:
            self.relative_attention_bias = nn.Embedding(dims.buckets, dims.heads)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B,S,D] -> keys and values [B,H,S,d]."""
        return self._split(self.k(x)), self._split(self.v(x))

    def forward(self, x: Tensor, *seen: Seen) -> Tensor:
        """x [B,T,D] and what it looks at, one beside the other -> [B,T,D]."""
        queries = self._split(self.q(x))  # [B,H,T,d]
        scores = torch.cat([_scores(queries, *part) for part in seen], dim=-1)  # [B,H,T,S of all]
        shares = torch.softmax(scores.float(), dim=-1).type_as(scores)
        mixed, first = torch.zeros_like(queries), 0
        for _, values, _ in seen:
            mixed = mixed + shares[..., first : first + values.shape[2]] @ values  # [B,H,T,d]
            first += values.shape[2]
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out

    def positions(self, queries: Tensor, keys: Tensor, both_ways: bool) -> Tensor:
        """What relative positions add to scores, of positions [T] and [S]: [1,H,T,S]."""
        found = buckets(keys[None] - queries[:, None], both_ways, self.dims.buckets, self.dims.furthest)  # [T,S]
        return self.relative_attention_bias(found).permute(2, 0, 1).unsqueeze(0)

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.dims.heads, self.dims.head_width).transpose(1, 2)  # [B,H,T,d]


class Adapter(nn.Module):
    """s * (W_u relu(W_d x + b_d) + b_u): [..,D] -> [..,D]. A fresh one gives zeros."""

    def __init__(self, dims: T5Dims):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.down_proj = nn.Linear(dims.width, dims.bottleneck)
        self.up_proj = nn.Linear(dims.bottleneck, dims.width)
        nn.init.zeros_(self.down_proj.bias)
        nn.init.zeros_(self.up_proj.weight)
        nn.init.zeros_(self.up_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.scale * self.up_proj(functional.relu(self.down_proj(x)))
        return out


class Mixture(nn.Module):
    """The adapters of one place and their router: row t of a ratio gates an adapter's channels in tasks of type t
    (0: regions, 1: whole pictures). A single adapter has no router (LION, section 3.3)."""

    def __init__(self, dims: T5Dims):
        super().__init__()
        self.adapters = nn.ModuleList(Adapter(dims) for _ in range(dims.adapters))
        if dims.adapters == 2:
            first, second = torch.zeros(2, dims.width), torch.zeros(2, dims.width)
            first[0], second[1] = 1, 1
            self.router_ratio1, self.router_ratio2 = nn.Parameter(first), nn.Parameter(second)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        """x [B,T,D] of the residual stream; `task` float [2], 1 at the type of task of all of it -> [B,T,D]."""
        if len(self.adapters) == 1:
            alone: Tensor = self.adapters[0](x)
            return alone
        first, second = task @ self.router_ratio1, task @ self.router_ratio2  # [D] each
        mixed: Tensor = first * self.adapters[0](x) + second * self.adapters[1](x)
        return mixed


class _Feed(nn.Module):
    """wo(act(wi_0 x) * wi_1 x)."""

    def __init__(self, dims: T5Dims):
        super().__init__()
        self.wi_0 = nn.Linear(dims.width, dims.ffn_width, bias=False)
        self.wi_1 = nn.Linear(dims.width, dims.ffn_width, bias=False)
        self.wo = nn.Linear(dims.ffn_width, dims.width, bias=False)
        self.approximate = "tanh" if dims.activation == "gelu_new" else "none"

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.wo(functional.gelu(self.wi_0(x), approximate=self.approximate) * self.wi_1(x))
        return out


class SelfLayer(nn.Module):
    def __init__(self, dims: T5Dims, first: bool):
        super().__init__()
        self.SelfAttention = Attention(dims, first)
        self.layer_norm = RmsNorm(dims.width, dims.eps)


class CrossLayer(nn.Module):
    def __init__(self, dims: T5Dims):
        super().__init__()
        self.EncDecAttention = Attention(dims, False)
        self.layer_norm = RmsNorm(dims.width, dims.eps)


class FeedLayer(nn.Module):
    """x + feed(norm(x)) + adapters(x): the adapters read the stream before its norm."""

    def __init__(self, dims: T5Dims):
        super().__init__()
        self.DenseReluDense = _Feed(dims)
        self.layer_norm = RmsNorm(dims.width, dims.eps)
        self.adapter = Mixture(dims) if dims.bottleneck else None

    def forward(self, x: Tensor, task: Tensor | None) -> Tensor:
        out: Tensor = x + self.DenseReluDense(self.layer_norm(x))
        if self.adapter is None:
            return out
        assert task is not None
        return out + self.adapter(x, task)


class _Block(nn.Module):
    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layer = nn.ModuleList(layers)


class T5Encoder(nn.Module):
    """[B,S,D] -> [B,S,D], every position looking at every other."""

    def __init__(self, dims: T5Dims):
        super().__init__()
        self.block = nn.ModuleList(
            _Block([SelfLayer(dims, number == 0), FeedLayer(dims)]) for number in range(dims.layers)
        )
        self.final_layer_norm = RmsNorm(dims.width, dims.eps)

    def forward(self, x: Tensor, task: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """`mask` [B,S], 1 for positions that count."""
        blocks: Any = self.block
        order = torch.arange(x.shape[1], device=x.device)
        bias = blocks[0].layer[0].SelfAttention.positions(order, order, both_ways=True)
        if mask is not None:
            bias = bias + _hidden(mask)[:, None, None]  # [B,H,S,S]
        for block in blocks:
            looks, feeds = block.layer
            normed = looks.layer_norm(x)
            x = x + looks.SelfAttention(normed, (*looks.SelfAttention.keys_values(normed), bias))
            x = feeds(x, task)
        out: Tensor = self.final_layer_norm(x)
        return out


class T5Decoder(nn.Module):
    """Tokens of the answer [B,T,D] after those whose keys and values are given -> [B,T,D]."""

    def __init__(self, dims: T5Dims):
        super().__init__()
        self.block = nn.ModuleList(
            _Block([SelfLayer(dims, number == 0), CrossLayer(dims), FeedLayer(dims)]) for number in range(dims.layers)
        )
        self.final_layer_norm = RmsNorm(dims.width, dims.eps)

    def cross(self, encoded: Tensor) -> list[KeysValues]:
        """Keys and values of the prompt, per layer."""
        blocks: Any = self.block
        return [block.layer[1].EncDecAttention.keys_values(encoded) for block in blocks]

    def forward(
        self,
        x: Tensor,
        cross: Sequence[KeysValues],
        past: Sequence[KeysValues] = (),
        length: Tensor | None = None,
        task: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, list[KeysValues]]:
        """The states, and for each layer the keys and values of these tokens.

        `past` [B,H,C,d] holds those of tokens before, as many as `length` [1] says (by default all); `mask` [B,S] is
        the prompt's.
        """
        blocks: Any = self.block
        positions = blocks[0].layer[0].SelfAttention.positions
        before = torch.arange(past[0][0].shape[2] if past else 0, device=x.device)  # [C]
        if length is None:
            length = before.new_full((1,), len(before))
        here = length + torch.arange(x.shape[1], device=x.device)  # [T]
        own = positions(here, here, both_ways=False) + _hidden((here[None] <= here[:, None]).to(x.dtype))  # [1,H,T,T]
        if past:
            earlier = positions(here, before, both_ways=False) + _hidden((before < length).to(x.dtype))  # [1,H,T,C]
        seen = None if mask is None else _hidden(mask)[:, None, None]  # [B,1,1,S]
        new: list[KeysValues] = []
        for number, block in enumerate(blocks):
            looks, reads, feeds = block.layer
            normed = looks.layer_norm(x)
            keys, values = looks.SelfAttention.keys_values(normed)
            new.append((keys, values))
            parts = [(*past[number], earlier)] if past else []
            x = x + looks.SelfAttention(normed, *parts, (keys, values, own))
            x = x + reads.EncDecAttention(reads.layer_norm(x), (*cross[number], seen))
            x = feeds(x, task)
        return self.final_layer_norm(x), new


class T5(nn.Module):
    """Both stacks, the table and the head."""

    def __init__(self, dims: T5Dims):
        super().__init__()
        self.dims = dims
        self.shared = nn.Embedding(dims.vocabulary, dims.width)
        self.encoder = T5Encoder(dims)
        self.decoder = T5Decoder(dims)
        self.lm_head = nn.Linear(dims.width, dims.vocabulary, bias=False)

    def logits(self, states: Tensor) -> Tensor:
        """Of the decoder's states [B,T,D]: [B,T,V]."""
        out: Tensor = self.lm_head(states)
        return out


def _scores(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    scores = queries @ keys.transpose(-2, -1)  # [B,H,T,S]
    return scores if bias is None else scores + bias


def _hidden(mask: Tensor) -> Tensor:
    """What is added to scores so that only what `mask` has 1 for is seen."""
    return (1.0 - mask) * -1e9
