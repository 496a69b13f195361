"""The tasks that lm-eval knows, and what is wrong with one of them, as one line."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.registry import get_metric, metric_registry
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from conf.errors import UserError
from data_pipeline.task_config import TaskConfig

SHOWN_CHARACTERS = 300


class Tasks(TaskManager):
    """lm-eval's tasks, of which one that cannot be loaded is told by name and file."""

    def load(self, task_list: Sequence[Any]) -> dict[str, Any]:
        """As lm-eval's own: tasks and groups by name. Raises UserError for one that is damaged."""
        every = [one for name in task_list for one in self._loaded(name)]
        try:
            found = super().load(every)
        except ValueError as error:  # a task that is asked for both by its name and with its group
            raise fault(f"task.tasks={', '.join(task_list)}", error) from error
        self.loaded: dict[str, Task] = found["tasks"]
        return found

    def _loaded(self, name: str) -> list[Any]:
        """The task or group of this name, or the tasks of this tag."""
        path = self.task_index[name].yaml_path
        what = f"task.tasks={name}" + (f" ({path})" if path else "")
        if unknown := self._unknown_metrics(name):
            known = ", ".join(sorted(metric_registry))
            raise UserError(f"{what}: metric {', '.join(unknown)}: not known to lm-eval; it has {known}")
        try:
            found = super().load([name])
        # A task is a program: its templates, functions and data sets raise whatever they like.
        except Exception as error:
            raise fault(what, error) from error
        group = found.get("groups", {}).get(name)
        return [group] if group is not None else list(found["tasks"].values())

    def _unknown_metrics(self, name: str) -> list[str]:
        """Metrics of a task, or of the tasks of a group or tag, that lm-eval takes in silence and then calls None."""
        entry = self.task_index.get(name)
        config = (entry.cfg if entry else None) or {}
        children = config.get("task", []) if "group" in config else entry.tags if entry and not config else []
        parts = [child for child in children if isinstance(child, str)]
        found = [metric for part in parts for metric in self._unknown_metrics(part)]
        if "process_results" in config:  # such a function makes figures of any name
            return found
        listed = [one.get("metric") for one in config.get("metric_list") or [] if isinstance(one, dict)]
        names = [one for one in listed if isinstance(one, str) and "/" not in one]  # a function is named by its file
        return found + [one for one in names if one not in metric_registry and get_metric(one) is None]


def known_tasks(task: TaskConfig) -> Tasks:
    """Read the names of all tasks. Raises UserError where one that is asked for is not among them."""
    if task.include is not None and not Path(task.include).is_dir():
        raise UserError(f"task.include={task.include}: no such folder; give the one that holds your task files (*.yaml)")
    tasks = Tasks(include_path=task.include, include_defaults=task.own_tasks)
    if unknown := sorted(set(task.tasks) - set(tasks.all_tasks)):
        told = [f"task.tasks={', '.join(unknown)}: no such task", *_damaged(task.include)]
        names = tasks.all_tasks
        if names:
            told.append(f"there are {len(names):,}: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}")
        else:
            told.append(f"{task.include} holds no file (*.yaml) that names a task and can be read")
        raise UserError("; ".join(told))
    return tasks


def _damaged(include: str | None) -> list[str]:
    """The files that lm-eval passes over in silence, with the reason."""
    told = []
    for path in sorted(Path(include).glob("**/*.yaml")) if include is not None else []:
        try:
            load_yaml(path, resolve_func=False)
        # What is wrong may be the file's letters, its YAML, or another file that it includes.
        except Exception as error:
            told.append(f"{path} cannot be read ({_words(error)})")
    return told


def fault(what: str, error: Exception) -> UserError:
    """The error of a task, with its cause and a way out."""
    if isinstance(error, FileNotFoundError | ConnectionError):
        way_out = (
            "lm-eval's own tasks fetch their data from the hub, files of your own are named in the task by "
            "dataset_kwargs.data_files"
        )
        return UserError(f"{what}: its data cannot be read ({_words(error)}); {way_out}")
    return UserError(f"{what}: lm-eval cannot run it ({_words(error)}); mend the task's file, its data or its functions")


def is_ours(error: Exception) -> bool:
    """Whether it comes from our model and not from lm-eval or a task; the caller's own frame, the first, does not count."""
    inner = list(traceback.walk_tb(error.__traceback__))[1:]
    return isinstance(error, UserError) or any(frame.f_globals.get("__name__", "").startswith("train.") for frame, _ in inner)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:SHOWN_CHARACTERS]
