"""The projector file in llama.cpp's own multimodal code (mtmd): same embeddings as PyTorch."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_for_tests import causal
from PIL import Image
from tokenizers_to_test import llama_sentencepiece

from mllm_edge.errors import BadInput
from mllm_edge.export.gguf.writer import export_language_model
from mllm_edge.models.blocks.vit import VitDims
from mllm_edge.models.language.llama import LlamaDims
from mllm_edge.models.llava.mmproj import write_mmproj
from mllm_edge.models.llava.model import Llava, LlavaDims
from mllm_edge.models.llava.plan import preprocessing
from mllm_edge.runtime.engines.llama.library import library
from mllm_edge.runtime.preprocess import preprocess

mtmd = pytest.importorskip("llama_cpp.mtmd_cpp", reason="this llama-cpp-python has no multimodal part")


def system(connector: str, activation: str) -> Llava:
    torch.manual_seed(0)
    dims = LlavaDims(
        VitDims(image_size=56, patch_size=14, width=64, layers=3, heads=2, mlp_width=128, activation=activation),
        LlamaDims(vocabulary=422, width=96, ffn_width=96, layers=1, heads=2, kv_heads=2, context=64),
        connector=connector,
    )
    model = Llava(dims).eval()
    for name, parameter in model.named_parameters():
        std = 0.12 if parameter.ndim > 1 else 0.3
        torch.nn.init.normal_(parameter, std=std, mean=float("norm" in name and name.endswith("weight")))
    return model


def encode_in_llama_cpp(folder: Path, picture: np.ndarray, width: int) -> np.ndarray:
    """Embeddings float32 [N,D] of an uint8 picture by llama.cpp's multimodal code."""
    llama = library()
    model = llama.llama_model_load_from_file(str(folder / "model.gguf").encode(), llama.llama_model_default_params())
    settings = mtmd.mtmd_context_params_default()
    settings.use_gpu, settings.print_timings, settings.warmup, settings.n_threads = False, False, False, 1
    context = mtmd.mtmd_init_from_file(str(folder / "mmproj.gguf").encode(), model, settings)
    assert context, "llama.cpp refused the projector file"
    side = picture.shape[0]
    bitmap = mtmd.mtmd_bitmap_init(side, side, (ctypes.c_uint8 * picture.size)(*picture.ravel().tolist()))
    chunks = mtmd.mtmd_input_chunks_init()
    marker = mtmd.mtmd_default_marker()
    text = mtmd.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
    bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
    try:
        assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1) == 0
        pieces = [mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks))]
        image = mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE
        chunk = next(piece for piece in pieces if mtmd.mtmd_input_chunk_get_type(piece) == image)
        assert mtmd.mtmd_encode_chunk(context, chunk) == 0
        rows = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        return np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), (rows, width)).copy()
    finally:
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)
        mtmd.mtmd_free(context)
        llama.llama_model_free(model)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize(
    ("connector", "activation"), [("mlp2x_gelu", "quick_gelu"), ("linear", "quick_gelu"), ("mlp2x_gelu", "gelu")]
)
def test_llama_cpp_sees_what_pytorch_sees(tmp_path: Path, connector: str, activation: str, half: bool) -> None:
    model = system(connector, activation)
    dims = model.dims
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    lm = causal(dims.language, model.language_model.state_dict(), llama_sentencepiece(tokenizer))
    export_language_model(lm, tmp_path / "model.gguf", "f32")
    write_mmproj(model.state_dict(), dims, tmp_path / "mmproj.gguf", half=half)
    picture = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    pixels = torch.from_numpy(preprocess(Image.fromarray(picture), preprocessing(dims)))
    with torch.no_grad():
        expected = model.encode(pixels)[0].numpy()
        misordered = as_llama_cpp_25814(model, pixels)
    measured = encode_in_llama_cpp(tmp_path, picture, dims.language.width)
    assert measured.shape == expected.shape
    # The tanh form of GELU and the f16 convolution of ggml are not exact. A llama.cpp with the defect must show exactly
    # that defect, which proves every tensor of the file; one without it must agree with PyTorch.
    bound = 0.02 * np.abs(expected).max()
    assert min(np.abs(measured - expected).max(), np.abs(measured - misordered).max()) < bound
    assert np.abs(expected - misordered).max() > 5 * bound


def as_llama_cpp_25814(model: Llava, pixels: torch.Tensor) -> np.ndarray:
    """What llama.cpp computes since its issue 25814: the class token stands last but is taken to stand first."""
    eyes = model.vision_encoder
    patches = eyes.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    tokens = torch.cat([patches, eyes.embeddings.class_embedding.expand(1, 1, -1)], dim=1)
    states = eyes.encoder(eyes.pre_layrnorm(tokens + eyes.embeddings.position_embedding.weight))
    return model.connector(states[:, 1:])[0].numpy()


def test_an_unknown_connector_is_refused(tmp_path: Path) -> None:
    dims = LlavaDims(VitDims(28, 14, 32, 2, 2, 64), LlamaDims(50, 32, 32, 1, 1, 1, 32), connector="mlp3x_gelu")
    with pytest.raises(BadInput, match="mlp3x_gelu"):
        write_mmproj({}, dims, tmp_path / "mmproj.gguf")
    assert not list(tmp_path.iterdir())
