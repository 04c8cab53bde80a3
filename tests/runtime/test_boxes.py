import numpy as np
import pytest

from mllm_edge.errors import BadInput
from mllm_edge.runtime.boxes import check_boxes, normalized

SIZE = (40, 20)


def test_boxes_are_of_the_whole_picture() -> None:
    np.testing.assert_array_equal(normalized([(10, 5, 40, 20)], SIZE), np.array([[0.25, 0.25, 1, 1]], np.float32))


def test_a_box_that_reaches_out_is_cut_with_a_warning() -> None:
    with pytest.warns(RuntimeWarning, match="box -5,2,50,10 reaches beyond the picture and is cut to 0,2,40,10"):
        assert check_boxes([(-5, 2, 50, 10)], SIZE) == [(0, 2, 40, 10)]


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((5, 5, 5, 9), "has no area"),
        ((9, 5, 5, 9), "has no area"),
        ((40, 0, 50, 9), "lies outside the picture of 40 x 20"),
        ((-9, -9, -1, -1), "lies outside"),
        ((1, 2, 3), "is not x1,y1,x2,y2"),
        ((0, 0, float("nan"), 3), "is not x1,y1,x2,y2"),
        ((0, 0, float("inf"), 3), "is not x1,y1,x2,y2"),
    ],
)
def test_unusable_boxes(box: tuple[float, ...], reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        check_boxes([box], SIZE)
