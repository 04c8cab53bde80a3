"""What stages and decoders cost, against counts by hand and against the reference."""

import torch
from torch import nn
from toy_system import DIMS, decoder

from mllm_edge.bundle.manifest import TensorSpec
from mllm_edge.export.cost import stage_flops, without_weights
from mllm_edge.models.llava.model import CONFIGS
from mllm_edge.models.llava.plan import plan
from mllm_edge.models.resolve import resolve


def test_weight_count_is_that_of_the_reference() -> None:
    norms = (2 * DIMS.layers + 1) * DIMS.width
    assert DIMS.weights + norms == sum(parameter.numel() for parameter in decoder().parameters())
    assert DIMS.weights - DIMS.product_weights == (0 if DIMS.tied else DIMS.vocabulary * DIMS.width)


def test_operations_of_a_convolution_and_a_linear() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.Linear(4, 5))
    spec = TensorSpec("pixels", "float32", [1, 3, 8, 8])
    # 4 places x 8 channels x 48 inputs, then 8 rows x 4 x 5; two operations per multiplication
    assert stage_flops(module, [spec]) == 2 * (4 * 8 * 48 + 8 * 4 * 5)


def test_full_size_costs_what_the_literature_says() -> None:
    checkpoint = without_weights(resolve("llava", "random", "7b"))
    lowered = plan(checkpoint)
    with torch.device("meta"):
        module = lowered.stages[0].module()
    # CLIP-L/14-336: 191 G multiplications with all 24 blocks, of which 23 run here
    assert 0.34e12 < stage_flops(module, lowered.stages[0].inputs) < 0.39e12
    assert abs(CONFIGS["7b"].language.weights / 6.738e9 - 1) < 0.001
