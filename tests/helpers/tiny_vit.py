"""A two-layer vision transformer with everything that real ones have: patch conv, class token, pre-LN, quick GELU."""

import torch
from torch import nn
from torch.nn import functional

from mllm_edge.bundle.manifest import TensorSpec
from mllm_edge.models.plan import StageExport

SIZE, PATCH, WIDTH, HEADS = 32, 8, 64, 4
PATCHES = (SIZE // PATCH) ** 2
PIXELS = TensorSpec("pixel_values", "float32", [1, 3, SIZE, SIZE])
FEATURES = TensorSpec("image_features", "float32", [1, PATCHES, WIDTH])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(self.norm1(x)).view(1, -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        scores = heads[0] @ heads[1].transpose(-1, -2) * (WIDTH // HEADS) ** -0.5
        x = x + self.out((functional.softmax(scores, dim=-1) @ heads[2]).transpose(1, 2).flatten(2))
        hidden = self.fc1(self.norm2(x))
        return x + self.fc2(hidden * torch.sigmoid(1.702 * hidden))


class TinyVit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.position = nn.Parameter(torch.randn(PATCHES + 1, WIDTH) * 0.02)
        self.pre_norm = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.cls, self.patch(pixel_values).flatten(2).transpose(1, 2)], dim=1) + self.position
        x = self.pre_norm(x)
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]


def tiny_vit() -> TinyVit:
    torch.manual_seed(0)
    return TinyVit().eval()


def stage(module: nn.Module, **changes: object) -> StageExport:
    fields = {"name": "vision_encoder", "module": lambda: module, "inputs": [PIXELS], "outputs": [FEATURES]}
    return StageExport(**{**fields, **changes})  # type: ignore[arg-type]
