"""Fields of a LLaMA's config.json: read, equal to what is built, or refused by name."""

from pathlib import Path
from typing import Any

import pytest

from mllm_edge.errors import BadInput
from mllm_edge.models.fields import refuse_quantized
from mllm_edge.models.language.config import llama_dims

USUAL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
WHERE = Path("config.json")


def dims(**fields: Any) -> Any:
    return llama_dims({**USUAL, **fields}, 448, True, WHERE)


def test_what_is_left_out_has_transformers_defaults() -> None:
    found = dims()
    assert (found.kv_heads, found.context, found.norm_eps, found.rope_theta) == (4, 2048, 1e-6, 10000.0)
    assert (found.attention_bias, found.mlp_bias, found.rope_scaling, found.head_dim) == (False, False, None, 16)


def test_what_is_said_is_read() -> None:
    found = dims(
        num_key_value_heads=2, attention_bias=True, mlp_bias=True, head_dim=8, rope_theta=5e5, rms_norm_eps=1e-5
    )
    assert (found.kv_heads, found.attention_bias, found.mlp_bias, found.head_dim) == (2, True, True, 8)
    assert (found.rope_theta, found.norm_eps) == (5e5, 1e-5)
    assert dims(rope_scaling={"type": "linear", "factor": 2}).rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert dims(rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope_theta == 7.0
    assert dims(hidden_act="silu", sliding_window=4096, partial_rotary_factor=1.0).width == 64
    assert dims(sliding_window=16, use_sliding_window=False).width == 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"sliding_window": 16}, "sliding_window 16"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "factor -1"),
        ({"rope_scaling": "linear"}, "rope_scaling 'linear'"),
        ({"logits_scaling": 8}, "logits_scaling 8"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types 'sliding_attention'"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps 'tiny'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps 0"),
        ({"num_attention_heads": True}, "num_attention_heads True"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers 1000000000000"),
        ({"attention_bias": "some"}, "attention_bias 'some'"),
    ],
)
def test_what_is_not_built_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=rf"config\.json (has )?{message}"):
        dims(**fields)


@pytest.mark.parametrize(
    ("config", "form"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
            "compressed-tensors float-quantized",
        ),
    ],
)
def test_quantized_checkpoints_are_refused_by_their_format(config: dict[str, Any], form: str) -> None:
    with pytest.raises(BadInput, match=f"config.json has a quantization_config: its weights are codes of {form};"):
        refuse_quantized(config, WHERE)
    refuse_quantized({"quantization_config": None, "text_config": {}}, WHERE)
