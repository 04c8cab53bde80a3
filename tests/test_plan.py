"""`plan`: hand-computed sizes and times, advice that really fits, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from mllm_edge import bench, cli
from mllm_edge.bench.plan import Settings, plan
from mllm_edge.errors import BadInput
from mllm_edge.export.counting import count
from mllm_edge.machine import devices
from mllm_edge.models.counts import counts
from mllm_edge.models.lion.model import CONFIGS

ORIN = devices.DEVICES["orin-nano"]
USUAL = Settings("fp16", "q4_k_m", 0, "f16")


def test_vicuna_7b_on_an_orin_nano_is_what_hand_computation_says() -> None:
    made = plan("llava", "7b", dataclasses.replace(USUAL, context=1000), ORIN)
    # CLIP-L/14-336 without its last block: 291 M weights of 2 bytes; connector 21 M; 6.74 G weights of 0.62 bytes
    expected = {"vision_encoder": 0.582, "connector": 0.042, "language_model": 4.18}
    assert made.files_gb == pytest.approx(expected, abs=0.01)
    # 1000 tokens x 2 x 32 layers x 4096 x 2 bytes = 0.524 GB of KV cache
    assert made.full_context_gb - made.load_gb == pytest.approx(0.524, abs=0.002)
    parts = {part.name: part for part in made.parts}
    assert made.prompt_tokens == 576 + 64
    # 640 tokens: 8.6 TFLOP at 10 TFLOP/s
    assert parts["prefill"].limit_ms == pytest.approx(857, rel=0.01)
    # 4.1 GB of weights and 640 x 0.524 MB of cache at 68 GB/s
    assert parts["decode"].limit_ms == pytest.approx(1000 * (4.10 + 0.336) / 68, rel=0.01)
    assert parts["decode"].expected_ms == pytest.approx(parts["decode"].limit_ms / 0.40, rel=0.001)
    limit, likely = made.first_token_ms
    assert limit == pytest.approx(sum(part.limit_ms for part in made.parts if part.name != "decode"))
    assert likely > 2 * limit


@pytest.mark.parametrize(("quant", "device"), [("q4_k_m", "orin-nano"), ("f16", "rtx-4060-laptop")])
def test_the_advice_fits(quant: str, device: str) -> None:
    chosen = dataclasses.replace(USUAL, quant=quant)
    made = plan("llava", "7b", chosen, devices.get(device))
    assert not made.fits
    changes = dict(re.findall(r"--([a-z-]+) (\S+)", made.advice))
    assert changes
    values = {name.replace("-", "_"): int(value) if value.isdigit() else value for name, value in changes.items()}
    again = plan("llava", "7b", dataclasses.replace(chosen, **values), devices.get(device))
    assert (again.fits, again.advice) == (True, "")


def test_parts_that_take_turns_are_offered_last() -> None:
    made = plan("glamm", "7b", dataclasses.replace(USUAL, context=2048), ORIN)
    # All parts in int8 take 5.5 GB and no context of 512 or more beside them; the language model alone takes 4.2 GB.
    assert made.advice.endswith("its parts fit in turn, which is slower: run it with --memory-budget 5.8G")
    assert "--kv-type q8_0" in made.advice


@pytest.mark.parametrize("name", ["llava tiny", "llava 13b", "lion tiny", "lion 4b", "glamm tiny", "glamm 7b"])
def test_shipped_counts_are_those_of_the_modules(name: str) -> None:
    system, config = name.split()
    assert counts(system, config) == count(system, config)


def test_what_cannot_fit_is_said() -> None:
    made = plan("llava", "13b", USUAL, dataclasses.replace(ORIN, memory_gb=3.0))
    assert (made.fits, made.advice) == (False, "nothing makes it fit; take a smaller config")


def test_a_measurement_stands_beside_the_expectation() -> None:
    spread = bench.Spread(10, 20, 30, 40)
    environment = bench.Environment("cpu", 1, "cpu", "linux", "3.11", {}, "", None)
    result = bench.Result(
        *("a.bundle", "llava", "7b", "fp32", 1.0, 1, 700, 576, 4, None, 1.0, {"vision_encoder": spread}),
        *(spread, spread, spread, None, {}, environment),
    )
    made = plan("llava", "7b", USUAL, ORIN, result)
    parts = {part.name: part.measured_ms for part in made.parts}
    assert parts == {"vision_encoder": 20, "connector": None, "prefill": None, "decode": 50}
    assert made.prompt_tokens == 700
    with pytest.raises(BadInput, match="not of llava 1b"):
        plan("llava", "1b", USUAL, ORIN, result)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "llava", "--config", "7b", "--device", "agx-orin"]
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    assert "Jetson AGX Orin 64GB" in told
    assert "time to first token" in told
    assert cli.main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fits"] is True
    assert document["settings"]["context"] == 4096


@pytest.mark.parametrize(("device", "precision", "memory"), [("orin", "fp16", 64), ("raspberry-pi-5", "fp32", 8)])
def test_other_names_and_cpus(device: str, precision: str, memory: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "llava", "--device", device, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["settings"]["precision"], document["device"]["memory_gb"]) == (precision, memory)


def test_this_machine_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "llava", "--config", "tiny", "--device", "this", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["device"]["memory_gb_per_s"] > 0.1
    assert document["settings"]["precision"] == "fp32"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "orin-nan"], "did you mean 'orin-nano' or 'orin-nx' or"),
        (["--device", "zzz"], "use this, orin-nano,"),
        (["--device", "thor", "--quant", "q3"], "unknown quantization 'q3'"),
        (["--device", "thor", "--context", "9999"], "context of 1024"),
        (["--device", "thor", "--config", "70b"], "unknown config of llava '70b'; use one of tiny"),
        (["--device", "thor", "--measured", "nowhere.json"], "nowhere.json"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "llava", *words]) == 2
    assert message in capsys.readouterr().err


def test_devices_are_plausible() -> None:
    named = [name for device in devices.DEVICES.values() for name in (device.name, *device.aliases)]
    assert len(named) == len(set(named)) and devices.THIS not in named
    for device in devices.DEVICES.values():
        assert all(devices.get(name) is device for name in (device.name, *device.aliases))
        assert 0 < device.reserved_gb < device.memory_gb
        assert not device.board or device.capability
        assert all(0 < share < 1 for share in device.reach.values())


def test_stages_of_some_answers_are_not_in_the_time_to_first_token() -> None:
    made = plan("glamm", "7b-lite", USUAL, ORIN)
    lazy = {part.name for part in made.parts if part.lazy}
    assert lazy == {"region_encoder", "mask_encoder", "mask_decoder"}
    early = sum(part.limit_ms for part in made.parts if part.name in ("vision_encoder", "connector", "prefill"))
    assert made.first_token_ms[0] == pytest.approx(early)
    assert made.prompt_tokens < 1000  # a picture takes 576


def test_a_language_model_by_onnx_runtime() -> None:
    """The quantization says which engine: 0.65 bytes a weight, and keys and values in fp32."""
    made = plan("llava", "7b", Settings("fp16", "int4", 1000, ""), ORIN)
    assert (made.settings.quant, made.settings.kv_type) == ("int4", "f32")
    assert made.files_gb["language_model"] == pytest.approx(6.74 * 0.65, abs=0.01)
    assert made.full_context_gb - made.load_gb == pytest.approx(2 * 0.524, abs=0.004)
    with pytest.raises(BadInput, match=re.escape("ONNX Runtime's KV cache is f32, not q8_0; leave --kv-type out")):
        plan("llava", "7b", Settings("fp16", "int8", 0, "q8_0"), ORIN)
    assert plan("llava", "7b", Settings("fp16", "", 0, ""), ORIN).settings.quant == "q4_k_m"
    tight = plan("llava", "1b", Settings("fp16", "int8", 0, ""), dataclasses.replace(ORIN, memory_gb=4.0))
    assert "--quant int4" in tight.advice and "--kv-type" not in tight.advice


def test_of_an_encoder_decoder_a_prompt_and_a_token_cost_other_weights() -> None:
    """Flan-T5-XL by hand: the prompt is read by the encoder and becomes the decoder's keys and values."""
    layers, width, ffn, adapters = 24, 2048, 5120, 2 * 2 * 2048 * 64
    dims = CONFIGS["4b"].language
    assert dims.prompt_weights == layers * (4 * width**2 + 3 * width * ffn + adapters + 2 * width**2)
    assert dims.product_weights == layers * (6 * width**2 + 3 * width * ffn + adapters) + 32128 * width


def test_lion_4b_on_an_orin_nano_is_what_hand_computation_says() -> None:
    made = plan("lion", "4b", Settings("fp16", "int4", 0, ""), ORIN)
    parts = {part.name: part for part in made.parts}
    # 986 M weights of EVA ViT-g of 2 bytes; 2.88 G of the T5 at 0.65 bytes
    assert made.files_gb["vision_encoder"] == pytest.approx(1.97, abs=0.01)
    assert made.files_gb["language_model"] == pytest.approx(0.65 * counts("lion", "4b").language_model.weights / 1e9)
    # 32 queries and 257 regions with 64 words
    assert made.prompt_tokens == 289 + 64
    prefill = 2 * made.prompt_tokens * CONFIGS["4b"].language.prompt_weights
    assert parts["prefill"].gflop == pytest.approx(prefill / 1e9, rel=0.02)
    assert not any(part.lazy for part in made.parts)  # the tagger's words are in every prompt
    assert not made.fits and "--precision int8" in made.advice
