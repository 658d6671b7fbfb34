"""Sets of real numbers: intervals, lists, unions, and what an inequality allows. Runs in a worker only."""

from __future__ import annotations

import sympy

from mcts.verify.equality import plain, value
from mcts.verify.forms import Chain, Listed, Ordered, Reading, Union


def same_set(gold: Reading, given: Reading) -> bool:
    """Are both sets of real numbers, and the same one?"""
    a, b = as_set(gold), as_set(given)
    return a is not None and b is not None and bool(a == b or a.symmetric_difference(b) == sympy.S.EmptySet)


def as_set(reading: Reading) -> sympy.Set | None:
    """A set of real numbers, None where it is none: an interval, a set, a union of them, what an inequality allows."""
    if isinstance(reading, Union):
        sets = [as_set(item) for item in reading.items]
        return None if any(part is None for part in sets) else sympy.Union(*sets)
    if isinstance(reading, Listed):
        values = [value(item) for item in reading.items]
        if any(number is None or not number.is_real for number in values):
            return None
        return sympy.FiniteSet(*values)
    if isinstance(reading, Ordered) and len(reading.items) == 2:
        ends = [value(item) for item in reading.items]
        if any(end is None or not end.is_extended_real or end.free_symbols for end in ends):
            return None
        return sympy.Interval(*ends, reading.left == "(", reading.right == ")")
    return _solutions(reading) if isinstance(reading, Chain) else None


def _solutions(chain: Chain) -> sympy.Set | None:
    """The real numbers that an inequality in one unknown (a variable, or a function's value) allows."""
    sides = [value(side) for side in chain.sides]
    if any(side is None for side in sides):
        return None
    unknowns = sorted({atom for side in sides for atom in plain(side).free_symbols}, key=str)
    if len(unknowns) != 1:
        return None
    x = sympy.Symbol("x", real=True)
    shown = [plain(side).subs(unknowns[0], x) for side in sides]
    allowed: sympy.Set = sympy.S.Reals
    made = {"<": sympy.Lt, "<=": sympy.Le, ">": sympy.Gt, ">=": sympy.Ge, "!=": sympy.Ne}
    for left, sign, right in zip(shown, chain.signs, shown[1:], strict=False):
        try:
            relation = made[sign](left, right)
            part = relation.as_set() if relation not in (sympy.true, sympy.false) else None
        except (NotImplementedError, ValueError, TypeError):
            return None
        if part is None:
            continue
        allowed = allowed.intersect(part)
    return allowed
