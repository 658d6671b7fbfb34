"""Rows with gold as a text task sees them, and the worked examples that they give."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from mcts.tasks.base import Example
from mcts.tasks.rows import normal
from mcts.types import Problem

if TYPE_CHECKING:
    from mcts.tasks.text import TextTask

_NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?")
APART = 1e-3
"""Least relative difference of two numbers of which no verifier takes one for a rounding of the other."""


@dataclass(frozen=True, slots=True)
class Worked:
    """One row as the task sees it."""

    id: str
    question: str
    asked: str
    """The filled template."""
    typed: str
    """What `read` would take for it."""
    answer: str
    """Gold."""
    solution: str | None
    meta: Mapping[str, Any]


def worked_examples(
    task: TextTask,
    rows: Sequence[tuple[Worked, list[str]]],
    problem_of: Callable[[Worked], Problem],
    seed: int,
) -> Iterator[Example]:
    """The stream of `TextTask.warmup` over (row, its steps)."""
    for epoch in count():
        random = np.random.default_rng([seed, epoch])
        for at in random.permutation(len(rows)).tolist():
            worked, steps = rows[at]
            problem = problem_of(worked)
            yield Example(problem, tuple(steps), (math.nan, *[1.0] * len(steps)))
            for _ in range(task.settings.negatives):
                other = rows[int(random.integers(len(rows)))][0]
                wrong = task.another_answer(worked, random)
                if random.random() < 0.5:
                    if wrong is not None and steps[-1] == task.final(worked.answer):
                        lost = (*steps[:-1], task.final(wrong))
                        labels = (*[math.nan] * len(steps), 0.0)
                        yield Example(problem, lost, labels, imitate=False)
                elif task.differ(worked.answer, other.answer):
                    labels = (math.nan, *[0.0] * len(steps))
                    yield Example(problem_of(other), tuple(steps), labels, imitate=False)


# --- plain numbers ---


def is_number(text: str) -> bool:
    """Whether a text is nothing but digits, with sign, thousands commas and decimal point where they belong."""
    return _NUMBER.fullmatch(text) is not None


def one_way(text: str) -> str:
    """A plain number without thousands commas, plus sign and zeros at the end of its decimals; other texts as they
    are."""
    if not is_number(text):
        return text
    whole, dot, part = text.replace(",", "").lstrip("+").partition(".")
    part = part.rstrip("0")
    return whole + (dot + part if part else "")


def wrong_number(gold: str, text: str, random: np.random.Generator) -> str | None:
    """A number in `text` that is certainly not gold; None where gold is no plain number or there is no other."""
    if not is_number(gold):
        return None
    found = {one_way(match.group()) for match in _NUMBER.finditer(text)}
    wrong = sorted(number for number in found if apart(number, gold))
    return wrong[int(random.integers(len(wrong)))] if wrong else None


def apart(first: str, second: str) -> bool:
    """Whether two plain numbers differ by more than any rounding."""
    a, b = float(first.replace(",", "")), float(second.replace(",", ""))
    return abs(a - b) > APART * max(abs(a), abs(b))


def drop_repeats(splits: dict[str, list[Worked]]) -> list[str]:
    """Drop from a split the questions that a more precious one holds too (held-out before dev before train); what was
    dropped, one sentence each."""
    notes = []
    seen: set[str] = set()
    for split in ("heldout", "dev", "train"):
        rows = splits[split]
        splits[split] = [w for w in rows if normal(w.question) not in seen]
        dropped = len(rows) - len(splits[split])
        if dropped:
            notes.append(f"{dropped} problems left out of {split}: their questions are in another split too")
        seen |= {normal(w.question) for w in rows}
    return notes
