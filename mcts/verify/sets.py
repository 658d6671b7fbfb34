"""Sets of real numbers: intervals, lists, unions, and what an inequality allows. Runs in a worker only."""

from __future__ import annotations

import sympy

from mcts.verify.equality import plain, value
from mcts.verify.forms import Both, Chain, Listed, Ordered, Reading, Union, Without, parts


def same_set(gold: Reading, given: Reading) -> bool:
    """Are both sets of real numbers, and the same one? Two conditions must be on the same unknown."""
    names = [unknowns(reading) for reading in (gold, given)]
    if any(len(found) > 1 for found in names) or (all(names) and names[0] != names[1]):
        return False
    a, b = as_set(gold), as_set(given)
    return a is not None and b is not None and bool(a == b or a.symmetric_difference(b) == sympy.S.EmptySet)


def unknowns(reading: Reading) -> set[sympy.Symbol]:
    """The variables in it, and `f(x)` as one."""
    found = value(reading)
    own = set(plain(found).free_symbols) if found is not None else set()
    return own.union(*(unknowns(part) for part in parts(reading)))


_JOINED = {Union: sympy.Union, Both: sympy.Intersection, Without: sympy.Complement}


def as_set(reading: Reading) -> sympy.Set | None:
    """A set of real numbers, None where it is none: an interval, a set, what an inequality allows, these joined."""
    if isinstance(reading, Union | Both | Without):
        sets = [as_set(item) for item in reading.items]
        return None if any(part is None for part in sets) else _JOINED[type(reading)](*sets)
    if isinstance(reading, Listed):
        values = [value(item) for item in reading.items]
        if any(number is None or not number.is_real for number in values):
            return None
        return sympy.FiniteSet(*values)
    if isinstance(reading, Ordered) and len(reading.items) == 2:
        ends = [value(item) for item in reading.items]
        if any(end is None or not end.is_extended_real or end.free_symbols for end in ends):
            return None
        left, right = (end for end in ends if end is not None)
        if (left == -sympy.oo and reading.left == "[") or (right == sympy.oo and reading.right == "]"):
            return None
        if left > right:
            return None  # not the empty set, which would vanish beside another: `(5,2) \\cup (2,12)`
        return sympy.Interval(left, right, reading.left == "(", reading.right == ")")
    return _solutions(reading) if isinstance(reading, Chain) else None


def _solutions(chain: Chain) -> sympy.Set | None:
    """The real numbers that a relation in one unknown (a variable, or a function's value) allows."""
    sides = [value(side) for side in chain.sides]
    if any(side is None for side in sides):
        return None
    unknowns = sorted({atom for side in sides for atom in plain(side).free_symbols}, key=str)
    if len(unknowns) != 1:
        return None
    x = sympy.Symbol("x", real=True)
    shown = [plain(side).subs(unknowns[0], x) for side in sides]
    allowed: sympy.Set = sympy.S.Reals
    made = {"<": sympy.Lt, "<=": sympy.Le, ">": sympy.Gt, ">=": sympy.Ge, "!=": sympy.Ne, "=": sympy.Eq}
    for left, sign, right in zip(shown, chain.signs, shown[1:], strict=False):
        if sign not in made:
            return None
        try:
            relation = made[sign](left, right)
            allowed = allowed.intersect(relation.as_set())
        except (NotImplementedError, ValueError, TypeError):
            return None
    return allowed
