"""Dialogues in the forms that people keep them in, as the messages that chat templates take."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.layouts import MISSING, Layout, Values
from data_pipeline.records import BadRow, Fault

Message = dict[str, Any]
"""role, content and, of an assistant that calls functions, tool_calls: JSON, as templates want it."""
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "system": "system",
    "observation": "tool", "tool": "tool", "function_call": "function_call",
}  # fmt: skip


def dialogue_of(layout: Layout, values: Values) -> list[Message]:
    """The messages of a row. Raises BadRow, without a place, for one that is none."""
    parts = _PARTS[layout.name]
    messages = parts(layout, values)
    system = layout.get(values, "system")
    if layout.name != "messages" and system not in (MISSING, None, "") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(system, "system")})
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadRow(Fault.EMPTY, "holds no turn of the assistant, so there is nothing to learn")
    if any(not message["content"].strip() and not message.get("tool_calls") for message in answers):
        raise BadRow(Fault.EMPTY, "an answer of the assistant is empty")
    return messages


def pair_of(layout: Layout, values: Values) -> tuple[list[Message], list[Message], int]:
    """Two dialogues, the preferred one first, and how many turns they begin with alike, which are their prompt.

    Both are given whole, or their answers alone, behind the column `prompt`. Raises BadRow, without a place, where they do
    not begin alike, or no answer is to be told from another.
    """
    pair = [_checked(_list(_needed(layout, values, name), name), name) for name in ("chosen", "rejected")]
    if all(messages[0]["role"] == "assistant" for messages in pair):
        prompt = _needed(layout, values, "prompt")
        asked = _checked(prompt, "prompt") if isinstance(prompt, list) else [_turn("user", prompt, "prompt")]
        pair = [[*asked, *messages] for messages in pair]
    system = layout.get(values, "system")
    if system not in (MISSING, None, ""):
        turn = {"role": "system", "content": _text(system, "system")}
        pair = [messages if messages[0]["role"] == "system" else [turn, *messages] for messages in pair]
    chosen, rejected = pair
    if chosen == rejected:
        raise BadRow(Fault.VALUE, "chosen and rejected are the same, so neither is preferred")
    alike = 0
    while alike < min(len(chosen), len(rejected)) - 1 and chosen[alike] == rejected[alike]:
        alike += 1
    for name, messages in zip(("chosen", "rejected"), pair, strict=True):
        if not alike or messages[alike]["role"] != "assistant":
            raise BadRow(Fault.VALUE, f"{name} does not begin with the other's prompt and then a turn of the assistant")
        if messages[-1]["role"] != "assistant":
            raise BadRow(Fault.VALUE, f"{name} does not end with a turn of the assistant")
        answers = [message for message in messages[alike:] if message["role"] == "assistant"]
        if any(not message["content"].strip() and not message.get("tool_calls") for message in answers):
            raise BadRow(Fault.EMPTY, f"an answer in {name} is empty")
    return chosen, rejected, alike


def text_pair_of(layout: Layout, values: Values, chosen: str, rejected: str) -> tuple[str | None, str, str]:
    """Prompt and two answers, the preferred one first; None for a prompt that is to be made of the row's columns.

    Without such a column the texts are whole, and what they begin with alike, in whole words, is the prompt. Raises BadRow,
    without a place, where no answer is to be told from another.
    """
    prompt = layout.get(values, "prompt")
    if isinstance(prompt, list):
        raise BadRow(Fault.VALUE, "prompt holds messages, chosen and rejected text; give messages for all of them, or text")
    if chosen.strip() == rejected.strip():
        raise BadRow(Fault.VALUE, "chosen and rejected are the same, so neither is preferred")
    asked: str | None = None
    if prompt is MISSING and layout.name:
        alike = os.path.commonprefix([chosen, rejected])
        asked = alike[: max((place.start() for place in re.finditer(r"\s+", alike)), default=0)]
        chosen, rejected = chosen[len(asked) :], rejected[len(asked) :]
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise BadRow(Fault.EMPTY, f"{name} is empty")
    return asked, chosen, rejected


def tools_of(found: Any) -> list[Mapping[str, Any]]:
    """The functions of a row, from a list or its JSON text."""
    if isinstance(found, str) and found.strip():
        try:
            found = json.loads(found)
        except ValueError as error:
            raise BadRow(Fault.VALUE, f"tools is not JSON ({error})") from None
    if found in (MISSING, None, "", []) or (isinstance(found, str) and not found.strip()):
        return []
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise BadRow(Fault.VALUE, "tools holds no list of functions")
    return found


def _alpaca(layout: Layout, values: Values) -> list[Message]:
    messages = []
    for turn in _list(layout.get(values, "history"), "history", optional=True):
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise BadRow(Fault.VALUE, "history holds something else than pairs of an instruction and its answer")
        messages += [_turn("user", turn[0], "history"), _turn("assistant", turn[1], "history")]
    asked = [_text(_needed(layout, values, "instruction"), "instruction")]
    more = layout.get(values, "input")
    if more not in (MISSING, None, ""):
        asked.append(_text(more, "input"))
    answer = _turn("assistant", _needed(layout, values, "output"), "output")
    return [*messages, _turn("user", "\n".join(asked), "instruction"), answer]


def _sharegpt(layout: Layout, values: Values) -> list[Message]:
    turns = _list(_needed(layout, values, "conversations"), "conversations")
    if turns and isinstance(turns[0], Mapping) and "role" in turns[0]:
        return _checked(turns, "conversations")
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping) or not {"from", "value"} <= set(turn):
            raise BadRow(Fault.VALUE, "conversations holds a turn without from and value")
        role = ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise BadRow(Fault.VALUE, f"conversations holds a turn from {turn['from']!r}; there are {', '.join(ROLES)}")
        messages.append(_called(turn["value"]) if role == "function_call" else _turn(role, turn["value"], "conversations"))
    return messages


def _called(value: Any) -> Message:
    """The assistant's call of one function, or of several."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise BadRow(Fault.VALUE, f"a function_call is not JSON ({error})") from None
    calls = found if isinstance(found, list) else [found]
    return {"role": "assistant", "content": "", "tool_calls": [_tool_call(call) for call in calls]}


