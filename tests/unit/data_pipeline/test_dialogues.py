"""Dialogues out of every form that people keep them in; and what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.records import BadRow, Fault
from data_pipeline.tasks import Row, labelled_rows
from tests.unit.data_pipeline.labelled import chat, json_lines, task_of

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}


def row_of(path: Path, values: object, **changes: object) -> Row | BadRow:
    task = task_of("dialogue", json_lines(path / "a.jsonl", values), **changes)
    (row,) = labelled_rows(task, task.data[0])
    return row


def share(*turns: tuple[str, str], **more: object) -> dict[str, object]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **more}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"instruction": "add", "input": "1 1", "output": "2"}, chat("add\n1 1", "2")),
        ({"instruction": "add", "input": "", "output": "2"}, chat("add", "2")),
        ({"instruction": "add", "context": "1 1", "response": "2"}, chat("add\n1 1", "2")),
        ({"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}, chat("a", "b", "c", "d", system="s")),
        (share(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")), chat("a", "b", "c", "d")),
        (share(("user", "a"), ("assistant", "b"), system="s"), chat("a", "b", system="s")),
        (share(("system", "s"), ("human", "a"), ("gpt", "b"), system="other"), chat("a", "b", system="s")),
        ({"conversations": chat("a", "b")}, chat("a", "b")),
        ({"messages": chat("a", "b", system="s"), "prompt_id": 3, "prompt": "a"}, chat("a", "b", system="s")),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, *chat("a", "b")[1:]]}, chat("a", "b")),
        ({"prompt": "a", "completion": "b"}, chat("a", "b")),
        ({"prompt": "a", "response": "b", "system": "s"}, chat("a", "b", system="s")),
        ({"prompt": chat("a"), "completion": [{"role": "assistant", "content": "b"}]}, chat("a", "b")),
        (
            share(("human", "a"), ("function_call", json.dumps({"name": "add", "arguments": {"a": 1}})), ("observation", "1"),
                  ("gpt", "b")),
            [
                {"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "1"}, {"role": "assistant", "content": "b"},
            ],
        ),
        (
            {"messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]},
            ]},
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        ),
    ],
)  # fmt: skip
def test_forms(tmp_path: Path, values: object, expected: list[object]) -> None:
    row = row_of(tmp_path, values)
    assert isinstance(row, Row), row
    assert list(row.messages) == expected
    assert (row.id, row.source, row.truths) == ("a.jsonl:1", "a.jsonl", (expected[-1]["content"],))  # type: ignore[index]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools(tmp_path: Path, tools: object) -> None:
    row = row_of(tmp_path, {"messages": chat("a", "b"), "tools": tools})
    assert isinstance(row, Row) and row.tools == (TOOL,)


@pytest.mark.parametrize("tools", [None, "", [], " "])
def test_no_tools(tmp_path: Path, tools: object) -> None:
    row = row_of(tmp_path, share(("human", "a"), ("gpt", "b"), tools=tools))
    assert isinstance(row, Row) and row.tools == ()


def test_columns_under_other_names(tmp_path: Path) -> None:
    fields = {"instruction": "q.text", "output": "reply"}
    row = row_of(tmp_path, {"q": {"text": "a"}, "reply": "b"}, fields=fields)
    assert isinstance(row, Row) and list(row.messages) == chat("a", "b")


def test_a_list_in_a_table(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("messages\n" + json.dumps(chat("a", "b")) + "\n")
    task = task_of("dialogue", path)
    (row,) = labelled_rows(task, task.data[0])
    assert isinstance(row, Row) and list(row.messages) == chat("a", "b")


@pytest.mark.parametrize(
    ("values", "fault", "expected"),
    [
        ({"instruction": "a", "output": ""}, Fault.EMPTY, "an answer of the assistant is empty"),
        ({"instruction": "a", "output": " \n"}, Fault.EMPTY, "an answer of the assistant is empty"),
        ({"instruction": "a", "output": None}, Fault.EMPTY, "output is null"),
        ({"instruction": "a", "output": 3}, Fault.VALUE, "output holds int, not text"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, Fault.VALUE, "pairs of an instruction and its answer"),
        ({"messages": []}, Fault.EMPTY, "messages holds no turn"),
        ({"messages": chat("a")}, Fault.EMPTY, "holds no turn of the assistant"),
        ({"messages": chat("a", "b", "c", "")}, Fault.EMPTY, "an answer of the assistant is empty"),
        ({"messages": "text"}, Fault.VALUE, "messages holds str, not a list"),
        ({"messages": [{"content": "a"}]}, Fault.VALUE, "a turn without a role"),
        ({"messages": [{"role": "user", "content": 3}, *chat("a", "b")]}, Fault.VALUE, "holds int, not text"),
        ({"messages": [{"role": "user", "content": None}, *chat("a", "b")]}, Fault.EMPTY, "is null"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, Fault.VALUE, "holds list, not text"),
        (share(("robot", "a")), Fault.VALUE, "a turn from 'robot'; there are human"),
        ({"conversations": [{"from": "human"}]}, Fault.VALUE, "a turn without from and value"),
        (share(("human", "a"), ("function_call", "{")), Fault.VALUE, "a function_call is not JSON"),
        (share(("human", "a"), ("function_call", "{}")), Fault.VALUE, "a call of a function has no name"),
        (share(("human", "a"), ("gpt", "b"), tools="["), Fault.VALUE, "tools is not JSON"),
        (share(("human", "a"), ("gpt", "b"), tools='{"a": 1}'), Fault.VALUE, "tools holds no list of functions"),
        ({"instruction": "a", "output": "\ud800"}, Fault.ENCODING, "half of a surrogate pair"),
    ],
)
def test_what_is_wrong(tmp_path: Path, values: object, fault: Fault, expected: str) -> None:
    bad = row_of(tmp_path, values)
    assert isinstance(bad, BadRow) and bad.fault == fault
    assert str(bad).startswith("a.jsonl:1: ") and expected in str(bad)


def test_a_row_without_the_columns_of_the_first(tmp_path: Path) -> None:
    task = task_of("dialogue", json_lines(tmp_path / "a.jsonl", {"instruction": "a", "output": "b"}, {"instruction": "a"}))
    _, bad = labelled_rows(task, task.data[0])
    assert isinstance(bad, BadRow) and bad.fault == Fault.COLUMN
    assert str(bad) == "a.jsonl:2: output is no column; there are instruction"
