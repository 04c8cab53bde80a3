"""The language model as a GGUF file, by our own tensor map; blocks are quantized by llama.cpp's code.

Tensors are written one by one, so that a model larger than the memory can be exported, and an export that was killed
continues with the next. The token embedding stays in a type whose rows the runtime can read alone (F32, F16 or Q8_0).
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import math
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from mllm_edge.bundle.manifest import EmbeddingTable, GgufDetails, LanguageModelEntry
from mllm_edge.bundle.read import file_entry
from mllm_edge.checkpoints.tokenizer import UNUSED, Tokenizer, fitting_tokenizer
from mllm_edge.errors import BadInput, look_up
from mllm_edge.export.gguf.k_quants import chosen_types, quantize_rows
from mllm_edge.export.gguf.maps import MAPS, Held, Map
from mllm_edge.models.counts import kv_bytes_per_token
from mllm_edge.models.language.reference import DecoderDims
from mllm_edge.models.plan import LanguageModelExport
from mllm_edge.quants import QUANTS
from mllm_edge.version import __version__

TYPE = gguf.GGMLQuantizationType
Progress = Callable[[int, int], None]  # weights written so far, and in all


@dataclass(frozen=True)
class About:
    """What the file tells other tools of its model: name, license, the model on the hub (org/name) that it was made
    from, and a Jinja template of its dialogues."""

    name: str = ""
    licence: str = ""
    base_model: str = ""
    chat_template: str = ""


def export_language_model(
    lm: LanguageModelExport,
    path: Path,
    quant: str,
    progress: Progress | None = None,
    made_from: str = "",
    about: About | None = None,
) -> LanguageModelEntry:
    """Write `lm` to `path` and describe it for the manifest. The file gets its name when it is complete; one that was
    started from the same weights is continued.

    Args:
        lm: the decoder.
        path: the GGUF file, inside the bundle's folder.
        quant: one of `quants.QUANTS`.
        progress: called after each tensor.
        made_from: stands for the weights and settings; a file started under the same name is continued.
        about: for other tools.

    Raises:
        BadInput: an unknown quantization, a tokenizer with more tokens than the model, weights of wrong shape.
        MllmEdgeError: llama.cpp could not quantize.
    """
    look_up("quantization", quant, QUANTS)
    name = hashlib.sha256(f"{made_from}:{quant}".encode()).hexdigest()[:16]
    partial = path.with_name(f"{path.name}.{name}.partial")
    for stale in path.parent.glob(f"{path.name}.*.partial"):
        if stale != partial or not made_from:
            stale.unlink()
    write_gguf(lm, partial, quant, progress, about)
    partial.replace(path)
    return _entry(lm, path, quant)


def write_gguf(
    lm: LanguageModelExport, path: Path, quant: str, progress: Progress | None = None, about: About | None = None
) -> None:
    """Write `lm` in one pass, vectors as F32; tensors that stand in the file already are not written again.

    Raises:
        BadInput: see `export_language_model`.
    """
    form = look_up("architecture", lm.architecture, MAPS)
    tensors = form.tensors(lm.dims, quant)
    types = _types(form, lm.dims, tensors, quant)
    head = _head(form, lm, tensors, types, quant, path, about or About())
    sizes = [_bytes(held.shape, types[name]) for name, held in tensors.items()]
    padded = [gguf.GGUFWriter.ggml_pad(size, gguf.GGUF_DEFAULT_ALIGNMENT) for size in sizes]
    ends = [len(head) + end for end in itertools.accumulate(padded)]
    weights = list(itertools.accumulate(math.prod(held.shape) for held in tensors.values()))
    done = _started(path, head, ends)
    with path.open("r+b") as file:
        file.truncate(ends[done - 1] if done else len(head))
        file.seek(0, os.SEEK_END)
        if done and progress:
            progress(weights[done - 1], weights[-1])
        for number, (name, held) in itertools.islice(enumerate(tensors.items()), done, None):
            file.write(_tensor(lm, name, held, types[name]).data)
            file.write(bytes(padded[number] - sizes[number]))
            if progress:
                progress(weights[number], weights[-1])


def _types(form: Map, dims: DecoderDims, tensors: Mapping[str, Held], quant: str) -> dict[str, TYPE]:
    """The type that each tensor gets in the file."""
    if not QUANTS[quant].k:
        kind = gguf.GGMLQuantizationType[QUANTS[quant].type]
        return {name: TYPE.F32 if held.float32 else _type(held.shape, kind) for name, held in tensors.items()}
    return chosen_types(
        form.architecture,
        {name: held.shape for name, held in tensors.items()},
        quant,
        _type((1, dims.width), TYPE.Q8_0),  # llama.cpp aborts on a type that does not fit the rows
        lambda writer: _write_about(writer, form, dims, gguf.LlamaFileType.ALL_F32),
    )


def _head(
    form: Map,
    lm: LanguageModelExport,
    tensors: Mapping[str, Held],
    types: Mapping[str, TYPE],
    quant: str,
    path: Path,
    about: About,
) -> bytes:
    """All that stands before the tensors."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / "head"
        writer = gguf.GGUFWriter(file, form.architecture)
        try:
            _write_about(writer, form, lm.dims, gguf.LlamaFileType[QUANTS[quant].file_type])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            _write_origin(writer, about)
            _write_tokenizer(writer, fitting_tokenizer(lm.tokenizer, lm.dims.vocabulary), lm.dims.vocabulary)
            for name, held in tensors.items():
                size = _bytes(held.shape, types[name])
                writer.add_tensor_info(name, held.shape, np.dtype(np.float32), size, raw_dtype=types[name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        head = file.read_bytes()
    return head + bytes(gguf.GGUFWriter.ggml_pad(len(head), gguf.GGUF_DEFAULT_ALIGNMENT) - len(head))


def _started(path: Path, head: bytes, ends: list[int]) -> int:
    """How many tensors stand whole in a file that begins with `head`; it is made where there is none."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(head)) == head:
                return bisect.bisect_right(ends, path.stat().st_size)
    path.write_bytes(head)
    return 0


def _type(shape: tuple[int, ...], kind: TYPE) -> TYPE:
    if len(shape) == 1:
        return TYPE.F32
    return TYPE.F16 if kind == TYPE.Q8_0 and shape[-1] % 32 else kind


def _bytes(shape: tuple[int, ...], kind: TYPE) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def _tensor(lm: LanguageModelExport, name: str, held: Held, kind: TYPE) -> np.ndarray:
    """One tensor as its bytes will stand in the file."""
    array = held.made(*(_part(lm, part, shape) for part, shape in held.parts.items()))
    if kind == TYPE.F16:
        if np.abs(array).max() > np.finfo(np.float16).max:
            raise BadInput(f"{name} has values beyond 16-bit floats; use --quant f32 or q8_0")
        array = array.astype(np.float16)
    if kind in (TYPE.F16, TYPE.F32):
        return np.ascontiguousarray(array)
    return quantize_rows(array, kind)


def _part(lm: LanguageModelExport, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of the checkpoint, float32."""
    tensor = lm.tensors[name]
    if tuple(tensor.shape) != shape:
        raise BadInput(f"{name} has shape {tuple(tensor.shape)}, not {shape}; the config is of another model")
    array: np.ndarray = tensor.float().numpy()
    if not np.isfinite(array).all():
        raise BadInput(f"{name} has values that are NaN or infinite; download or train the checkpoint again")
    return array


def _write_about(writer: gguf.GGUFWriter, form: Map, dims: DecoderDims, file_type: gguf.LlamaFileType) -> None:
    writer.add_string("general.mllm_edge_version", __version__)
    writer.add_file_type(file_type)
    form.write_dims(writer, dims)


def _write_origin(writer: gguf.GGUFWriter, about: About) -> None:
    writer.add_name(about.name or "mllm-edge language model")
    if about.licence:
        writer.add_license(about.licence)
    if about.base_model:
        organization, _, name = about.base_model.partition("/")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, name)
        writer.add_base_model_organization(0, organization)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{about.base_model}")
    if about.chat_template:
        writer.add_chat_template(about.chat_template)


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocabulary: int) -> None:
    missing = vocabulary - len(tokenizer.tokens)
    # Published tables are padded to round sizes: rows that no token uses.
    filler = [f"[PAD{len(tokenizer.tokens) + i}]" for i in range(missing)]
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens + filler)
    writer.add_token_types(tokenizer.types + [UNUSED] * missing)
    if tokenizer.model == "llama":
        writer.add_token_scores(tokenizer.scores + [-1e6] * missing)
    else:
        writer.add_token_merges(tokenizer.merges)
    for role, token in tokenizer.special.items():
        getattr(writer, f"add_{role}_token_id")(token)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(tokenizer.space_prefix)


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[gguf.GGUFReader]:
    reader = gguf.GGUFReader(path)
    try:
        yield reader
    finally:
        del reader.data  # the memory map