def _tool_call(call: Any) -> dict[str, Any]:
    """In the form of the chat templates: arguments are an object, not its text, which they would quote once more."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow(Fault.VALUE, "a call of a function has no name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise BadRow(Fault.VALUE, f"the arguments of {function['name']} are not JSON ({error})") from None
    kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**kept, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _messages(layout: Layout, values: Values) -> list[Message]:
    return _checked(_list(_needed(layout, values, "messages"), "messages"), "messages")


def _completion(layout: Layout, values: Values) -> list[Message]:
    prompt, completion = _needed(layout, values, "prompt"), _needed(layout, values, "completion")
    asked = _checked(prompt, "prompt") if isinstance(prompt, list) else [_turn("user", prompt, "prompt")]
    answer = _checked(completion, "completion") if isinstance(completion, list) else None
    return [*asked, *(answer or [_turn("assistant", completion, "completion")])]


def _checked(turns: Sequence[Any], name: str) -> list[Message]:
    """Messages as they are given, in plain form: text for content, objects for arguments, no null among the rest."""
    if not turns:
        raise BadRow(Fault.EMPTY, f"{name} holds no turn")
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise BadRow(Fault.VALUE, f"{name} holds a turn without a role")
        calls = turn.get("tool_calls") or []
        message = {key: value for key, value in turn.items() if value is not None and key != "tool_calls"}
        message["content"] = _content(turn.get("content"), name, may_be_none=bool(calls))
        if calls:
            message["tool_calls"] = [_tool_call(call) for call in _list(calls, "tool_calls")]
        messages.append(message)
    return messages


def _content(found: Any, name: str, *, may_be_none: bool) -> str:
    if found is None and may_be_none:
        return ""
    if isinstance(found, list) and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in found):
        return "".join(part["text"] for part in found)
    return _text(found, f"the content of a turn in {name}")


def _turn(role: str, found: Any, name: str) -> Message:
    return {"role": role, "content": _text(found, name)}


def _text(found: Any, name: str) -> str:
    if found is None:
        raise BadRow(Fault.EMPTY, f"{name} is null")
    if not isinstance(found, str):
        raise BadRow(Fault.VALUE, f"{name} holds {type(found).__name__}, not text")
    return found


def _needed(layout: Layout, values: Values, name: str) -> Any:
    found = layout.get(values, name)
    if found is MISSING:
        raise BadRow(Fault.COLUMN, f"{layout.columns.get(name, name)} is no column")
    return found


def _list(found: Any, name: str, *, optional: bool = False) -> Sequence[Any]:
    if optional and found in (MISSING, None, ""):
        return []
    if isinstance(found, str) and found.lstrip().startswith("["):  # what a CSV makes of a list
        try:
            found = json.loads(found)
        except ValueError as error:
            raise BadRow(Fault.VALUE, f"{name} is not JSON ({error})") from None
    if not isinstance(found, list | tuple):
        raise BadRow(Fault.VALUE, f"{name} holds {type(found).__name__}, not a list")
    return found


_PARTS = {"alpaca": _alpaca, "sharegpt": _sharegpt, "messages": _messages, "prompt and completion": _completion}
