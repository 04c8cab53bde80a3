"""Which conversation a checkpoint was trained with: a declared one, its chat template, or its generation's usual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mllm_edge.bundle.manifest import Prompt
from mllm_edge.checkpoints.chat_template import ADVICE, find_chat_template, prompt_of_template
from mllm_edge.checkpoints.tokenizer import read_tokenizer
from mllm_edge.errors import BadInput
from mllm_edge.models.llava.prompts import MARKS, PICTURE, PROMPTS

DECLARED = ("conv_mode", "conv_template", "conversation_template")  # fields of a config.json that name one of PROMPTS


def choose_prompt(
    folders: Sequence[Path], config: dict[str, Any], usual: str, why: str, tokenizer: Path
) -> tuple[Prompt, str]:
    """The prompt of a checkpoint, and where it was read.

    Args:
        folders: of the checkpoint, then of its base.
        config: its config.json.
        usual: the name of the prompt where nothing is said, and
        why: that choice's reason.
        tokenizer: the folder of the tokenizer.

    Raises:
        BadInput: a declared conversation that is not known, or a chat template that cannot be followed.
    """
    for key in DECLARED:
        if name := config.get(key):
            if name not in PROMPTS:
                raise BadInput(f"{folders[0]}/config.json has {key} {name!r}, which is not known; {ADVICE}")
            return PROMPTS[name], f"{key} of config.json"
    for folder in folders:
        if template := find_chat_template(folder):
            vocabulary = read_tokenizer(tokenizer)
            texts = {f"{role}_token": vocabulary.tokens[number] for role, number in vocabulary.special.items()}
            prompt = prompt_of_template(template, texts, PICTURE, PROMPTS.values(), vocabulary.add_bos)
            prompt = replace(prompt, questions=PROMPTS[usual].questions)
            return prompt, f"the chat template in {template.file.name}"
    return PROMPTS[usual], why


def marked(prompt: Prompt) -> Prompt:
    """The prompt with each picture between <im_start> and <im_end> (mm_use_im_start_end)."""
    start, end = MARKS
    slots = [replace(slot, open=start, close=end) if slot.of == "pixels" else slot for slot in prompt.slots]
    return replace(prompt, slots=slots)