def _entry(lm: LanguageModelExport, path: Path, quant: str) -> LanguageModelEntry:
    dims = lm.dims
    with _reader(path) as reader:
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        table = tensors["token_embd.weight"]
        # A step looks up one row of a table that is not the head as well.
        tables = ["position_embd.weight", *(["token_embd.weight"] if "output.weight" in tensors else [])]
        unread = sum(int(tensors[name].n_bytes) for name in tables if name in tensors)
        embedding = EmbeddingTable(table.tensor_type.name, int(table.data_offset), [dims.vocabulary, dims.width])
        types = Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1)
        block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[QUANTS[quant].type]][0]  # rows must be a multiple
        narrow = sum(int(tensor.shape[0]) % block != 0 for tensor in reader.tensors if len(tensor.shape) > 1)
    if narrow:
        warnings.warn(
            f"{narrow} matrices have rows that are no multiple of {block}, so they got other types than {quant}'s: "
            + ", ".join(f"{count} x {name}" for name, count in types.most_common()),
            stacklevel=2,
        )
    details = GgufDetails(
        **vars(file_entry(path.parent, path.name)), layers=dims.layers, kv_width=dims.kv_width, embedding=embedding
    )
    return LanguageModelEntry(
        name="language_model",
        engine="gguf",
        kind=lm.kind,
        precision=quant,
        tokenizer="language_model",
        context=dims.context,
        width=dims.width,
        vocabulary=dims.vocabulary,
        kv_bytes_per_token=kv_bytes_per_token(dims),
        gguf=details,
        flops_per_token=2 * dims.product_weights,
        bytes_per_token=details.bytes - unread,
    )
