"""Dialogues under a model that knows turns: what it reads of each, which is all before the last answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from conf.errors import UserError
from data_pipeline.chat import all_text
from data_pipeline.records import BadRow
from data_pipeline.tasks import Row
from train.inference.chat import ChatFormat


def with_prompts(rows: Sequence[Row], form: ChatFormat) -> list[Row]:
    """The dialogues with their prompts, as the model's own template writes them: those that a run has kept have a prompt in
    the form of that run, which another model has not learned.

    Raises UserError for one that has no turns, that the template does not take, or that spells a special token.
    """
    return [replace(row, prompt=_prompt(row, form)) for row in rows]


def _prompt(row: Row, form: ChatFormat) -> str:
    messages = row.messages
    if not messages:
        raise UserError(f"{row.id}: has no turns, as it was kept as a prompt and an answer; give rows of task=dialogue")
    if form.system is not None and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": form.system}, *messages)
    if token := form.forged(all_text(messages, row.tools)):
        raise UserError(f"{row.id}: spells the special token {token}, which would begin or end a turn; mend the row")
    last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
    try:
        return form.template.render(messages[:last], tools=row.tools, generation_prompt=True)
    except BadRow as bad:
        raise UserError(f"{row.id}: {bad}") from None
