"""What joins the frozen parts of a GILL, with its three losses (Koh et al. 2023, sections 3.1 to 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_edge.models.gill.model import TOKENS, Connector, GillDims, PooledEncoder
from mllm_edge.models.text_to_image import TextDims, text_encoder
from mllm_edge.recipes.contrast import info_nce
from mllm_edge.recipes.data.gill_batches import MODES
from mllm_edge.recipes.tasks.gill_language import at_rows, final_states, headless, said_loss

TOLD = 0.5  # weight of the words in retrieval and generation
APART = 0.1  # deviation of the picture tokens' first rows from one another


def mean_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """The mean length of the difference of rows [B,L,D]: a norm, not its square."""
    away: Tensor = torch.linalg.vector_norm(found.float() - wanted.float(), dim=-1).mean()
    return away


class GillModel(nn.Module):
    """All parts but the UNet and the autoencoder, with the losses.

    `rows`, float32 [8,D], are those of the picture tokens, apart from the frozen table that they are the end of. The
    length of each is the mean of the other rows': `rescale` sees to it before each step's losses, `save` at the end.
    """

    def __init__(self, dims: GillDims, text: TextDims):
        super().__init__()
        self.dims = dims
        self.vision_encoder = PooledEncoder(dims.vision).requires_grad_(False)
        self.language_model = headless(dims.language).requires_grad_(False)
        self.text_encoder = text_encoder(text).requires_grad_(False)
        self.connector, self.heads = Connector(dims), dims.heads()
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.rows = nn.Parameter(torch.randn(len(TOKENS), dims.language.width))

    @property
    def others(self) -> Tensor:
        """The frozen rows of the table."""
        table: Tensor = self.language_model.get_input_embeddings().weight
        return table[: self.dims.start]

    def table(self) -> Tensor:
        """All rows, [V,D]."""
        return torch.cat([self.others, self.rows])

    @torch.no_grad()
    def begin_rows(self) -> None:
        """Begin the picture tokens as `<|image|>`, which sums a text up, a little apart from each other."""
        own = self.others[-1]
        self.rows.copy_(own + APART * own.std() * self.rows)
        self.rescale()

    @torch.no_grad()
    def rescale(self) -> None:
        self.rows.copy_(at_length(self.rows, self.others))

    def forward(self, pixel_values: Tensor, text: Tensor, **said: Tensor) -> dict[str, Tensor]:
        """`pixel_values` float32 [B,3,S,S]; `text` int64 [B,L], the captions as the diffusion model reads them; of
        each of `MODES` its ids and labels, int64 [n,T] (`captioning`, `captioning_labels`, ...)."""
        self.rescale()
        with torch.no_grad():
            pooled = self.vision_encoder(pixel_values)
            wanted = self.text_encoder(text).last_hidden_state  # [B,L,D], once for a batch
        visual, images = self.connector(pooled)
        table = self.table()
        states = {name: self.states(table, said[name], visual.flatten(0, 1)) for name in MODES}
        words = {name: said_loss(states[name], said[f"{name}_labels"], table)[0] for name in MODES}
        _, query = self.told(states["retrieval"], said["retrieval"])
        mapped, _ = self.told(states["generation"], said["generation"])
        contrast = info_nce(query, images, self.logit_scale)
        distance = mean_distance(mapped, wanted)
        telling = TOLD * (words["retrieval"] + words["generation"])
        return {
            "loss": words["captioning"] + telling + contrast + distance,
            "caption": words["captioning"],
            "telling": telling,
            "contrast": contrast,
            "distance": distance,
        }

    def states(self, table: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        """Final states [n,T,D] of ids int64 [n,T], with the rows [m,D] of pictures where they have places."""
        return final_states(self.language_model, at_rows(table, ids, rows[: int((ids < 0).sum())]))

    def told(self, states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What heads make of the picture tokens' states, in order: text of the diffusion model [B,L,D], queries
        [B,d]."""
        mapped, query, *_ = self.heads(self.groups(states, ids), self.rows.expand(self._many(ids), -1, -1))
        return mapped, query

    def groups(self, states: Tensor, ids: Tensor) -> Tensor:
        """The states at whole groups of picture tokens, [n,T,D] -> [B,8,D]."""
        return states[ids >= self.dims.start].view(self._many(ids), len(TOKENS), -1)

    def _many(self, ids: Tensor) -> int:
        return int((ids == self.dims.start).sum())


@torch.no_grad()
def at_length(rows: Tensor, others: Tensor) -> Tensor:
    """Rows [n,D], each with the mean length of others [m,D]."""
    return functional.normalize(rows, dim=-1) * torch.linalg.vector_norm(others, dim=-1).mean()
