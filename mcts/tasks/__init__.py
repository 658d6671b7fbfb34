"""Kinds of problems. A task is found by its registered name or by a dotted path to a class of the user's own."""

from __future__ import annotations

from typing import cast

from mcts.registry import load
from mcts.tasks.base import Example, Task, TaskError, TaskSettingError

__all__ = ["TASKS", "Example", "Task", "TaskError", "TaskSettingError", "load_task", "task_files"]

TASKS: dict[str, str] = {
    "choice": "mcts.tasks.choice.Choice",
    "countdown": "mcts.tasks.countdown.Countdown",
    "game24": "mcts.tasks.game24.Game24",
    "gsm8k": "mcts.tasks.gsm8k.Gsm8k",
    "jsonl": "mcts.tasks.jsonl.Jsonl",
    "math": "mcts.tasks.math.Math",
    "program": "mcts.tasks.program.Program",
}
"""Registered name -> dotted path of the class (or function) that makes the task from its settings."""


def load_task(name: str, **settings: object) -> Task:
    """Make a task from its name in `TASKS`, or from `package.module.Class`.

    Raises TaskSettingError in one sentence: no such task or setting (naming the nearest one), a setting that is
    missing, or one that the task refuses.
    """
    return cast(Task, load("task", name, TASKS, settings, TaskSettingError, "problems"))


def task_files(task: Task) -> tuple[str, ...]:
    """The files and folders that a task reads its problems from: its `files`, where it has them."""
    files = getattr(task, "files", ())
    return tuple(str(file) for file in files) if isinstance(files, list | tuple) else ()
