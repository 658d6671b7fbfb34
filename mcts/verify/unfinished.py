"""Answers that leave their work to the reader: `5!` where gold is 120, `3x - 2 > 13` where it is x > 5.

Such a formula often stands in the question, so a verifier that works it out pays a model for repeating the question.
Gold says how far the work goes. Runs in a worker only.
"""

from __future__ import annotations

import re

from mcts.verify.equality import is_constant, plain, value
from mcts.verify.forms import Chain, Expression, Reading, parts
from mcts.verify.number import ROUNDED_DIGITS, Number

_EXPONENT = r"(?:\s*\^\s*(?:\{\s*-?\d+\s*\}|\d))?"
_POWER = rf"[({{]?[-+]?(?:\d+|\{{?\\frac\{{\d+\}}\{{10*\}}\}}?)[)}}]?{_EXPONENT}"
"""Decimals are written as fractions by now."""
_FINISHED = re.compile(
    rf"[-+\s]*\(?\s*(?:\\frac\s*(?:\{{\s*{_POWER}\s*\}}|\d)\s*(?:\{{\s*{_POWER}\s*\}}|\d)"
    rf"|{_POWER}(?:\s*(?:/|\\over(?![A-Za-z]))\s*{_POWER})?)\s*\)?{_EXPONENT}\s*"
)
"""A number, a power, one over the other, or a power of that: `2^{10}`, `\\frac{3}{-4}`, `(\\frac12)^{10}`."""
_OPERATIONS = (
    r"!|binom|\\choose",
    r"\\[lr]?(?:floor|ceil)",
    r"\\sum|\\prod|\\int|\\lim",
    r"(?<![A-Za-z])\\?(?:log|ln|lg|exp)(?![A-Za-z])",
    r"(?<![A-Za-z])\\?(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?(?![A-Za-z])",
    r"\||\\[lr]?vert|\\begin",
    r"mod(?![A-Za-z])|\\(?:gcd|max|min|det)(?![A-Za-z])",
)
"""Operations on numbers by kind: a kind that gold does not use was to be carried out."""


def unfinished(gold: Reading, given: Reading) -> bool:
    """Is work left in `given` that is done in `gold`?

    - Gold is a number: `given` must be one, a power or a quotient of powers. `17 \\cdot 23` is not 391.
    - Gold is another constant, or the rounding of one (4.123105...): `given` may use roots and arithmetic, and of
      functions those that gold uses (`\\sin 45^\\circ` is not `\\frac{\\sqrt2}{2}`).
    - Gold is a set, or says what the unknown is (`x > 5`, `x = 5`): so must `given`; `2x = 10` does not.
    """
    if not isinstance(gold, Number | Expression):
        return _solved(gold) and not _solved(given)
    if not isinstance(given, Expression) or not is_constant(gold):
        return False
    if isinstance(gold, Number) and (gold.digits or 0) < ROUNDED_DIGITS:
        return _FINISHED.fullmatch(given.latex) is None
    used = gold.latex if isinstance(gold, Expression) else ""
    return any(re.search(kind, given.latex) and not re.search(kind, used) for kind in _OPERATIONS)


def _solved(reading: Reading) -> bool:
    """Does every relation in it have nothing but bare unknowns and constants for sides?"""
    if not isinstance(reading, Chain):
        return all(map(_solved, parts(reading)))
    if set(reading.signs) == {"="}:
        return bool(reading.name) and _plain(reading.sides[-1])
    return all(map(_plain, reading.sides))


def _plain(side: Reading) -> bool:
    """Is a side of a relation a constant, an unknown (`x`, `f(2)`), or no formula at all?"""
    found = value(side)
    return found is None or is_constant(side) or plain(found).is_Symbol
