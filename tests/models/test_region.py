"""RoIAlign by hand-computed numbers (those of torchvision's `roi_align(aligned=True, sampling_ratio=2)`)."""

import pytest
import torch

from mllm_edge.models.blocks.region import RegionDims, RegionEncoder, roi_align

RAMP = torch.arange(8.0).repeat(8, 1)[None, None]  # [1,1,8,8], the value is the column


def align(box: list[float], features: torch.Tensor = RAMP, bins: int = 2) -> torch.Tensor:
    return roi_align(features, torch.tensor([box]), bins)[0, 0]


def test_on_a_ramp_each_bin_is_the_column_of_its_middle() -> None:
    # Aligned: cell centers lie at whole numbers, so x in 2..6 is 1.5..5.5; bins of 2, their middles 2.5 and 4.5.
    torch.testing.assert_close(align([2, 2, 6, 6]), torch.tensor([[2.5, 4.5], [2.5, 4.5]]))


def test_rows_and_columns_are_not_confused() -> None:
    columns = RAMP.transpose(2, 3).contiguous()
    torch.testing.assert_close(align([2, 1, 6, 3], columns), torch.tensor([[1.0, 1.0], [2.0, 2.0]]))


def test_a_box_smaller_than_a_cell_is_not_enlarged() -> None:
    # Without `aligned` it would become a cell wide. x 3..3.5 is 2.5..3: samples at 2.5625, 2.6875 | 2.8125, 2.9375.
    torch.testing.assert_close(align([3, 3, 3.5, 3.5])[0], torch.tensor([2.625, 2.875]))


def test_samples_beyond_the_map() -> None:
    ones = torch.ones(1, 1, 4, 4)
    # x -4..4 is -4.5..3.5, four samples: -3.5 and -1.5 lie more than a cell outside and count 0, 0.5 and 2.5 inside.
    torch.testing.assert_close(align([-4, 0, 4, 4], ones), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    # Up to a cell outside the border's value counts: x -0.5..3.5 is -1..3, its first sample at -0.5.
    torch.testing.assert_close(align([-0.5, 0, 3.5, 4], RAMP[..., :4, :4])[0, 0], torch.tensor((0 + 0.5) / 2))


def test_against_torchvision() -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is no dependency; the cases above are by hand")
    features = torch.randn(1, 3, 9, 9)
    boxes = torch.rand(5, 4) * 4
    boxes[:, 2:] += boxes[:, :2]
    rois = torch.cat([torch.zeros(5, 1), boxes], dim=1)
    theirs = torchvision.ops.roi_align(features, rois, 7, 1.0, 2, aligned=True)
    torch.testing.assert_close(roi_align(features, boxes, 7), theirs)


DIMS = RegionDims(8, 12, 4, groups=2, rounds=2, bins=3)


def test_the_papers_scale_reads_only_two_thirds_of_a_24_cell_map() -> None:
    """Boxes times 224, divided by 14 on the deepest level: 16 of 24 cells (the trained behaviour, kept)."""
    torch.manual_seed(0)
    encoder = RegionEncoder(6, 10, DIMS)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    maps = [torch.rand(1, 8, 24 << shift, 24 << shift) for shift in (3, 2, 1, 0)]
    beyond = [level.clone() for level in maps]
    for level in beyond:
        level[..., round(level.shape[-1] * 17 / 24) :] += 1
    with torch.no_grad():
        same = encoder.roi_align(maps, whole), encoder.roi_align(beyond, whole)
    torch.testing.assert_close(*same)


def test_fused_levels_of_a_constant_input_are_constant_but_for_coordinates_and_borders() -> None:
    torch.manual_seed(0)
    encoder = RegionEncoder(6, 10, DIMS)
    for conv in encoder.mlvl_fuse.input_conv:
        torch.nn.init.zeros_(conv.weight[:, 6:])  # the coordinate channels
    levels = [torch.ones(1, 6, 4 << shift, 4 << shift) for shift in (3, 2, 1, 0)]
    with torch.no_grad():
        fused = encoder.mlvl_fuse(levels)
    inner = fused[0][..., 8:-8, 8:-8]
    assert inner.std(dim=(2, 3)).max() < 1e-5


def test_boxes_of_several_pictures_at_once() -> None:
    torch.manual_seed(0)
    encoder = RegionEncoder(6, 10, DIMS).eval()
    features = torch.randn(2, 4, 16, 6)
    boxes = torch.tensor([[0.1, 0.1, 0.9, 0.8], [0.3, 0.2, 0.5, 0.6], [0.0, 0.0, 1.0, 1.0]])
    with torch.no_grad():
        together = encoder(features, boxes, torch.tensor([0, 1, 0]))
        apart = [encoder(features[i : i + 1], boxes[n : n + 1]) for n, i in enumerate([0, 1, 0])]
    torch.testing.assert_close(together, torch.cat(apart))
