"""A language model's graphs for ONNX Runtime: int8 and int4 weights, fp16, and the tokenizer beside them.

int8 has weights of 7 bits (as `int8.py` says why) with a scale for each output, and inputs that are quantized as they
come. int4 has weights in blocks of 32 with a scale and a zero each (`MatMulNBits`), which ONNX Runtime multiplies with
inputs of 8 bits. In fp16 only products of matrices are, but those that the part names: T5's streams leave its range.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from mllm_edge.bundle import manifest
from mllm_edge.checkpoints.tokenizer import CONTROL, NORMAL, USER_DEFINED, Tokenizer, fitting_tokenizer
from mllm_edge.errors import BadInput
from mllm_edge.export.onnx.fp16 import to_float16
from mllm_edge.export.onnx.lower import check_graph, lower, save_graph
from mllm_edge.export.onnx.weights_only import quantize_weights
from mllm_edge.version import __version__

if TYPE_CHECKING:
    from mllm_edge.models.plan import LanguageModelExport, StageExport

BLOCK = 32  # weights that share a scale in int4
TOKENIZER = "tokenizer.json"


def export_part(part: StageExport, path: Path, quant: str, for_tensorrt: bool = False) -> list[Path]:
    """Write a part as a checked ONNX file in one of `quants.ONNX_QUANTS`; the table of embeddings has 16 bits at least.
    For TensorRT, which has neither of ONNX Runtime's kinds of product, int8 and int4 are of weights alone, multiplied
    in fp16.

    Returns:
        The external data files that belong to `path`: none, or one.

    Raises:
        MllmEdgeError: the exporter refuses the module, or the graph does not match the part's specs.
    """
    if quant in ("int8", "int4") and part.name == "embed":
        quant = "fp16"
    model = lower(part)
    model.metadata_props.update(stage=part.name, precision=quant, mllm_edge=__version__)
    if quant == "fp16" or (for_tensorrt and quant != "fp32"):
        to_float16(model, {}, part.float32, products_only=part.name != "embed")
    if quant in ("fp32", "fp16"):
        data_files = save_graph(model, path)
    else:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            plain = Path(scratch) / "plain.onnx"
            external = bool(save_graph(model, plain))
            del model
            quantize = _weights_only(quant) if for_tensorrt else {"int8": _int8, "int4": _int4}[quant]
            quantize(plain, path, external)
        data_files = [path.with_name(f"{path.name}.data")] if external else []
    check_graph(path, part)
    return data_files


def _int8(source: Path, path: Path, external: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # its advice to run an optimizer first, which folds nothing here
    try:
        quantize_dynamic(
            source,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=external,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        logging.disable(logging.NOTSET)


def _weights_only(quant: str) -> Callable[[Path, Path, bool], None]:
    def quantize(source: Path, path: Path, external: bool) -> None:
        model = onnx.load(str(source))
        quantize_weights(model, {"int8": 8, "int4": 4}[quant])
        onnx.save(model, str(path), save_as_external_data=external, location=f"{path.name}.data")

    return quantize


def _int4(source: Path, path: Path, external: bool) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    how = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False, accuracy_level=4)
    made = MatMulNBitsQuantizer(onnx.load(str(source)), algo_config=how)
    made.process()
    made.model.save_model_to_file(str(path), external)


def write_tokenizer(lm: LanguageModelExport, path: Path, entry: manifest.Tokenizer) -> manifest.Tokenizer:
    """Write a causal language model's tokenizer as `tokenizer.json`, and what the manifest says of it.

    Args:
        lm: the language model; its checkpoint's folder has the tokenizer.
        path: where to.
        entry: the one inside a GGUF that it takes the place of.

    Raises:
        BadInput: a tokenizer that cannot be written so.
    """
    held = fitting_tokenizer(lm.tokenizer, lm.dims.vocabulary)
    if held.model == "llama":
        _sentencepiece(held).save(str(path))
    else:
        source = lm.tokenizer / TOKENIZER
        if not source.is_file():
            raise BadInput(f"{source} is missing; ONNX Runtime's language models need it")
        path.write_bytes(source.read_bytes())
    special = held.special
    ends = [held.tokens[special[role]] for role in ("eos", "eot", "eom") if role in special]
    bos = held.tokens[special["bos"]] if held.add_bos and "bos" in special else ""
    return manifest.Tokenizer(entry.name, "json", path.name, entry.lead, entry.added, bos, ends)


def _sentencepiece(held: Tokenizer) -> Any:
    """A SentencePiece BPE with byte fallback as the package `tokenizers` has it (transformers' `LlamaConverter`)."""
    from tokenizers import AddedToken, models, normalizers
    from tokenizers import Tokenizer as Made

    ids = {text: number for number, text in enumerate(held.tokens)}
    score = dict(zip(held.tokens, held.scores))
    pairs = [
        (score[text], ids[text[:at]], ids[text[at:]], text[:at], text[at:])
        for text, kind in zip(held.tokens, held.types)
        if kind == NORMAL
        for at in range(1, len(text))
        if text[:at] in ids and text[at:] in ids
    ]
    merges = [(first, second) for _, _, _, first, second in sorted(pairs, key=lambda one: (-one[0], one[1], one[2]))]
    unknown = held.tokens[held.special.get("unk", 0)]
    made = Made(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("\u2581")] if held.space_prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    for text, kind in zip(held.tokens, held.types):
        if kind == CONTROL:
            made.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            made.add_tokens([AddedToken(text, special=False, normalized=False)])
    return made
