"""LLaVA's chat templates (llava/conversation.py), as data."""

from __future__ import annotations

from mllm_edge.bundle.manifest import Prompt, Slot

EMBEDS = "image_embeds"  # a picture in the decoder's space
MARKS = ("<im_start>", "<im_end>")  # around a picture, where a checkpoint has mm_use_im_start_end
PICTURE = Slot("<image>", "pixels", [EMBEDS], joint="<image>\n")

_ASSISTANT = "gives helpful, detailed, and polite answers to the {0}'s questions."
_SYSTEM = "A chat between a curious {0} and an artificial intelligence assistant. The assistant " + _ASSISTANT
_SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_CHATML = "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


def _prompt(name: str, system: str, first: str, following: str, answer: str, stop: list[str]) -> Prompt:
    return Prompt(name, system, first, following, answer, stop, [PICTURE], {"describe": "Describe the picture."})


# llava/conversation.py. `first` opens the dialogue, `following` later turns, `answer` closes the assistant's turn.
_TURN = "USER: {text} ASSISTANT:"
PROMPTS: dict[str, Prompt] = {
    prompt.name: prompt
    for prompt in (
        _prompt("vicuna_v1", _SYSTEM.format("user"), "{system} " + _TURN, _TURN, " {text}</s>", ["</s>"]),
        _prompt("llava_v1", _SYSTEM.format("human"), "{system} " + _TURN, _TURN, " {text}</s>", ["</s>"]),
        _prompt("vicuna_v1_no_system", "", _TURN, " " + _TURN, " {text}</s>", ["</s>"]),
        _prompt(
            "llava_v0",
            _SYSTEM.format("human"),
            "{system}###Human: {text}###Assistant:",
            "Human: {text}###Assistant:",
            " {text}###",
            ["###"],
        ),
        _prompt(
            "llava_llama_2",
            _LLAMA_2,
            "[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{text} [/INST]",
            "<s>[INST] {text} [/INST]",
            " {text} </s>",
            ["</s>"],
        ),
        _prompt(
            "chatml_smollm",
            _SMOLLM,
            "<|im_start|>system\n{system}<|im_end|>\n" + _CHATML,
            "\n" + _CHATML,
            "{text}<|im_end|>",
            ["<|im_end|>"],
        ),
        _prompt("plain", "", "{text}", "{text}", "{text}\n", ["\n"]),
    )
}
