"""A bundle's prompt as a Jinja chat template, for other tools that read the GGUF file."""

from __future__ import annotations

import json
import string

from mllm_edge.bundle.manifest import Prompt

_TEMPLATE = """\
{{%- set now = namespace(system={system}, text='', first=true) -%}}
{{%- for message in messages -%}}
{{%- if message['content'] is string -%}}
{{%- set now.text = message['content'] -%}}
{{%- else -%}}
{{%- set now.text = '' -%}}
{{%- for part in message['content'] -%}}
{{%- set now.text = now.text + (part['text'] if part['type'] == 'text' else {picture}) -%}}
{{%- endfor -%}}
{{%- endif -%}}
{{%- if message['role'] == 'system' -%}}
{{%- set now.system = now.text -%}}
{{%- elif message['role'] == 'user' -%}}
{{{{- {first} if now.first else {next} -}}}}
{{%- set now.first = false -%}}
{{%- else -%}}
{{{{- {answer} -}}}}
{{%- endif -%}}
{{%- endfor -%}}"""


def chat_template(prompt: Prompt) -> str:
    """The prompt in Jinja; BOS is left to the tokenizer, as in the bundle. A part of a message that is no text stands
    for a picture."""
    pictures = prompt.slots_of("pixels")
    return _TEMPLATE.format(
        system=_literal(prompt.system),
        picture=_literal(pictures[0].joint if pictures else ""),
        first=_expression(prompt.first),
        next=_expression(prompt.next),
        answer=_expression(prompt.answer),
    )


def _expression(text: str) -> str:
    """A text with fields as a sum of Jinja's strings; fields that other tools do not know are empty."""
    values = {"text": "now.text", "system": "now.system"}
    terms = []
    for literal, field, _, _ in string.Formatter().parse(text):
        terms += [_literal(literal)] if literal else []
        terms += [values[field]] if field in values else []
    return f"({' + '.join(terms)})" if terms else "''"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
