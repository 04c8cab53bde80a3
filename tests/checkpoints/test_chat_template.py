"""Chat templates of checkpoints as prompts: what a bundle renders is what transformers renders."""

import json
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from mllm_edge.checkpoints.chat_template import ChatTemplate, find_chat_template, prompt_of_template
from mllm_edge.errors import BadInput
from mllm_edge.export.gguf.chat_template import chat_template
from mllm_edge.models.llava.prompts import PICTURE, PROMPTS

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
MARKED = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# llava-hf/llava-1.5-7b-hf writes its turns so
PORT = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
WITH_DEFAULT = "{% if messages[0]['role'] != 'system' %}<|start|>system\nBe {kind}.<|end|>\n{% endif %}" + MARKED


def derived(text: str, adds_bos: bool = True):
    template = ChatTemplate(text, Path("chat_template.jinja"))
    return prompt_of_template(template, TOKENS, PICTURE, PROMPTS.values(), adds_bos)


def dialogue(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("text", [MARKED, WITH_DEFAULT, "{{ bos_token }}" + MARKED])
def test_an_unknown_template_becomes_a_prompt_of_its_own(text: str) -> None:
    prompt = derived(text)
    words = ("Is {this} red?", "It is.", "Why?")
    expected, _ = render_jinja_template([dialogue(*words)], chat_template=text, add_generation_prompt=True, **TOKENS)
    measured = prompt.first.format(system=prompt.system, text=words[0])
    measured += prompt.answer.format(text=words[1]) + prompt.next.format(text=words[2])
    assert measured == expected[0].removeprefix("<s>")
    assert (prompt.name, prompt.stop) == ("checkpoint", ["<|end|>"])
    assert prompt.system == ("Be {kind}." if text == WITH_DEFAULT else "")


def test_bos_stays_where_the_tokenizer_does_not_write_it() -> None:
    assert derived("{{ bos_token }}" + MARKED, adds_bos=False).first.startswith("<s><|start|>user")


def test_known_prompts_are_recognized_by_what_they_render() -> None:
    assert derived(PORT) is PROMPTS["vicuna_v1_no_system"]
    for name, prompt in PROMPTS.items():
        if name not in ("llava_v0", "plain"):
            assert derived(chat_template(prompt)) is prompt, name


def test_the_gguf_has_the_same_dialogue_in_jinja() -> None:
    for prompt in PROMPTS.values():
        words = ('What\'s "this"?\n', "A {cube}", "Why?")
        messages = dialogue(*words)
        measured, _ = render_jinja_template([messages], chat_template=chat_template(prompt), add_generation_prompt=True)
        expected = prompt.first.format(system=prompt.system, text=words[0])
        assert measured[0] == expected + prompt.answer.format(text=words[1]) + prompt.next.format(text=words[2])
        own = [{"role": "system", "content": "S"}, *messages[:1]]
        told, _ = render_jinja_template([own], chat_template=chat_template(prompt))
        assert told[0] == prompt.first.format(system="S", text=words[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}", "changes earlier turns"),
        ("{% for m in messages %}{{ m.content", "cannot be rendered"),
        ("{{ raise_exception('only in pairs') }}", "only in pairs"),
        ("hello", "does not write the messages"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not come to an end"),
    ],
)
def test_what_no_prompt_can_say_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=rf"chat_template\.jinja .*{message}.*--template"):
        derived(text)


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert find_chat_template(tmp_path) is None
    several = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    for name, value in (("tokenizer_config.json", several), ("chat_template.json", "j")):
        (tmp_path / name).write_text(json.dumps({"chat_template": value}))
        found = find_chat_template(tmp_path)
        assert found == ChatTemplate("d" if value is several else "j", tmp_path / name)
    (tmp_path / "chat_template.jinja").write_text("x")
    assert find_chat_template(tmp_path) == ChatTemplate("x", tmp_path / "chat_template.jinja")
    (tmp_path / "chat_template.jinja").write_text("x" * 200_000)
    with pytest.raises(BadInput, match="no text of usual length"):
        find_chat_template(tmp_path)
