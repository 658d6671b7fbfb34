"""Mathematical answers in LaTeX or plain text."""

from __future__ import annotations

from mcts.types import Status, Verdict
from mcts.verify.base import check_partial, refuse
from mcts.verify.number import difference, read_number


class MathVerifier:
    """`math`: the same mathematical object.

    partial: reward of a WRONG answer that is a well-formed number where gold is one (ReFT's 0.1), in [0, 1).
    """

    name = "math"

    def __init__(self, partial: float = 0.0) -> None:
        self.partial = check_partial(partial)

    def verify(self, gold: str, prediction: str) -> Verdict:
        objection = refuse(gold, prediction)
        if objection is not None:
            return objection
        wanted = read_number(gold)
        given = read_number(prediction, loose=wanted is not None)
        if wanted is not None and given is not None:
            why = wanted.sameness(given)
            if why:
                return Verdict(Status.CORRECT, 1.0, prediction, why)
            return Verdict(Status.WRONG, self.partial, prediction, difference(wanted, given))
        return Verdict(Status.UNPARSABLE, 0.0, prediction, "not both are numbers")
