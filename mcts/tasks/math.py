"""Competition mathematics (MATH and its kin): LaTeX problems, the answer in a box."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mcts.tasks.rows import Row
from mcts.tasks.text import TextTask
from mcts.verify.extract import extract

LABELS = ("level", "subject", "type", "unique_id")
"""Columns that go into a problem's meta where a file has them."""


class Math(TextTask):
    """`train` and `heldout` (or `path`): rows with problem and answer (or final_answer, or only a solution whose last
    box is the answer). Steps are paragraphs. A solution, where there is one, serves warm-up."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "fields": {"question": "problem", "solution": "solution"},
        "template": "Problem: {question}\nSolution:\n",
        "final": r"The final answer is $\boxed{{answer}}$.",
        "delimiter": "\n\n",
        "kind": "math",
        "verifier": {"name": "math"},
        "max_steps": 24,
        "max_step_tokens": 256,
    }
    CHAT_TEMPLATE = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."

    def __init__(self, **settings: Any) -> None:
        if settings.get("chat") is True:
            settings = {"template": self.CHAT_TEMPLATE, **settings}
        super().__init__("math", settings)

    def gold(self, row: Row) -> str:
        spec = self.settings.fields.get("answer")
        if spec is None:
            spec = next((name for name in ("answer", "final_answer") if name in row.columns), None)
        if spec is not None:
            return self.canonical(row.text(spec))
        solution = row.columns.get(self._role("solution"))
        found = extract(solution, "math") if isinstance(solution, str) else None
        if found is None:
            raise row.refuse("there is no field 'answer' or 'final_answer', and no solution that ends in a box")
        return self.canonical(found.answer)

    def meta(self, row: Row) -> dict[str, Any]:
        facts = {name: row.columns[name] for name in LABELS if isinstance(row.columns.get(name), str | int)}
        return {**super().meta(row), **facts}
