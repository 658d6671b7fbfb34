"""Multiple choice, two to five options named A to E, as in AQuA.

Guessing wins one time in the number of options, so a fifth of all wrong reasoning is paid as if it were right: on such
problems reward-driven training learns to guess (ReFT fails to beat plain imitation there). Prefer a task with open
answers to train on, and compare accuracy with `chance`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mcts.tasks.base import TaskError
from mcts.tasks.rows import Row
from mcts.tasks.text import TextTask
from mcts.tasks.worked import Worked
from mcts.types import Problem

LETTERS = "ABCDE"
_LABEL = re.compile(r"\s*\(?([A-E])\s*[).:]\s*")


class Choice(TextTask):
    """Rows with question, options (a list of texts, each with its letter or all without) and the letter of the right
    one in `correct`; a `rationale`, where there is one, serves warm-up. {options} in the template is one line each."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "fields": {"question": "question", "options": "options", "answer": "correct", "solution": "rationale"},
        "template": "Question: {question}\nOptions:\n{options}\nAnswer:\n",
        "final": "The answer is ({answer}).",
        "kind": "choice",
        "verifier": {"name": "choice"},
        "max_steps": 24,
        "max_step_tokens": 128,
    }
    roles: ClassVar[tuple[str, ...]] = (*TextTask.roles, "options")
    CHAT_TEMPLATE = (
        "{question}\n\nOptions:\n{options}\n\nReason step by step, one step per line. "
        'End with the line "The answer is (X)." where X is the letter of the right option.'
    )

    def __init__(self, **settings: Any) -> None:
        if settings.get("chat") is True:
            settings = {"template": self.CHAT_TEMPLATE, **settings}
        super().__init__("choice", settings)

    def known(self, row: Row) -> Mapping[str, str]:
        lines = [f"{letter}) {text}" for letter, text in zip(LETTERS, self._options(row), strict=False)]
        return {**super().known(row), "options": "\n".join(lines)}

    def gold(self, row: Row) -> str:
        spec = self._role("answer")
        letter = row.text(spec).strip().strip("().").upper()
        allowed = LETTERS[: len(self._options(row))]
        if len(letter) != 1 or letter not in allowed:
            raise row.refuse(f"the field {spec!r} must be a letter from A to {allowed[-1]}, not {row.columns[spec]!r}")
        return letter

    def meta(self, row: Row) -> dict[str, Any]:
        return {**super().meta(row), "options": len(self._options(row))}

    def chance(self, problem: Problem) -> float:
        """The chance that a guess wins. Raises TaskError for a problem that does not say how many options it has."""
        options = problem.meta.get("options")
        if not isinstance(options, int) or options < 1:
            raise TaskError(f"problem {problem.id} does not say in its meta how many options it has")
        return 1.0 / options

    def canonical(self, answer: str) -> str:
        return answer.strip().strip("().").upper()

    def another_answer(self, worked: Worked, random: np.random.Generator) -> str | None:
        wrong = LETTERS[: worked.meta["options"]].replace(worked.answer, "")
        return wrong[int(random.integers(len(wrong)))]

    def differ(self, first: str, second: str) -> bool:
        return first != second

    def _options(self, row: Row) -> list[str]:
        """The options' texts without their letters."""
        spec = self._role("options")
        found = row.value(spec)
        if not isinstance(found, list) or not 2 <= len(found) <= len(LETTERS):
            raise row.refuse(f"the field {spec!r} must be a list of 2 to {len(LETTERS)} options")
        if not all(isinstance(option, str | int | float) and not isinstance(option, bool) for option in found):
            raise row.refuse(f"the field {spec!r} must be a list of texts")
        texts = [str(option) for option in found]
        labels = [_LABEL.match(text) for text in texts]
        if all(label and label.group(1) == letter for label, letter in zip(labels, LETTERS, strict=False)):
            texts = [text[label.end() :] for text, label in zip(texts, labels, strict=True) if label]
        return [text.strip() for text in texts]
