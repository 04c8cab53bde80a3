"""GGUF files: logits equal to transformers', tokenizers equal to the checkpoint's, memory of one tensor."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_for_tests import causal, vocabulary_only
from tokenizers_to_test import byte_level, llama_fast, llama_sentencepiece, write

from mllm_edge.checkpoints.tokenizer import lead, read_tokenizer
from mllm_edge.errors import BadInput, OutOfTolerance
from mllm_edge.export.gguf.maps import tensor_shapes
from mllm_edge.export.gguf.writer import About, export_language_model
from mllm_edge.export.verify.same_tokens import assert_same_tokens
from mllm_edge.models.language.llama import LlamaDims, llama
from mllm_edge.models.language.llama_gguf import interleave_rotary
from mllm_edge.models.plan import LanguageModelExport
from mllm_edge.quants import QUANTS
from mllm_edge.runtime.engines.interface import Options
from mllm_edge.runtime.engines.llama.library import library
from mllm_edge.runtime.engines.llama.model import LlamaLanguageModel
from mllm_edge.runtime.engines.llama.tokenizer import GgufTokenizer

K_QUANTS = [name for name, quant in QUANTS.items() if quant.k]
NARROW = LlamaDims(vocabulary=422, width=64, ffn_width=96, layers=2, heads=4, kv_heads=4, context=128)
WIDE = LlamaDims(
    vocabulary=450, width=256, ffn_width=512, layers=2, heads=4, kv_heads=2, context=128, tied=True, rope_theta=5e5
)

DEEP = dataclasses.replace(WIDE, layers=9, tied=False, kv_heads=1)  # mixtures give some layers more bits


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_sentencepiece(tmp_path_factory.mktemp("tokenizer"))


class Watched(Mapping[str, torch.Tensor]):
    """Tensors that are made anew at each access, and the largest number alive at once."""

    def __init__(self, state: dict[str, torch.Tensor]):
        import weakref

        self.state, self.alive, self.most = state, 0, 0
        self.finalize = weakref.finalize

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.state[name].clone()
        self.alive += 1
        self.most = max(self.most, self.alive)
        self.finalize(tensor, self.gone)
        return tensor

    def gone(self) -> None:
        self.alive -= 1

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def random_llama(dims: LlamaDims) -> torch.nn.Module:
    torch.manual_seed(1)
    model = llama(dims).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # ones would hide a norm that is left out
        else:
            torch.nn.init.normal_(parameter, std=0.08)
    return model


def run(path: Path, lm: LanguageModelExport, quant: str, ids: list[int], kv: str = "f32") -> np.ndarray:
    entry = export_language_model(lm, path, quant)
    assert entry.gguf
    assert entry.gguf.embedding.dtype in ("F32", "F16", "Q8_0")
    model = LlamaLanguageModel(path.parent, entry, Options("cpu", True, 1, kv, 64))
    try:
        return model.prefill(model.embed(ids)).logits
    finally:
        model.close()


@pytest.mark.parametrize("dims", [NARROW, WIDE], ids=["plain", "grouped-tied"])
def test_logits_equal_transformers(tmp_path: Path, tokenizer: Path, dims: LlamaDims) -> None:
    model = random_llama(dims)
    lm = causal(dims, model.state_dict(), tokenizer)
    ids = [1, 300, 17, 5, 260, 333]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(run(tmp_path / "f32.gguf", lm, "f32", ids), expected, atol=1e-4)
    np.testing.assert_allclose(run(tmp_path / "f16.gguf", lm, "f16", ids), expected, atol=0.05)
    rounded = run(tmp_path / "q8_0.gguf", lm, "q8_0", ids)
    cosine = rounded @ expected / np.linalg.norm(rounded) / np.linalg.norm(expected)
    assert 0.99 < cosine < 1 - 1e-9


@pytest.mark.parametrize("quant", K_QUANTS)
def test_k_quants(tmp_path: Path, tokenizer: Path, quant: str) -> None:
    model = random_llama(WIDE)
    lm = causal(WIDE, model.state_dict(), tokenizer)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[1, 300, 17]])).logits[0, -1].numpy()
    rounded = run(tmp_path / "model.gguf", lm, quant, [1, 300, 17], kv="f16")
    assert rounded @ expected / np.linalg.norm(rounded) / np.linalg.norm(expected) > 0.9
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_narrow_k_quants_are_announced(tmp_path: Path, tokenizer: Path) -> None:
    lm = causal(NARROW, random_llama(NARROW).state_dict(), tokenizer)
    with pytest.warns(UserWarning, match="no multiple of 256"):
        export_language_model(lm, tmp_path / "model.gguf", "q4_k_m")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("quant", "block"), [("q8_0", 32), ("q4_k_m", 256)])
def test_a_width_that_fits_no_block(tmp_path: Path, tokenizer: Path, quant: str, block: int, tied: bool) -> None:
    """llama.cpp aborts the whole process when it is told a type for the embedding whose blocks do not fit its rows."""
    dims = LlamaDims(vocabulary=422, width=48, ffn_width=80, layers=1, heads=4, kv_heads=4, context=64, tied=tied)
    model = random_llama(dims)
    lm = causal(dims, model.state_dict(), tokenizer)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[1, 300, 17]])).logits[0, -1].numpy()
    with pytest.warns(UserWarning, match=f"no multiple of {block}.*F16"):
        rounded = run(tmp_path / "model.gguf", lm, quant, [1, 300, 17])
    assert rounded @ expected / np.linalg.norm(rounded) / np.linalg.norm(expected) > 0.99


def test_heads_narrower_than_the_width(tmp_path: Path, tokenizer: Path) -> None:
    dims = dataclasses.replace(WIDE, head_width=32, tied=False)
    model = random_llama(dims)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[1, 300, 17, 5]])).logits[0, -1].numpy()
    lm = causal(dims, model.state_dict(), tokenizer)
    np.testing.assert_allclose(run(tmp_path / "model.gguf", lm, "f32", [1, 300, 17, 5]), expected, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"attention_bias": True, "mlp_bias": True, "tied": False, "head_width": 32},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32.0,
            }
        },
    ],
    ids=["attention", "mlp", "both", "linear", "llama3"],
)
def test_biases_and_scaled_positions_equal_transformers(
    tmp_path: Path, tokenizer: Path, change: dict[str, Any]
) -> None:
    dims = dataclasses.replace(WIDE, **change)
    model, plain = random_llama(dims), random_llama(WIDE)
    ids = [1, *range(280, 320)]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
        without = plain(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
    assert np.abs(expected - without).max() > 0.05
    lm = causal(dims, model.state_dict(), tokenizer)
    np.testing.assert_allclose(run(tmp_path / "model.gguf", lm, "f32", ids), expected, atol=1e-4)
    rounded = run(tmp_path / "model.gguf", lm, "q4_k_m", ids)
    assert rounded @ expected / np.linalg.norm(rounded) / np.linalg.norm(expected) > 0.9


def test_the_file_says_what_it_is(tmp_path: Path, tokenizer: Path) -> None:
    lm = causal(NARROW, random_llama(NARROW).state_dict(), tokenizer)
    about = About("llava small", "llama2", "lmsys/vicuna-7b-v1.5", "{{ messages }}")
    export_language_model(lm, tmp_path / "model.gguf", "f32", about=about)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    expected = {
        "general.name": "llava small",
        "general.license": "llama2",
        "general.base_model.0.name": "vicuna-7b-v1.5",
        "general.base_model.0.organization": "lmsys",
        "general.base_model.0.repo_url": "https://huggingface.co/lmsys/vicuna-7b-v1.5",
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert {key: reader.get_field(key).contents() for key in expected} == expected


def test_end_tokens_are_those_of_the_generation_config(tmp_path: Path) -> None:
    folder = llama_sentencepiece(tmp_path)
    assert read_tokenizer(folder).special["eos"] == 2
    for ends, message in ((["</s>"], "has not"), ([420, 421, 2, 3], "4 end tokens"), (9999, "9999")):
        write(folder / "generation_config.json", {"eos_token_id": ends})
        read_tokenizer.cache_clear()
        with pytest.raises(BadInput, match=rf"generation_config\.json has .*{message}"):
            read_tokenizer(folder)
    write(folder / "generation_config.json", {"eos_token_id": [421, 2]})
    read_tokenizer.cache_clear()
    tokenizer = GgufTokenizer(vocabulary_only(tmp_path, folder))
    try:
        assert [token for token in range(425) if tokenizer.is_end(token)] == [2, 421]
        assert tokenizer.eos == 421
    finally:
        tokenizer.close()


def test_an_added_token_beyond_the_last_row_is_left_out(tmp_path: Path) -> None:
    folder = llama_sentencepiece(tmp_path)
    dims = dataclasses.replace(NARROW, vocabulary=421)
    state = random_llama(dims).state_dict()
    with pytest.warns(UserWarning, match="<extra> is left out"):
        export_language_model(causal(dims, state, folder), tmp_path / "model.gguf", "f32")
    assert_same_tokens(tmp_path / "model.gguf", folder)
    write(folder / "generation_config.json", {"eos_token_id": 421})
    read_tokenizer.cache_clear()
    with pytest.raises(BadInput, match="422 tokens but the model 421 rows"):
        export_language_model(causal(dims, state, folder), tmp_path / "model.gguf", "f32")


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"": 420}, "added token 420 has the text ''"),
        ({"<far>": 10**12}, "has the id 1000000000000"),
        ({"<before>": -1}, "has the id -1"),
    ],
)
def test_added_tokens_that_abort_llama_cpp_are_refused(tmp_path: Path, added: dict[str, int], message: str) -> None:
    folder = llama_sentencepiece(tmp_path)
    write(folder / "added_tokens.json", added)
    read_tokenizer.cache_clear()
    with pytest.raises(BadInput, match=message):
        read_tokenizer(folder)


def test_ctrl_c_in_the_quantizer_leaves_nothing(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(source: bytes, path: bytes, settings: object) -> int:
        assert Path(source.decode()).is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(library(), "llama_model_quantize", interrupt)
    lm = causal(WIDE, random_llama(WIDE).state_dict(), tokenizer)
    with pytest.raises(KeyboardInterrupt):
        export_language_model(lm, tmp_path / "model.gguf", "q4_k_m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quant", ["f32", "q4_k_m"])
def test_one_tensor_at_a_time(tmp_path: Path, tokenizer: Path, quant: str) -> None:
    tensors = Watched(dict(random_llama(WIDE).state_dict()))
    export_language_model(causal(WIDE, tensors, tokenizer), tmp_path / "model.gguf", quant)
    assert tensors.most == 1


class Killed(Exception):
    pass


class Counted(dict[str, torch.Tensor]):
    """Counts the tensors that were read, and dies at one of them."""

    def __init__(self, state: dict[str, torch.Tensor], last: int):
        super().__init__(state)
        self.read, self.last = 0, last

    def __getitem__(self, name: str) -> torch.Tensor:
        if self.read == self.last:
            raise Killed
        self.read += 1
        return super().__getitem__(name)


@pytest.mark.parametrize("torn", [0, 1, 40], ids=["between tensors", "a byte missing", "in a tensor"])
def test_a_killed_export_continues_with_the_next_tensor(tmp_path: Path, tokenizer: Path, torn: int) -> None:
    state = random_llama(WIDE).state_dict()
    path, whole = tmp_path / "model.gguf", tmp_path / "whole.gguf"
    export_language_model(causal(WIDE, state, tokenizer), whole, "q4_k_m")
    lm = causal(WIDE, Counted(state, 7), tokenizer)
    with pytest.raises(Killed):
        export_language_model(lm, path, "q4_k_m", made_from="these weights")
    assert not path.exists()
    (partial,) = tmp_path.glob("*.partial")
    with partial.open("r+b") as file:
        file.truncate(partial.stat().st_size - torn)
    rest, told = Counted(state, 1000), []
    lm = causal(WIDE, rest, tokenizer)
    export_language_model(lm, path, "q4_k_m", lambda done, _: told.append(done), made_from="these weights")
    assert rest.read == len(tensor_shapes(WIDE)) - 7 + (torn > 0)
    assert told == sorted(set(told))
    assert path.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_another_export_does_not_continue_a_file_of_other_weights(tmp_path: Path, tokenizer: Path) -> None:
    first, second = (random_llama(WIDE).state_dict() for _ in range(2))
    second = {name: tensor * 2 for name, tensor in second.items()}
    lm = causal(WIDE, Counted(first, 7), tokenizer)
    with pytest.raises(Killed):
        export_language_model(lm, tmp_path / "model.gguf", "f16", made_from="the first")
    lm = causal(WIDE, second, tokenizer)
    export_language_model(lm, tmp_path / "model.gguf", "f16", made_from="the second")
    export_language_model(lm, tmp_path / "whole.gguf", "f16")
    assert (tmp_path / "model.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("dims", [NARROW, WIDE, DEEP], ids=["narrow", "tied", "deep"])
@pytest.mark.parametrize("quant", K_QUANTS)
@pytest.mark.filterwarnings("ignore:.*no multiple of")
def test_k_quants_are_those_of_llama_cpps_own_quantizer(
    tmp_path: Path, tokenizer: Path, dims: LlamaDims, quant: str
) -> None:
    lm = causal(dims, random_llama(dims).state_dict(), tokenizer)
    export_language_model(lm, tmp_path / "f32.gguf", "f32")
    export_language_model(lm, tmp_path / "ours.gguf", quant)
    settings = library().llama_model_quantize_default_params()
    settings.ftype, settings.token_embedding_type = (
        int(gguf.LlamaFileType[QUANTS[quant].file_type]),
        int(gguf.GGMLQuantizationType.Q8_0),
    )
    source, theirs = (str(tmp_path / name).encode() for name in ("f32.gguf", "theirs.gguf"))
    assert library().llama_model_quantize(source, theirs, settings) == 0
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "theirs.gguf").tensors}
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "ours.gguf").tensors}
    assert {name: t.tensor_type for name, t in found.items()} == {name: t.tensor_type for name, t in expected.items()}
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.data, expected[name].data, err_msg=name)


def test_rotary_rows_are_interleaved_by_hand() -> None:
    weight = np.arange(8, dtype=np.float32).reshape(8, 1)  # two heads of four rows: halves (0,1 | 2,3) and (4,5 | 6,7)
    assert interleave_rotary(weight, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_tensor_list_is_transformers_own() -> None:
    for dims in (NARROW, dataclasses.replace(WIDE, tied=False)):
        with torch.device("meta"):
            theirs = {name: tuple(tensor.shape) for name, tensor in llama(dims).state_dict().items()}
        assert tensor_shapes(dims) == theirs


def test_wrong_shape_nan_and_small_vocabulary_are_named(tmp_path: Path, tokenizer: Path) -> None:
    state = dict(random_llama(NARROW).state_dict())
    wrong = {**state, "model.norm.weight": torch.ones(3)}
    with pytest.raises(BadInput, match=r"model\.norm\.weight has shape \(3,\)"):
        export_language_model(causal(NARROW, wrong, tokenizer), tmp_path / "a.gguf", "f32")
    bad = {**state, "model.norm.weight": torch.full((64,), float("nan"))}
    with pytest.raises(BadInput, match=r"model\.norm\.weight has values that are NaN"):
        export_language_model(causal(NARROW, bad, tokenizer), tmp_path / "a.gguf", "q8_0")
    few = dataclasses.replace(NARROW, vocabulary=100)
    with pytest.raises(BadInput, match="422 tokens but the model 100 rows"):
        export_language_model(causal(few, state, tokenizer), tmp_path / "a.gguf", "f32")


@pytest.mark.parametrize("kind", ["model", "legacy", "first", "gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_the_gguf_tokenizes_as_the_checkpoint(tmp_path: Path, kind: str) -> None:
    if kind == "model":
        folder = llama_sentencepiece(tmp_path)
    elif kind in ("legacy", "first"):
        folder = llama_fast(tmp_path, legacy=kind == "legacy")
    else:
        folder = byte_level(tmp_path, kind)
    assert_same_tokens(vocabulary_only(tmp_path, folder), folder)
    assert lead(folder) == (" " if kind == "first" else "")


def test_a_different_tokenizer_is_found_out(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir()
    other.mkdir()
    path = vocabulary_only(tmp_path, byte_level(mine, "gpt-2"))
    with pytest.raises(OutOfTolerance, match="tokenizes"):
        assert_same_tokens(path, byte_level(other, "smollm"))
