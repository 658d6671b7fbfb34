"""Verdicts for a file of gold and prediction rows: how a user checks a verifier before trusting a run to it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcts.tasks.program import program_in
from mcts.types import Status, Verdict
from mcts.verify import Verifier, load_verifier
from mcts.verify.extract import KINDS, Extracted, find_answer
from selfplay.errors import UserError

THREADS = 4
WHOLE = "whole"
"""Rule of a text without any answer marker: it is the answer as it stands."""
PROGRAM = "program"
"""Verifier, and rule of its texts: gold is JSON, the prediction holds a program, whatever markers they hold."""


@dataclass(frozen=True, slots=True)
class Graded:
    """One row with its verdict."""

    row: int
    """Counted from 1, as the file's lines are."""
    gold: str
    prediction: str
    verdict: Verdict
    rule: str
    """How the answer was found in the prediction: a rule of `mcts.verify.extract`, `whole` or `program`; empty if it
    was not."""
    expected: bool | None
    """What the row says should come out, if it says so."""

    @property
    def agrees(self) -> bool | None:
        return None if self.expected is None else self.verdict.won == self.expected

    def data(self) -> dict[str, Any]:
        verdict = self.verdict
        data = {
            "row": self.row,
            "status": verdict.status.value,
            "reward": verdict.reward,
            "why": verdict.why,
            "rule": self.rule,
            "answer": verdict.extracted,
            "gold": self.gold,
            "prediction": self.prediction,
        }
        return data if self.expected is None else data | {"expected": self.expected, "agrees": self.agrees}


def grade_file(path: Path, verifier: str) -> Iterator[Graded]:
    """Grade every row of a JSONL file, in order. A row has the texts `gold` and `prediction`, and may have `expected`
    (is it a win?); other fields are ignored. Of either text the final answer is taken where it has an answer marker
    (`mcts.verify.extract`), else the whole of it. For `program` gold is taken whole, and of the prediction the last
    fenced block that names `solve`, else the whole text where that does.

    Raises UserError in one sentence: no such file, none or a row (named by its number) that is not as it should be.
    VerifierSettingError: no such verifier.
    """
    judge = load_verifier(verifier)
    rows = list(_rows(path))
    if not rows:
        raise UserError(f"{path} holds no rows; a row has the texts gold and prediction")
    kind = verifier if verifier in (*KINDS, PROGRAM) else "exact"

    def grade(row: tuple[int, dict[str, Any]]) -> Graded:
        number, fields = row
        verdict, rule = _verdict(judge, fields["gold"], fields["prediction"], kind)
        return Graded(number, fields["gold"], fields["prediction"], verdict, rule, fields.get("expected"))

    with ThreadPoolExecutor(THREADS) as threads:
        yield from threads.map(grade, rows)


def totals(graded: list[Graded]) -> dict[str, Any]:
    """How many rows got which status; with `agree` and `judged` where rows say what they expect."""
    counts = Counter(one.verdict.status for one in graded)
    found: dict[str, Any] = {"rows": len(graded)} | {status.value: counts[status] for status in Status}
    judged = [one.agrees for one in graded if one.agrees is not None]
    return found | ({"agree": sum(judged), "judged": len(judged)} if judged else {})


def _verdict(judge: Verifier, gold: str, prediction: str, kind: str) -> tuple[Verdict, str]:
    if kind == PROGRAM:
        program = program_in(prediction)
        if program is None:
            return Verdict(Status.UNPARSABLE, 0.0, None, "the prediction gives no program with a function solve"), ""
        return judge.verify(gold, program), PROGRAM
    answers = []
    rule = ""
    for name, text in (("gold", gold), ("the prediction", prediction)):
        found = find_answer(text, kind)
        if isinstance(found, Extracted):
            answers.append(found.answer)
            rule = found.rule
        elif found.marked or "not closed" in found.why:
            return Verdict(Status.UNPARSABLE, 0.0, None, f"{name} gives no answer: {found.why}"), ""
        else:
            answers.append(text)
            rule = WHOLE
    return judge.verify(answers[0], answers[1]), rule


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # of JSON or of its UTF-8
            raise UserError(f"row {number} of {path} is no JSON: {error}") from error
        except RecursionError as error:
            raise UserError(f"row {number} of {path} is nested too deeply") from error
        if not isinstance(row, dict):
            raise UserError(f"row {number} of {path} is no object with the fields gold and prediction")
        for field in ("gold", "prediction"):
            if not isinstance(row.get(field), str):
                state = "must be text" if field in row else "is missing"
                raise UserError(f"row {number} of {path}: the field {field!r} {state}")
        if not isinstance(row.get("expected"), bool | None):
            raise UserError(f"row {number} of {path}: the field 'expected' must be true or false")
        yield number, row
