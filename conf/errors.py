"""The one family of errors that is the user's to mend. A command prints their text without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something outside the program is wrong: a setting, a file, a disk. The text names it and the way out."""


class ConfigError(UserError):
    """Everything that is wrong with a configuration, collected: one problem a line."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = tuple(problems)
        head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"the configuration has {head}:", *(f"  - {text}" for text in problems)]))
