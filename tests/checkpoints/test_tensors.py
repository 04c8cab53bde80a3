"""Lazy, safe reading of weights."""

import json
import os
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

from mllm_edge.checkpoints.lora import merge_lora
from mllm_edge.checkpoints.tensors import (
    check_all_used,
    check_finite,
    fingerprint,
    open_file,
    open_folder,
    random_weights,
    renamed,
    resolve_folder,
)
from mllm_edge.errors import BadInput

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4)}


def write(folder: Path, suffix: str, sharded: bool) -> None:
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    parts = [{name: tensor} for name, tensor in STATE.items()] if sharded else [STATE]
    files = [f"{stem}-{i}.{suffix}" for i in range(len(parts))] if sharded else [f"{stem}.{suffix}"]
    for file, part in zip(files, parts, strict=True):
        if suffix == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
    if sharded:
        index = {"weight_map": {name: file for file, part in zip(files, parts, strict=True) for name in part}}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_kind_of_file(tmp_path: Path, suffix: str, sharded: bool) -> None:
    write(tmp_path, suffix, sharded)
    tensors = open_folder(tmp_path)
    assert set(tensors) == set(STATE)
    assert tensors.shape("a.weight") == (2, 3)
    assert all(torch.equal(tensors[name], STATE[name]) for name in STATE)
    with pytest.raises(KeyError):
        tensors["c"]


def test_the_old_torch_format(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(open_folder(tmp_path)["a.weight"], STATE["a.weight"])


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_format: bool) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Payload()}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    with pytest.raises(BadInput, match="wants to run code"):
        open_folder(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("kept", [0, 1, 7, 100])
def test_truncated_files(tmp_path: Path, suffix: str, kept: int) -> None:
    write(tmp_path, suffix, sharded=False)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BadInput, match=path.name) as caught:
        open_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../secret.safetensors"}}, "outside its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside its folder"),
        ({"weight_map": {"a": "..\\x"}}, "outside its folder"),
        ({"weight_map": {"a": "model-9.safetensors"}}, "model-9.safetensors is missing"),
        ({"weight_map": {"a.weight": "model-0.safetensors", "zzz": "model-0.safetensors"}}, "zzz"),
        ({"weight_map": ["a"]}, "no weight_map"),
        ([], "JSON object"),
    ],
)
def test_hostile_indices(tmp_path: Path, index: object, message: str) -> None:
    write(tmp_path, "safetensors", sharded=True)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match=message):
        open_folder(tmp_path)


def test_random_weights_depend_on_name_and_seed_alone() -> None:
    few, many = random_weights({"x.weight": (3, 4)}), random_weights({"y": (2,), "x.weight": (3, 4)})
    assert torch.equal(few["x.weight"], many["x.weight"])
    assert not torch.equal(few["x.weight"], random_weights({"x.weight": (3, 4)}, seed=1)["x.weight"])
    rest = random_weights({"norm.weight": (2,), "fc.bias": (2,)})
    assert rest["norm.weight"].tolist() == [1, 1]
    assert rest["fc.bias"].tolist() == [0, 0]


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_merge_equals_peft(tmp_path: Path, rslora: bool) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], use_rslora=rslora)
    adapted = peft.get_peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    expected = adapted.merge_and_unload().state_dict()
    measured = merge_lora(open_folder(tmp_path), tmp_path / "adapter")
    assert all(torch.allclose(measured[name], expected[name], atol=1e-6) for name in expected)
    other = renamed(open_folder(tmp_path), lambda name: name.replace("q_proj", "query"))
    with pytest.raises(BadInput, match="q_proj"):
        merge_lora(other, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(BadInput, match=r"adapter_config\.json is missing"):
        merge_lora(open_folder(tmp_path), tmp_path / "adapter")


def test_reading_one_tensor_reads_no_other(tmp_path: Path) -> None:
    write(tmp_path, "safetensors", sharded=True)
    tensors = open_folder(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    assert torch.equal(tensors["a.weight"], STATE["a.weight"])


def test_fingerprint_changes_with_a_byte(tmp_path: Path) -> None:
    write(tmp_path, "safetensors", sharded=False)
    before = fingerprint(tmp_path)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert fingerprint(tmp_path) != before


def test_fingerprint_changes_with_the_chat_template(tmp_path: Path) -> None:
    prints = [fingerprint(tmp_path)]
    for name in ("chat_template.jinja", "vocab.txt", "merges.txt", "generation_config.json"):
        (tmp_path / name).write_text("{}")
        prints.append(fingerprint(tmp_path))
    assert len(set(prints)) == 5


def test_texts_that_are_links_out_of_their_folder(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (tmp_path / "shared.safetensors").write_bytes(b"")
    (snapshot / "model.safetensors").symlink_to(tmp_path / "shared.safetensors")  # only parsed, never copied
    assert fingerprint(snapshot)
    (tmp_path / "secret").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(BadInput, match=r"tokenizer\.json is a link out of its folder"):
        fingerprint(snapshot)


def test_neither_folder_nor_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nothing", "./a/b", str(tmp_path / "gone")):
        with pytest.raises(BadInput, match="neither"):
            resolve_folder(name)
    assert resolve_folder(str(tmp_path)) == tmp_path

    import huggingface_hub

    def offline(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(BadInput, match="no network"):
        resolve_folder("org/name")


def test_a_stale_index_beside_a_whole_file_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, "safetensors", sharded=False)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert torch.equal(open_folder(tmp_path)["a.weight"], STATE["a.weight"])


def test_a_relative_path_is_kept_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("runs/mine") == tmp_path / "runs" / "mine"


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    write(tmp_path, "safetensors", sharded=False)
    tensors = renamed(open_folder(tmp_path), lambda name: name.replace("a.", "A."))
    check_all_used(tensors, {"A.weight", "b.bias"}, {}, "here")
    check_all_used(tensors, {"b.bias"}, {r"A\..*": "a reason"}, "here")
    with pytest.raises(BadInput, match=r"has 1 tensors .*\(a\.weight of .*model\.safetensors\)"):
        check_all_used(tensors, {"b.bias"}, {"A": "only a part of the name"}, "here")
    with pytest.raises(BadInput, match=r"b\.bias of .* and a\.weight are the same tensor"):
        renamed(open_folder(tmp_path), lambda _: "one")


def test_values_that_are_no_numbers_are_named_with_their_file(tmp_path: Path) -> None:
    state = {**STATE, "nan": torch.tensor([0.0, float("nan")]), "inf": torch.tensor([float("-inf")]).half()}
    state |= {"codes": torch.zeros(2, dtype=torch.int8), "small": torch.ones(3).to(torch.float8_e4m3fn)}
    save_file(state, tmp_path / "model.safetensors")
    tensors = renamed(open_folder(tmp_path), lambda name: f"our.{name}")
    check_finite(tensors, ["our.a.weight", "our.b.bias", "our.small", "our.tied.away"])
    for name in ("nan", "inf"):
        with pytest.raises(BadInput, match=rf"^{name} of .*model\.safetensors has values that are NaN or infinite"):
            check_finite(tensors, [f"our.{name}"])
    with pytest.raises(BadInput, match=r"^codes of .* holds int8 codes"):
        check_finite(tensors, ["our.codes"])


def test_a_single_file(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "x.safetensors")
    assert set(open_file(tmp_path / "x.safetensors")) == set(STATE)
