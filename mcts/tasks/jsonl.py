"""Problems of a user's own, described by the config alone: file, fields, template, delimiter, verifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mcts.tasks.text import TextTask


class Jsonl(TextTask):
    """A JSON Lines (or JSON) file with a question and a gold answer in each row; see `TextSettings`.

    `fields` says which columns they are, `template` what the policy is shown, `delimiter` where a step ends, `kind`
    behind which markers the answer stands and `verifier` who judges it. A file with a list of options in each row is
    for the task `choice`, which takes the same settings.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "fields": {"question": "question", "answer": "answer"},
        "kind": "math",
        "verifier": {"name": "math"},
    }

    def __init__(self, **settings: Any) -> None:
        super().__init__("jsonl", settings)
