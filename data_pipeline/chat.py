"""Chat templates: dialogues as text, and where in it the assistant speaks. transformers renders them, in its sandbox."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data_pipeline.dialogues import Message
from data_pipeline.io import read_json
from data_pipeline.records import BadRow, Fault
from data_pipeline.tokenizer import Tokenizer

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
Span = tuple[int, int]

# What functions there are and which are called, as JSON in the text; what all built-in templates share.
_TOOLS = """\
{%- if tools %}{% set told = '\\n\\nFunctions:\\n' ~ (tools | tojson) %}{% else %}{% set told = '' %}{% endif %}
{%- if tools and messages[0]['role'] != 'system' %}{{- opened('system') ~ (told | trim) ~ closed }}{% endif %}
{%- for message in messages %}
{%- set told_here = told if loop.first and message['role'] == 'system' else '' %}
{%- set said = message['content'] ~ told_here %}
{%- if message['tool_calls'] %}{% set said = said ~ ('\\n' if said else '') ~ 'Call: ' ~ (message['tool_calls'] | map(attribute='function') | list | tojson) %}{% endif %}
"""  # noqa: E501


def _built_in(opened: str, closed: str, answered: str) -> str:
    """A template: `opened` is jinja for what stands before a turn of `role`, the others end a turn and an answer."""
    parts = f"{{%- macro opened(role) %}}{opened}{{% endmacro %}}{{%- set closed = {closed} %}}"
    answer = f"{{%- generation %}}{{{{- said ~ {answered} }}}}{{%- endgeneration %}}{{{{- '\\n' }}}}"
    turn = (
        f"{{%- if message['role'] == 'assistant' %}}{{{{- opened('assistant') }}}}{answer}"
        "{%- else %}{{- opened(message['role']) ~ said ~ closed }}{%- endif %}"
    )
    asked = "{%- if add_generation_prompt %}{{- opened('assistant') }}{%- endif %}"
    return f"{parts}{_TOOLS.rstrip()}{turn}{{%- endfor %}}{asked}"


BUILT_IN = {
    "chatml": _built_in("{{- '<|im_start|>' ~ role ~ '\\n' }}", "'<|im_end|>\\n'", "'<|im_end|>'"),
    # Words that any tokenizer has; an answer ends with the one token that ends all that the model writes.
    "plain": _built_in("{{- '### ' ~ role ~ '\\n' }}", "'\\n'", "eos_token"),
}


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """How dialogues are written out."""

    text: str
    """The jinja template."""
    name: str
    """Where it is from, for a person."""
    special: Mapping[str, str] = field(default_factory=dict)
    """Tokens that templates name: bos_token, eos_token."""

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = (), generation_prompt: bool = False
    ) -> str:
        """The text of a dialogue. Raises BadRow, without a place, when the template does not take it."""
        return self._rendered(messages, tools, add_generation_prompt=generation_prompt)[0]

    def render_marked(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = (), last_only: bool = False
    ) -> tuple[str, list[Span]]:
        """The text, and the characters of it that each turn of the assistant is, its end mark included.

        The template marks them by {% generation %}; for one that does not, the dialogue is written out up to each turn, which
        must be how the whole begins. Raises BadRow, without a place, where that is not so or the template fails.
        """
        if GENERATION_MARK.search(self.text):
            text, spans = self._rendered(messages, tools, return_assistant_tokens_mask=True)
            return text, spans[-1:] if last_only else spans
        text = self.render(messages, tools=tools)
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        spans = []
        for number in turns[-1:] if last_only else turns:
            before = self.render(messages[:number], tools=tools, generation_prompt=True)
            after = self.render(messages[: number + 1], tools=tools)
            if not (text.startswith(after) and after.startswith(before)):
                raise BadRow(
                    Fault.TEMPLATE,
                    f"{self.name} writes turn {number + 1} otherwise when others follow, so where the assistant speaks is not "
                    "clear; give a template with {% generation %} around its turns, data.targets=last_turn or data.targets=all",
                )
            spans.append((len(before), len(after)))
        return text, spans

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], **settings: bool
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        if "tool_calls" not in self.text and any(message.get("tool_calls") for message in messages):
            raise BadRow(Fault.TEMPLATE, f"{self.name} knows no tool_calls, so it would leave out what the assistant calls")
        if tools and "tools" not in self.text:
            raise BadRow(Fault.TEMPLATE, f"{self.name} knows no tools, so it would leave them out")
        try:
            texts, spans = render_jinja_template(
                [list(messages)], tools=list(tools) or None, chat_template=self.text, **settings, **self.special
            )
        except Exception as error:  # noqa: BLE001  (a template is a program of somebody else's: it fails as it likes)
            words = " ".join(str(error).split())[:200]
            raise BadRow(Fault.TEMPLATE, f"{self.name} does not take it: {words or type(error).__name__}") from None
        return texts[0], [tuple(span) for span in spans[0]] if spans else []


def chat_template(tokenizer: Tokenizer, wanted: str | None) -> ChatTemplate:
    """The template that `wanted` names (see RowsConfig.template).

    Raises UserError for one that is not there, is no template, or whose tokens the tokenizer does not have.
    """
    special = special_tokens(tokenizer)
    has_chatml = set(CHATML_TOKENS) <= set(tokenizer.special_texts)
    own = None if wanted is not None else own_template(tokenizer)
    if own is not None:
        return _checked(ChatTemplate(text=own, name=f"the chat template of {tokenizer.folder}", special=special))
    name = wanted or ("chatml" if has_chatml else "plain")
    if name == "chatml" and not has_chatml:
        raise UserError(
            f"data.template=chatml: {tokenizer.folder} lacks the special tokens {' and '.join(CHATML_TOKENS)}; give "
            "data.template=plain"
        )
    if name == "plain" and "eos_token" not in special:
        raise UserError(
            f"data.template={name}: {tokenizer.folder} names no eos_token, so nothing would end an answer; give a template of "
            "your own: data.template=FILE"
        )
    if name in BUILT_IN:
        return ChatTemplate(text=BUILT_IN[name], name=f"the built-in template {name}", special=special)
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(
            f"data.template={name}: cannot be read ({reason}); give a jinja file, or one of {', '.join(BUILT_IN)}"
        ) from None
    return _checked(ChatTemplate(text=text, name=name, special=special))


def _checked(template: ChatTemplate) -> ChatTemplate:
    """A template that is none is told once, and not of every row."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([[]], chat_template=template.text)
    except TemplateSyntaxError as error:
        words = " ".join(str(error).split())[:200]
        raise UserError(f"{template.name}: is no jinja template (line {error.lineno}: {words}); mend it") from None
    except Exception:  # noqa: BLE001, S110  (an empty dialogue need not suit it)
        pass
    return template


def own_template(tokenizer: Tokenizer) -> str | None:
    """The template in a tokenizer's folder, found as transformers finds it: chat_template.jinja, then chat_template.json, then
    tokenizer_config.json; None: it has none."""
    file = tokenizer.folder / "chat_template.jinja"
    if file.is_file():
        return file.read_bytes().decode("utf-8")  # with the ends of lines that it has, as out of JSON
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = tokenizer.folder / name
        found = read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(found, list):  # several by name
            found = {one["name"]: one["template"] for one in found}.get("default")
        if isinstance(found, str) and found:
            return found
    return None


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The texts of the tokens to which a tokenizer's folder gives a role, by role."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = tokenizer.folder / name
        content = read_json(path) if path.is_file() else {}
        for key in SPECIAL_NAMES:
            token = content.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[key] = token
    return found


def spelled_specials(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Finds a special token in text: that of a dialogue must not spell one, or it could forge a turn."""
    texts = [text for text in tokenizer.special_texts if text]
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def all_text(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> str:
    """All that a dialogue brings into its rendering."""
    contents = (str(message["content"]) for message in messages)
    return "\n".join([*contents, json.dumps([list(messages), list(tools)], ensure_ascii=False)])
