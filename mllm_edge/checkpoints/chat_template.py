"""Chat templates of checkpoints, turned into a bundle's prompt by rendering dialogues and looking where words stand."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from mllm_edge.bundle.manifest import Prompt, Slot
from mllm_edge.bundle.read import read_text
from mllm_edge.checkpoints.tensors import read_json
from mllm_edge.errors import BadInput, first_line

ADVICE = "choose one with --template"
OWN = "checkpoint"  # the name of a prompt that is none of the known ones
_MOST_CHARACTERS = 100_000
_MOST_STEPS = 200_000  # lines of a template that run: one may loop for ever
_QUESTIONS, _ANSWERS, _SYSTEM = ("Question-1", "Question-2", "Question-3"), ("Answer-1", "Answer-2"), "System-0"


@dataclass(frozen=True)
class ChatTemplate:
    """A template's text and the file that it stands in."""

    text: str
    file: Path


def find_chat_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a checkpoint's folder, or None. Raises BadInput where a file cannot be read."""
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        return _checked(read_text(plain), plain)
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            text = read_json(folder / name).get("chat_template")
            if isinstance(text, list):  # several by name
                named = {one.get("name"): one.get("template") for one in text if isinstance(one, dict)}
                text = named.get("default")
            if text:
                return _checked(text, folder / name)
    return None


def prompt_of_template(
    template: ChatTemplate, tokens: dict[str, str], picture: Slot, known: Iterable[Prompt], adds_bos: bool
) -> Prompt:
    """The prompt that renders every dialogue as the template does: one of `known` where one does, or a new one.

    Args:
        template: the checkpoint's.
        tokens: the texts of its special tokens (bos_token, eos_token), which templates use.
        picture: the slot of pictures.
        known: prompts to compare with; an end token after an answer may be lacking in the template.
        adds_bos: whether the tokenizer opens a prompt with BOS itself.

    Raises:
        BadInput: the template cannot be rendered, or treats turns so differently that a prompt cannot describe it.
    """
    try:
        own = _derived(template, tokens, picture)
    except _NoPrompt as error:
        raise BadInput(f"{template.file} has a chat template that {error}; {ADVICE}") from None
    bos, eos = tokens.get("bos_token", ""), tokens.get("eos_token", "")
    if bos and adds_bos:
        own = replace(own, first=own.first.removeprefix(_literal(bos)))
    for prompt in known:
        if _dialogue(own) in (_dialogue(prompt), _dialogue(prompt).replace(eos, "") if eos else ""):
            return prompt
    return own


class _NoPrompt(Exception):
    """Why a template is no prompt."""


def _derived(template: ChatTemplate, tokens: dict[str, str], picture: Slot) -> Prompt:
    def render(turns: list[tuple[str, str]], answering: bool = True, pictured: bool = False) -> str:
        return _rendered(template.text, turns, tokens, answering, pictured)

    asked, answered = [("user", text) for text in _QUESTIONS], [("assistant", text) for text in _ANSWERS]
    opening = render(asked[:1])
    told = render([asked[0], answered[0]], answering=False)
    again = render([asked[0], answered[0], asked[1]])
    if not again.startswith(told) or not told.startswith(opening):
        raise _NoPrompt("changes earlier turns when later ones come")
    before, closing = _around(told[len(opening) :], _ANSWERS[0])
    first = _fielded(opening, _QUESTIONS[0], "text")
    following = _fielded(again[len(told) :], _QUESTIONS[1], "text")
    system = ""
    try:
        with_system = _fielded(render([("system", _SYSTEM), asked[0]]), _QUESTIONS[0], "text")
        head, tail = _around(with_system, _SYSTEM)
    except _NoPrompt:
        head, tail = "", ""  # it knows no system's words
    if head + tail and first.startswith(head) and first.endswith(tail) and len(first) > len(head + tail):
        system = first[len(head) : len(first) - len(tail)].replace("{{", "{").replace("}}", "}")
        first = f"{head}{{system}}{tail}"
    end = closing.strip() or tokens.get("eos_token", "")
    try:
        seen = render(asked[:1], pictured=True)
        start = opening[: opening.index(_QUESTIONS[0])]
        joint = seen[len(start) : seen.index(_QUESTIONS[0])] if seen.startswith(start) else ""
    except (_NoPrompt, ValueError):
        joint = ""
    if picture.placeholder in joint:
        picture = replace(picture, joint=joint)
    answer = f"{_literal(before)}{{text}}{_literal(closing)}"
    prompt = Prompt(OWN, system, first, following, answer, [end] if end else [], [picture])
    if _dialogue(prompt) != render([asked[0], answered[0], asked[1], answered[1], asked[2]]):
        raise _NoPrompt("treats a third turn unlike the second")
    return prompt


def _dialogue(prompt: Prompt) -> str:
    """Three questions with two answers, as the prompt puts them."""
    text = prompt.first.format(system=prompt.system, text=_QUESTIONS[0])
    for question, answer in zip(_QUESTIONS[1:], _ANSWERS, strict=True):
        text += prompt.answer.format(text=answer) + prompt.next.format(text=question)
    return text


def _fielded(text: str, word: str, field: str) -> str:
    before, after = _around(text, word)
    return f"{_literal(before)}{{{field}}}{_literal(after)}"


def _around(text: str, word: str) -> tuple[str, str]:
    if text.count(word) != 1:
        raise _NoPrompt("does not write each message once")
    before, _, after = text.partition(word)
    return before, after


def _literal(text: str) -> str:
    """Text as it stands in a prompt, whose braces are fields."""
    return text.replace("{", "{{").replace("}", "}}")


def _rendered(
    template: str, turns: list[tuple[str, str]], tokens: dict[str, str], answering: bool, pictured: bool
) -> str:
    """By transformers' own renderer; messages are lists of parts, or plain text where the template wants that."""
    failure = "does not write the messages"
    for as_parts in (True, False):
        messages = [{"role": role, "content": _content(text, as_parts, pictured)} for role, text in turns]
        try:
            text = _bounded(template, messages, answering, tokens)
        except _NoPrompt as error:
            failure = str(error)
            continue
        if all(text.count(words) == 1 for _, words in turns) and "'type':" not in text:
            return text
    raise _NoPrompt(failure)


def _content(text: str, as_parts: bool, pictured: bool) -> Any:
    if as_parts:
        return [*([{"type": "image"}] if pictured else []), {"type": "text", "text": text}]
    return text


def _bounded(template: str, messages: list[dict[str, Any]], answering: bool, tokens: dict[str, str]) -> str:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    render: Any = render_jinja_template  # declared narrower than it is
    steps = 0

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal steps
        steps += 1
        if steps > _MOST_STEPS:
            raise _NoPrompt("does not come to an end")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        texts, _ = render([messages], chat_template=template, add_generation_prompt=answering, **tokens)
    except (
        TemplateError,
        TypeError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as e:
        raise _NoPrompt(f"cannot be rendered ({first_line(e)})") from None
    finally:
        sys.settrace(before)
    return str(texts[0])


def _checked(text: object, file: Path) -> ChatTemplate:
    if not isinstance(text, str) or len(text) > _MOST_CHARACTERS:
        raise BadInput(f"{file} has a chat template that is no text of usual length; {ADVICE}")
    return ChatTemplate(text, file)
