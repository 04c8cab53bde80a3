"""The reference that exports are verified against, compared with the module that it wraps."""

import numpy as np
import pytest
import torch

from mllm_edge.models.language.llama import LlamaDims, LlamaReference, llama

DIMS = LlamaDims(vocabulary=96, width=32, ffn_width=64, layers=2, heads=4, kv_heads=2, context=64)
PROMPT = np.random.default_rng(0).normal(size=(5, DIMS.width)).astype(np.float32)
TOKENS = [17, 3, 88]


@pytest.fixture(scope="module")
def module() -> torch.nn.Module:
    torch.manual_seed(0)
    model = llama(DIMS).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # ones would hide a norm that is left out
    return model


@pytest.mark.parametrize("tokens", [TOKENS, []], ids=["three tokens", "none"])
def test_row_i_is_what_the_module_gives_after_i_tokens(module: torch.nn.Module, tokens: list[int]) -> None:
    logits, states = LlamaReference(module).forced(PROMPT, tokens)
    assert (logits.shape, states.shape) == ((len(tokens) + 1, 96), (len(tokens) + 1, 32))
    for count in range(len(tokens) + 1):
        with torch.no_grad():
            rows = module.get_input_embeddings()(torch.tensor(tokens[:count], dtype=torch.long))
            state = module.model(inputs_embeds=torch.cat([torch.from_numpy(PROMPT), rows])[None])[0][0, -1]
            np.testing.assert_allclose(states[count], state, atol=1e-5)  # after the final norm
            np.testing.assert_allclose(logits[count], module.lm_head(state), atol=1e-5)
    assert np.abs(np.diff(states, axis=0)).max(initial=1.0) > 0.1


def test_generated_tokens_are_the_likeliest_along_themselves(module: torch.nn.Module) -> None:
    reference = LlamaReference(module)
    tokens = reference.generate(PROMPT, 8)
    logits, _ = reference.forced(PROMPT, tokens[:-1])
    assert tokens == logits.argmax(-1).tolist()
    last = tokens[3]
    end = tokens.index(last)
    assert reference.generate(PROMPT, 8, lambda token: token == last) == tokens[: end + 1]  # the end among them
