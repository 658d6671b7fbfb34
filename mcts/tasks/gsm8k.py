"""GSM8K: word problems with worked steps and a number as answer, in the files that OpenAI published."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from mcts.tasks.rows import Row
from mcts.tasks.text import TextTask

_CALCULATOR = re.compile(r"<<[^<>]*>>")
MARKER = "####"


class Gsm8k(TextTask):
    """`path`: a folder with train.jsonl and test.jsonl, whose columns are question and answer (the worked steps, then
    `#### 72`). test.jsonl is the held-out split; dev is a fixed part of train.jsonl. Calculator notes such as
    <<48/2=24>> are dropped: a policy would have to compute what stands in them anyway.

    Chat models are asked to end likewise; an answer in a box, or after "the answer is", counts too.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "fields": {"question": "question", "answer": "answer"},
        "final": "#### {answer}",
        "kind": "number",
        "verifier": {"name": "number"},
        "max_steps": 12,
        "max_step_tokens": 128,
    }
    CHAT_TEMPLATE = (
        "{question}\n\nReason step by step, one step per line. End with a line that holds #### and the number alone."
    )

    def __init__(self, **settings: Any) -> None:
        if settings.get("chat") is True:
            settings = {"template": self.CHAT_TEMPLATE, **settings}
        super().__init__("gsm8k", settings)

    def gold(self, row: Row) -> str:
        text = row.text(self._role("answer"))
        _, marker, answer = text.rpartition(MARKER)
        if not marker or not answer.strip():
            raise row.refuse(f"the field {self._role('answer')!r} must end in a line such as '#### 72'")
        return self.canonical(answer)

    def solution(self, row: Row) -> str | None:
        text = row.text(self._role("answer")).rpartition(MARKER)[0]
        return _CALCULATOR.sub("", text).strip() or None
