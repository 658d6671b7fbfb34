"""Kinds of problems. A task is found by its registered name or by a dotted path to a class of the user's own."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable
from typing import cast

from mcts.tasks.base import Example, Task, TaskError, TaskSettingError

__all__ = ["TASKS", "Example", "Task", "TaskError", "TaskSettingError", "load_task"]

TASKS: dict[str, str] = {
    "countdown": "mcts.tasks.countdown.Countdown",
    "game24": "mcts.tasks.game24.Game24",
    "program": "mcts.tasks.program.Program",
}
"""Registered name -> dotted path of the class (or function) that makes the task from its settings."""


def load_task(name: str, **settings: object) -> Task:
    """Make a task from its name in `TASKS`, or from `package.module.Class`.

    Raises TaskSettingError in one sentence: no such task or setting (naming the nearest one), a setting that is
    missing, or one that the task refuses.
    """
    path = TASKS.get(name, name)
    module_name, dot, attribute = path.rpartition(".")
    if not dot or path.startswith("."):
        raise TaskSettingError(f"there is no task {name!r}{_nearest(name, TASKS)}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the task's module exists, one that it imports does not
        raise TaskSettingError(f"task {name!r}: there is no module {error.name!r} to import") from error
    maker = getattr(module, attribute, None)
    if not callable(maker):
        near = _nearest(attribute, [key for key, value in vars(module).items() if callable(value)])
        raise TaskSettingError(f"task {name!r}: module {module_name!r} has no class {attribute!r}{near}")
    _check_settings(name, inspect.signature(maker), settings)
    return cast(Task, maker(**settings))


def _check_settings(name: str, signature: inspect.Signature, settings: dict[str, object]) -> None:
    parameters = signature.parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in settings:
            if key not in named:
                raise TaskSettingError(f"task {name!r} has no setting {key!r}{_nearest(key, named)}")
    for p in parameters:
        if p.name in named and p.default is p.empty and p.name not in settings:
            raise TaskSettingError(f"task {name!r} needs the setting {p.name!r}")


def _nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that names the nearest known word, or all of them where none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f": did you mean {near[0]!r}?"
    return f": choose one of {', '.join(known)}" if known else ""
