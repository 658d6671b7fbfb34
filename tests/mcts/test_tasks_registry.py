"""Tasks are found by name or dotted path; a wrong name or setting is one sentence that names the nearest."""

from __future__ import annotations

import pytest

from mcts.tasks import TASKS, TaskError, load_task
from mcts.tasks.countdown import Countdown


class Mine:
    """A user's own task, as far as loading goes."""

    name = "mine"

    def __init__(self, size: int, shape: str = "round") -> None:
        self.size, self.shape = size, shape

    def problems(self, split: str) -> list[str]:
        return [split]


FROM_FILES = {"choice", "gsm8k", "jsonl", "math"}
"""Tasks that need a path; they read it when problems are asked for."""


def test_every_registered_task_loads_and_names_itself() -> None:
    assert set(TASKS) >= FROM_FILES
    for name in TASKS:
        assert load_task(name, **({"path": "problems.jsonl"} if name in FROM_FILES else {})).name == name


def test_settings_reach_the_task() -> None:
    task = load_task("countdown", numbers=4)
    assert isinstance(task, Countdown)
    assert task.count == 4


def test_a_dotted_path_loads_a_users_class() -> None:
    task = load_task(f"{__name__}.Mine", size=3)
    assert isinstance(task, Mine)
    assert (task.size, task.shape) == (3, "round")


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("countdwn", {}, "there is no task 'countdwn': did you mean 'countdown'"),
        ("zzz", {}, "choose one of .*countdown"),
        ("countdown", {"nubmers": 3}, "no setting 'nubmers': did you mean 'numbers'"),
        ("countdown", {"self": 3}, "no setting 'self'"),
        ("no_such_package.Thing", {}, "no module 'no_such_package'"),
        ("mcts.no_such_module.Thing", {}, "no module 'mcts.no_such_module'"),
        ("mcts.tasks.countdown.Countdwn", {}, "no class 'Countdwn': did you mean 'Countdown'"),
        (f"{__name__}.Mine", {}, "needs the setting 'size'"),
        (".Countdown", {}, "there is no task"),
    ],
)
def test_a_wrong_name_or_setting_is_one_sentence(name: str, settings: dict[str, object], match: str) -> None:
    with pytest.raises(TaskError, match=match) as refusal:
        load_task(name, **settings)
    assert isinstance(refusal.value, ValueError)
    assert "\n" not in str(refusal.value)
