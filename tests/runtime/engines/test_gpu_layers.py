"""How many layers go to a GPU, by its free memory."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_edge.bundle.manifest import EmbeddingTable, GgufDetails
from mllm_edge.runtime.engines.interface import Options
from mllm_edge.runtime.engines.llama import gpu_layers
from mllm_edge.runtime.memory import SCRATCH

ENTRY = GgufDetails(
    file="language_model.gguf",
    bytes=40_000_000 + 10 * 100_000_000,  # ten layers of 100 MB after the table
    sha256="",
    layers=10,
    kv_width=500,
    embedding=EmbeddingTable("F32", 0, [10_000, 1000]),
)
OPTIONS = Options("cuda", True, 1, "f16", 1000)  # a layer's cache: 2 * 500 * 2 bytes * 1000 = 2 MB
FIXED = SCRATCH + gpu_layers.MARGIN


@pytest.mark.parametrize(
    ("room", "layers"),
    [
        (0, 0),
        (101_000_000, 0),
        (102_000_000, 1),
        (5 * 102_000_000, 5),
        (10 * 102_000_000, 10),
        (10 * 102_000_000 + 40_000_000, 11),  # the head, as large as the table
        (10**12, 11),
    ],
)
def test_layers_by_free_memory(room: int, layers: int) -> None:
    assert gpu_layers.layers_that_fit(ENTRY, OPTIONS, FIXED + room) == layers


@given(st.integers(0, 3 * 10**9), st.integers(0, 10**9), st.sampled_from([128, 4096]))
def test_more_memory_never_means_fewer_layers(free: int, more: int, context: int) -> None:
    options = dataclasses.replace(OPTIONS, context=context)
    few = gpu_layers.layers_that_fit(ENTRY, options, free)
    assert 0 <= few <= gpu_layers.layers_that_fit(ENTRY, options, free + more) <= 11


def llama(free: int | None) -> Any:
    """llama.cpp with a CPU and, perhaps, a GPU with so much free memory."""

    class Function:
        def __init__(self, call: Any):
            self.call = call

        def __call__(self, *arguments: Any) -> Any:
            return self.call(*arguments)

    def memory(device: int, found: Any, total: Any) -> None:
        found._obj.value = free

    devices = [0] if free is None else [0, 1]
    return SimpleNamespace(
        _lib=SimpleNamespace(
            ggml_backend_dev_count=Function(lambda: len(devices)),
            ggml_backend_dev_get=Function(lambda index: devices[index]),
            ggml_backend_dev_type=Function(lambda device: device),
            ggml_backend_dev_memory=Function(memory),
        )
    )


def test_what_does_not_fit_is_said() -> None:
    with pytest.warns(RuntimeWarning, match=r"5 of the language model's 11 layers fit .* set --gpu-layers"):
        assert gpu_layers.layers(llama(FIXED + 5 * 102_000_000), ENTRY, OPTIONS) == 5
    assert gpu_layers.layers(llama(2 * 10**9), ENTRY, OPTIONS) == 11
    reserved = dataclasses.replace(OPTIONS, gpu_reserve=2 * 10**9)
    with pytest.warns(RuntimeWarning, match="0 of"):
        assert gpu_layers.layers(llama(2 * 10**9), ENTRY, reserved) == 0


def test_the_user_decides() -> None:
    assert gpu_layers.layers(llama(0), ENTRY, dataclasses.replace(OPTIONS, gpu_layers=3)) == 3


def test_without_a_gpu_that_tells_all_go() -> None:
    assert gpu_layers.layers(llama(None), ENTRY, OPTIONS) == 11


def test_the_installed_llama_cpp_answers() -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'mllm-edge[runtime]'")
    from mllm_edge.runtime.engines.llama.library import library

    free = gpu_layers.free_memory(library())
    assert free is None or free > 0
