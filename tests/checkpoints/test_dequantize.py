"""Weights that are codes, by numbers computed by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mllm_edge.checkpoints.dequantize import open_weights
from mllm_edge.errors import BadInput

FP8 = torch.float8_e4m3fn
NF4 = [-1.0, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0]


def opened(folder: Path, settings: dict[str, Any], **tensors: torch.Tensor) -> Any:
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({**named, "norm.weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="are read as the numbers they stand for"):
        return open_weights(folder, {"quantization_config": settings})


def scheme(form: str, bits: int = 8, inputs: bool = True, **more: Any) -> dict[str, Any]:
    group = {"weights": {"num_bits": bits, "symmetric": True, **more}, "input_activations": {"dynamic": inputs}}
    settings = {"format": form, "config_groups": {"group_0": group}, "sparsity_config": {"format": "dense"}}
    return {"quant_method": "compressed-tensors", **settings}


def two_schemes(*bits: int) -> dict[str, Any]:
    return {str(one): {"weights": {"num_bits": one}} for one in bits}


def check(weights: Any, name: str, expected: list[list[float]]) -> None:
    torch.testing.assert_close(weights[name], torch.tensor(expected), rtol=0, atol=0)
    assert weights[name].dtype == torch.float32 and weights.shape(name) == tuple(weights[name].shape)
    assert sorted(weights) == sorted([name, "norm.weight"]) and weights["norm.weight"].tolist() == [1, 1]


CODES = torch.tensor([[1.0, -2.0, 0.5], [4.0, 448.0, -1.5]]).to(FP8)


def test_fp8_by_blocks(tmp_path: Path) -> None:
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [1, 2]}
    scales = torch.tensor([[2.0, 3.0], [0.5, 10.0]])
    weights = opened(tmp_path, settings, a__weight=CODES, a__weight_scale_inv=scales)
    check(weights, "a.weight", [[2.0, -4.0, 1.5], [2.0, 224.0, -15.0]])


@pytest.mark.parametrize("form", ["tensor", "rows", "flat rows"])
def test_fp8_by_tensor_and_by_rows(tmp_path: Path, form: str) -> None:
    scales = {"tensor": torch.tensor(2.0), "rows": torch.tensor([[2.0], [4.0]]), "flat rows": torch.tensor([2.0, 4.0])}
    tensors = {"a__weight": CODES, "a__weight_scale": scales[form]}
    last = 2.0 if form == "tensor" else 4.0
    for settings in (scheme("float-quantized"), {"quant_method": "fbgemm_fp8"}):
        weights = opened(tmp_path, settings, **tensors)
        check(weights, "a.weight", [[2.0, -4.0, 1.0], [4 * last, 448 * last, -1.5 * last]])


def test_fp8_of_the_whole_tensor_and_in_usual_blocks(tmp_path: Path) -> None:
    weights = opened(tmp_path, {"quant_method": "fp8"}, a__weight=CODES, a__weight_scale=torch.tensor([2.0]))
    check(weights, "a.weight", [[2.0, -4.0, 1.0], [8.0, 896.0, -3.0]])
    codes = torch.ones(1, 130).to(FP8)  # 128 x 128 where the config does not say it
    weights = opened(tmp_path, {"quant_method": "fp8"}, a__weight=codes, a__weight_scale_inv=torch.tensor([[2.0, 3.0]]))
    check(weights, "a.weight", [[2.0] * 128 + [3.0] * 2])


def test_blocks_larger_than_the_matrix_take_no_memory(tmp_path: Path) -> None:
    settings = {"quant_method": "fp8", "weight_block_size": [(1 << 20) - 1, 2]}
    scales = torch.tensor([[2.0, 3.0]])
    weights = opened(tmp_path, settings, a__weight=CODES, a__weight_scale_inv=scales)
    check(weights, "a.weight", [[2.0, -4.0, 1.5], [8.0, 896.0, -4.5]])


def test_int8_with_zero_points_in_groups(tmp_path: Path) -> None:
    codes = torch.tensor([[10, -20, 3, 4], [0, 127, -128, 1]], dtype=torch.int8)
    scales, zeros = torch.tensor([[0.5, 2.0], [1.0, 0.25]]), torch.tensor([[1, 0], [0, -4]], dtype=torch.int8)
    tensors = {"a__weight": codes, "a__weight_scale": scales, "a__weight_zero_point": zeros}
    weights = opened(tmp_path, scheme("int-quantized"), **tensors)
    check(weights, "a.weight", [[4.5, -10.5, 6.0, 8.0], [0.0, 127.0, -31.0, 1.25]])


def test_four_bits_packed_in_words(tmp_path: Path) -> None:
    # Codes -8..7 are stored as 0..15, the first in the lowest bits; 10 columns take two words a row.
    rows = [[-8, -7, 0, 7, 1, 2, 3, 4, 5, -1], [0, 1, 2, 3, 4, 5, 6, 7, -8, -7]]
    words = [
        [sum((code + 8) << 4 * at for at, code in enumerate(row[start : start + 8])) for start in (0, 8)]
        for row in rows
    ]
    packed = torch.tensor(words).to(torch.int32)
    tensors = {"a__weight_packed": packed, "a__weight_shape": torch.tensor([2, 10])}
    scales = torch.tensor([[2.0, 1.0], [0.5, 4.0]])  # groups of five
    weights = opened(tmp_path, scheme("pack-quantized", 4), **tensors, a__weight_scale=scales)
    expected = [[code * float(scales[row, at // 5]) for at, code in enumerate(rows[row])] for row in (0, 1)]
    check(weights, "a.weight", expected)


def words(codes: list[int], bits: int) -> torch.Tensor:
    """Codes (half the range added here) in one int32 word, the first in the lowest bits."""
    word = sum((code + (1 << bits - 1)) << bits * at for at, code in enumerate(codes))
    return torch.tensor(word - (1 << 32 if word >> 31 else 0)).to(torch.int32)


@pytest.mark.parametrize("groups", [1, 2])
def test_packed_codes_with_zero_points(tmp_path: Path, groups: int) -> None:
    codes, scales = [[100, -28, 0, 3], [-128, 127, 7, -1]], [[2.0, 4.0][:groups], [0.5, 1.0][:groups]]
    zeros = [[-28, 3][:groups], [7, 0][:groups]]
    tensors = {
        "a__weight_packed": torch.stack([words(row, 8) for row in codes]).unsqueeze(1),
        "a__weight_scale": torch.tensor(scales),
        "a__weight_shape": torch.tensor([2, 4]),
        "a__weight_zero_point": torch.stack([words([*one, 0, 0], 8) for one in zip(*zeros)]).unsqueeze(0),
    }
    weights = opened(tmp_path, scheme("pack-quantized", 8, symmetric=False), **tensors)
    group = [0, 0, groups - 1, groups - 1]
    expected = [
        [(code - zeros[row][group[at]]) * scales[row][group[at]] for at, code in enumerate(codes[row])]
        for row in (0, 1)
    ]
    check(weights, "a.weight", expected)


def test_packed_codes_with_one_zero_point(tmp_path: Path) -> None:
    tensors = {
        "a__weight_packed": words([1, 2, 3, 4, 5, 6, 7, -8], 4).reshape(1, 1),
        "a__weight_scale": torch.tensor([2.0]),
        "a__weight_shape": torch.tensor([1, 8]),
        "a__weight_zero_point": torch.tensor([3], dtype=torch.int8),
    }
    weights = opened(tmp_path, scheme("pack-quantized", 4, symmetric=False), **tensors)
    check(weights, "a.weight", [[-4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0, -22.0]])


@pytest.mark.parametrize(("order", "of"), [([1, 0, 1, 0], [1, 0, 1, 0]), ([-1] * 4, [0, 0, 1, 1])])
def test_groups_in_the_order_of_activations(tmp_path: Path, order: list[int], of: list[int]) -> None:
    codes, scales = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=torch.int8), torch.tensor([[1.0, 10.0]] * 2)
    tensors = {"a__weight": codes, "a__weight_scale": scales, "a__weight_g_idx": torch.tensor(order)}
    weights = opened(tmp_path, scheme("int-quantized", actorder="group"), **tensors)
    check(weights, "a.weight", [[int(code) * (1.0, 10.0)[group] for code, group in zip(row, of)] for row in codes])


def test_llm_int8(tmp_path: Path) -> None:
    codes = torch.tensor([[127, -127], [0, 127]], dtype=torch.int8)
    tensors = {"a__weight": codes, "a__SCB": torch.tensor([254.0, 12.7]), "a__weight_format": torch.tensor(0)}
    weights = opened(tmp_path, {"quant_method": "bitsandbytes", "load_in_8bit": True}, **tensors)
    expected = codes.float() * (torch.tensor([[254.0], [12.7]]) / 127)
    check(weights, "a.weight", expected.tolist())


def four_bits(nested: bool, **told: Any) -> dict[str, torch.Tensor]:
    """Ten weights of [2, 5] in blocks of four: codes 0..9, two a byte, the first in the high half."""
    state = {"quant_type": "nf4", "blocksize": 4, "dtype": "float16", "shape": [2, 5], **told}
    scales: dict[str, torch.Tensor] = {"a.weight.absmax": torch.tensor([2.0, 10.0, 100.0])}
    if nested:
        state |= {"nested_blocksize": 2, "nested_dtype": "float32", "nested_offset": 0.5, **told}
        table = torch.arange(256) / 2
        scales = {
            "a.weight.absmax": torch.tensor([3, 19, 4], dtype=torch.uint8),
            "a.weight.nested_absmax": torch.tensor([1.0, 10.0]),
            "a.weight.nested_quant_map": table,
        }
    codes = [(first << 4) + first + 1 for first in range(0, 10, 2)]
    return {
        "a.weight": torch.tensor(codes, dtype=torch.uint8).unsqueeze(1),
        "a.weight.quant_map": torch.tensor(NF4),
        "a.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        **scales,
    }


def test_four_bits_stored_as_larger_numbers(tmp_path: Path) -> None:
    tensors = four_bits(False, shape=[2, 4])
    tensors["a.weight"] = tensors["a.weight"][:4].flatten().view(torch.bfloat16)
    tensors["a.weight.absmax"] = tensors["a.weight.absmax"][:2]
    save_file({**tensors, "norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="codes of bitsandbytes"):
        weights = open_weights(tmp_path, {"quantization_config": {"quant_method": "bitsandbytes"}})
    expected = torch.tensor(NF4)[:8] * torch.tensor([2.0] * 4 + [10.0] * 4)
    check(weights, "a.weight", expected.reshape(2, 4).tolist())


@pytest.mark.parametrize("nested", [False, True])
def test_nf4(tmp_path: Path, nested: bool) -> None:
    save_file({**four_bits(nested), "norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="codes of bitsandbytes"):
        weights = open_weights(tmp_path, {"quantization_config": {"quant_method": "bitsandbytes"}})
    # nested: half of 3, 19 and 4, times 1, 1 and 10, plus 0.5
    scales = torch.tensor([2.0, 10.0, 20.5] if nested else [2.0, 10.0, 100.0])
    expected = torch.tensor(NF4)[:10] * scales.repeat_interleave(4)[:10]
    check(weights, "a.weight", expected.reshape(2, 5).tolist())


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "fp8"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "compressed-tensors nvfp4"),
        (scheme("pack-quantized", 3), "pack-quantized with 3 bits"),
        ({**scheme("int-quantized"), "config_groups": {"a": {}, "b": {}}}, "names no weights"),
        ({**scheme("int-quantized"), "config_groups": two_schemes(4, 8)}, "several sizes of codes"),
        ({**scheme("int-quantized"), "kv_cache_scheme": {"num_bits": 8}}, "with a kv_cache_scheme"),
        ({**scheme("int-quantized"), "sparsity_config": {"format": "sparse-24-bitmask"}}, "with a sparsity_config"),
        ({**scheme("float-quantized", inputs=False)}, "with statically quantized activations"),
        ({**scheme("pack-quantized"), "config_groups": {}}, "with None bits"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path: Path, settings: dict[str, Any], form: str) -> None:
    save_file({"a.weight": CODES}, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=form):
        open_weights(tmp_path, {"text_config": {"quantization_config": settings}})


@pytest.mark.parametrize(
    ("settings", "tensors"),
    [
        ({"quant_method": "fbgemm_fp8"}, {"a.weight": CODES, "a.weight_scale": torch.ones(3)}),
        (
            {"quant_method": "fp8", "weight_block_size": [1, 1]},
            {"a.weight": CODES, "a.weight_scale_inv": torch.ones(9, 9)},
        ),
        ({"quant_method": "bitsandbytes"}, {"a.weight": CODES.to(torch.int8), "a.SCB": torch.ones(5)}),
        ({"quant_method": "bitsandbytes"}, four_bits(False, shape=[1 << 40, 1 << 40])),
        ({"quant_method": "bitsandbytes"}, four_bits(False, shape=[2, 50])),
        ({"quant_method": "bitsandbytes"}, four_bits(False, blocksize=0)),
        ({"quant_method": "bitsandbytes"}, four_bits(False, blocksize=float("inf"))),
        ({"quant_method": "bitsandbytes"}, four_bits(True, nested_blocksize=1 << 40)),
        (
            scheme("pack-quantized", 4),
            {
                "a.weight_packed": torch.ones(2, 1, dtype=torch.int32),
                "a.weight_shape": torch.tensor([2, 8]),
                "a.weight_scale": torch.ones(2, 1),
                "a.weight_zero_point": torch.ones(2, 1, dtype=torch.int32),
            },
        ),
        (
            scheme("pack-quantized", 4),
            {
                "a.weight": torch.ones(2, 8),
                "a.weight_packed": torch.ones(2, 1, dtype=torch.int32),
                "a.weight_shape": torch.tensor([2, 8]),
                "a.weight_scale": torch.ones(2, 1),
            },
        ),
        (
            scheme("pack-quantized", 4),
            {
                "a.weight_packed": torch.ones(2, 2, dtype=torch.int32),
                "a.weight_shape": torch.tensor([2, 99]),
                "a.weight_scale": torch.ones(2, 1),
            },
        ),
        (scheme("pack-quantized", 4), {"a.weight_packed": torch.ones(2, 2, dtype=torch.int32)}),
        ({"quant_method": "fbgemm_fp8"}, {"a.weight": torch.ones(2, 2)}),
    ],
)
def test_parts_that_do_not_fit_are_named(tmp_path: Path, settings: dict[str, Any], tensors: dict[str, Any]) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=r"copy (the checkpoint|it) again"):
        open_weights(tmp_path, {"quantization_config": settings})


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({"quant_method": "fp8"}, {"a.weight": torch.ones(2, 3), "a.weight_scale": torch.ones(1)}, "float32, no codes"),
        (scheme("int-quantized"), {"a.weight": CODES, "a.weight_scale": torch.ones(2, 1).int()}, "not scales"),
        (
            scheme("int-quantized"),
            {"a.weight": CODES, "a.weight_scale": torch.ones(2, 3), "a.weight_g_idx": torch.tensor([0, 1, 3])},
            "groups that are not there",
        ),
        (
            {"quant_method": "bitsandbytes"},
            {"a.weight": CODES, "a.SCB": torch.ones(2), "a.weight_format": torch.tensor(2)},
            "in the order of a GPU",
        ),
        ({"quant_method": "bitsandbytes"}, {**four_bits(True), "a.weight.absmax": torch.ones(3)}, "no codes of 1 byte"),
    ],
)
def test_numbers_of_a_wrong_kind_are_named_when_they_are_read(
    tmp_path: Path, settings: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="numbers they stand for"):
        weights = open_weights(tmp_path, {"quantization_config": settings})
    with pytest.raises(BadInput, match=message):
        weights["a.weight"]
