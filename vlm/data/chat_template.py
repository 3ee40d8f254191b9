"""A template of conversations as the Jinja that transformers' `apply_chat_template` runs.

Messages are a role ("system", "user", "assistant") and a content: a string, or parts of type "text" and "image".
"""

import json
import re

from vlm.data.template import Template

_CONTROL = re.compile(r"(\{bos\}|\{eos\})")
_FIELDS = re.compile(r"(\{image\}|\{text\})")
# Of a message: how many images it has, and its words.
_SEEN = (
    "{%- if message.content is string -%}{%- set images = 0 -%}{%- set text = message.content | trim -%}{%- else -%}"
    "{%- set images = message.content | selectattr('type', 'equalto', 'image') | list | length -%}"
    "{%- set said = message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') -%}"
    "{%- set text = said | join('') | trim -%}"
    "{%- endif -%}"
)


def chat_template(template: Template, image: str) -> str:
    """`image`: the token that stands where an image is. What is rendered are our texts, answers without their space."""
    answer = template.answer.removesuffix("{text}")
    before, after = template.image.split("{image}")
    shown = _literal(before) + image + _literal(after)
    spread = (
        "{%- for part in message.content -%}{%- if part.type == 'image' -%}" + shown + "{%- elif loop.first -%}"
        "{{ part.text.lstrip() if not loop.last else part.text.strip() }}{%- else -%}"
        "{{ part.text if not loop.last else part.text.rstrip() }}{%- endif -%}{%- endfor -%}"
    )
    return (
        _literal(template.start)
        + _system(template)
        + "{%- for message in messages -%}{%- if message.role == 'user' -%}"
        + _SEEN
        + _user(template, shown, spread)
        + "{%- elif message.role == 'assistant' -%}"
        + _SEEN
        + _literal(answer)
        + "{{ text }}"
        + _literal(template.end)
        + "{%- if not loop.last -%}"
        + _literal(template.after)
        + "{%- endif -%}{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}"
        + _literal(answer.rstrip(" "))
        + "{%- endif -%}"
    )


def _literal(text: str) -> str:
    """Words of the template, in which control tokens have names."""
    names = {"{bos}": "{{ bos_token }}", "{eos}": "{{ eos_token }}"}
    return "".join(names.get(part, "{{ " + json.dumps(part) + " }}") for part in _CONTROL.split(text) if part)


def _system(template: Template) -> str:
    if not template.system:
        return ""
    before, after = (_literal(part) for part in template.system.split("{system}"))
    own = before + _literal(template.default_system) + after if template.default_system else ""
    said = (
        before + "{{ messages[0].content if messages[0].content is string else messages[0].content[0].text }}" + after
    )
    return "{%- if messages[0].role == 'system' -%}" + said + "{%- else -%}" + own + "{%- endif -%}"


def _user(template: Template, shown: str, spread: str) -> str:
    """A question: its images together where the template has a place for them, or where its words have them."""
    last = "not loop.last or text" if "{text}" in template.user else "not loop.last"
    gap = "{%- if " + last + " -%}" + _literal(template.gap) + "{%- endif -%}" if template.gap else ""
    together = "{%- for _ in range(images) -%}" + shown + gap + "{%- endfor -%}"
    gathered = {"{image}": together, "{text}": "{{ text }}"}
    words = "{%- if message.content is string -%}{{ text }}{%- else -%}" + spread + "{%- endif -%}"
    apart = {"{image}": "", "{text}": words}
    parts = [part for part in _FIELDS.split(template.user) if part]

    def written(fields: dict[str, str]) -> str:
        return "".join(fields.get(part, _literal(part)) for part in parts)

    if "{image}" not in template.user:
        return written(apart)
    if not template.interleaved or "{text}" not in template.user:
        return written(gathered)
    return "{%- if images > 1 -%}" + written(apart) + "{%- else -%}" + written(gathered) + "{%- endif -%}"
