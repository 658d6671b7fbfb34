"""Are two readings the same mathematical object? Runs in a worker only: formulas go to math-verify's parser and sympy.

The comparison is ours because math-verify's own rounds to 15 digits (2^-99 is 2^-98), takes the last side of any chain
(`17 = 18` is 18) and lets a set pass for a tuple.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from mcts.verify.equality import equal, is_constant, is_zero, same_formula, value
from mcts.verify.forms import (
    Both,
    Chain,
    Expression,
    Listed,
    Matrix,
    Numeral,
    Ordered,
    Ratio,
    Reading,
    Residue,
    Union,
    Without,
    Words,
    parts,
)
from mcts.verify.formula import CannotParse, parse
from mcts.verify.number import Number
from mcts.verify.reading import read
from mcts.verify.sets import same_set, unknowns
from mcts.verify.tex import Unreadable
from mcts.verify.unfinished import unfinished

_WORD_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


def warm() -> None:
    """Judge a few pairs, so that forks find parser and caches ready."""
    pairs = [
        ("\\frac{1+\\sqrt{5}}{2}", "0.5+\\sqrt5/2"),
        ("x^2-2x+1", "(x-1)^2"),
        ("[1,2)", "1\\le x<2"),
        ("6-5i", "-5i+6"),
        ("3\\pi", "3 \\cdot \\pi"),
        ("\\sin(x)", "\\cos x"),
        ("y=2x+1", "2x-y+1=0"),
        ("\\sqrt[3]{2}", "2^{1/3}"),
    ]
    for gold, prediction in pairs:
        judge({"gold": gold, "prediction": prediction})


def judge(case: dict[str, Any]) -> dict[str, Any]:
    """{"gold", "prediction"} -> {"status", "why", "final", "numbers"}; `final`: no lack of memory can have caused it;
    `numbers`: both are numbers."""
    readings = []
    for name, key in (("gold", "gold"), ("the prediction", "prediction")):
        try:
            reading = read(case[key])
            formulas(reading)
        except (Unreadable, CannotParse, RecursionError) as error:
            return _verdict("unparsable", f"{name} cannot be read: {error or 'nested too deeply'}")
        readings.append(reading)
    gold, prediction = readings
    for name, reading, status in (("gold", gold, "unparsable"), ("the prediction", prediction, "wrong")):
        if contradicts(reading):
            return _verdict(status, f"{name} says that two different numbers are equal")
    try:
        found = same(gold, prediction)
    except RecursionError:
        return _verdict("error", "the comparison is nested too deeply")
    numbers = isinstance(gold, Number) and isinstance(prediction, Number)
    if found:
        return _verdict("correct", "the same value") | {"final": True, "numbers": numbers}
    return _verdict("wrong", _difference(gold, prediction)) | {"numbers": numbers}


def _verdict(status: str, why: str) -> dict[str, Any]:
    return {"status": status, "why": why, "final": False, "numbers": False}


def _difference(gold: Reading, prediction: Reading) -> str:
    if isinstance(gold, Numeral) and isinstance(prediction, Numeral) and gold.base != prediction.base:
        return f"base {prediction.base}, not {gold.base}"
    if isinstance(gold, Numeral) != isinstance(prediction, Numeral):
        return "one of the two names a base"
    if unfinished(gold, prediction):
        return "work is left to be done"
    kinds = [_KIND[type(reading)] for reading in (gold, prediction)]
    return "another value" if kinds[0] == kinds[1] else f"{kinds[1]}, not {kinds[0]}"


_KIND: dict[type, str] = {
    Words: "words",
    Expression: "a formula",
    Number: "a number",
    Numeral: "a numeral",
    Listed: "a set or list",
    Ordered: "a tuple or interval",
    Union: "a union",
    Both: "conditions",
    Without: "a set",
    Residue: "a residue",
    Ratio: "a ratio",
    Matrix: "a matrix",
    Chain: "a relation",
}


def formulas(reading: Reading) -> None:
    """Parse every formula of a reading. Raises CannotParse."""
    if isinstance(reading, Expression):
        parse(reading.latex)
    for part in parts(reading):
        formulas(part)


def contradicts(reading: Reading) -> bool:
    """Does some chain of equations in it equate different constants (`17 = 18`, `x = 3 = 4`)?"""
    if isinstance(reading, Chain):
        if reading.signs == ("~",):
            return contradicts(reading.sides[0]) or not (reading.name or _near(*reading.sides))
        constants = [side for side in reading.sides if is_constant(side)]
        for number, (left, right) in enumerate(zip(reading.sides, reading.sides[1:], strict=False)):
            if (
                reading.signs[number] != "="
                and is_constant(left)
                and is_constant(right)
                and not _holds(left, reading.signs[number], right)
            ):
                return True
        if set(reading.signs) == {"="} and any(not _agree(constants[0], other) for other in constants[1:]):
            return True
    return any(contradicts(part) for part in parts(reading))


def _agree(left: Reading, right: Reading) -> bool:
    """Are both numbers or formulas, and equal, whatever is left to work out?"""
    if isinstance(left, Number) and isinstance(right, Number):
        return left.same(right)
    return (
        isinstance(left, Number | Expression) and isinstance(right, Number | Expression) and same_formula(left, right)
    )


def _near(left: Reading, right: Reading) -> bool:
    """Are two sides about the same: constants that are at most a hundredth apart?"""
    left, right = (side.sides[-1] if isinstance(side, Chain) else side for side in (left, right))
    a, b = value(left), value(right)
    if a is None or b is None or not (is_constant(left) and is_constant(right)) or not (a.is_real and b.is_real):
        return False
    return bool(100 * abs(a - b) <= abs(a))


def _holds(left: Reading, sign: str, right: Reading) -> bool:
    a, b = value(left), value(right)
    if a is None or b is None or not a.is_real or not b.is_real:
        return True
    if sign == "!=":
        return not equal(a, b)
    if equal(a, b):
        return sign in ("<=", ">=")
    return bool((a < b) == (sign in ("<", "<=")))


def same(gold: Reading, given: Reading) -> bool:
    """Is `given` what `gold` is? Not quite symmetric: gold's form decides what may be left out."""
    gold, given = _exact(gold), _exact(given)
    if unfinished(gold, given):
        return False
    if isinstance(gold, Chain) or isinstance(given, Chain):
        return _same_chain(gold, given)
    gold, given = _lone(gold), _lone(given)
    if isinstance(gold, Listed) and isinstance(given, Listed):
        return _same_list(gold, given)
    if isinstance(gold, Words) or isinstance(given, Words):
        return _same_words(gold, given)
    if isinstance(gold, Numeral) or isinstance(given, Numeral):
        return gold == given
    if isinstance(gold, Number | Expression) and isinstance(given, Number | Expression):
        return _agree(gold, given)
    if isinstance(gold, Ratio | Residue) and type(gold) is type(given):
        return _pairwise(gold.items, parts(given))
    if isinstance(gold, Matrix) and isinstance(given, Matrix):
        shapes = [[len(row) for row in matrix.rows] for matrix in (gold, given)]
        cells = zip(parts(gold), parts(given), strict=False)  # a factor before the matrix was left to us
        return shapes[0] == shapes[1] and all(_agree(a, b) or same(a, b) for a, b in cells)
    if isinstance(gold, Ordered) and isinstance(given, Ordered):
        if len(gold.items) == 2 and (gold.left, gold.right) != (given.left, given.right):
            return False  # intervals, one of them open where the other is closed
        return _pairwise(gold.items, given.items)
    if isinstance(gold, Ordered | Listed) and isinstance(given, Ordered | Listed):
        a, b = _tuple(gold), _tuple(given)
        return a is not None and b is not None and _pairwise(a, b)
    if isinstance(gold, Union | Both) and type(gold) is type(given) and _matched(gold.items, parts(given)):
        return bool(unknowns(gold)) or len(unknowns(given)) < 2  # `x < -1 or y > 1` is no set
    if isinstance(gold, Without) and isinstance(given, Without) and _pairwise(gold.items, given.items):
        return True
    if isinstance(gold, Union | Both | Without) or isinstance(given, Union | Both | Without):
        return same_set(gold, given)
    return False


def _exact(reading: Reading) -> Reading:
    """`1/3 ~ 0.33` says 1/3; `x ~ 11` says x = 11."""
    if not isinstance(reading, Chain) or reading.signs != ("~",):
        return reading
    return Chain(reading.sides, ("=",), reading.name) if reading.name else reading.sides[0]


def _lone(reading: Reading) -> Reading:
    """`{5}` says 5; a set in a set stays one."""
    if not isinstance(reading, Listed) or len(reading.items) != 1:
        return reading
    only = reading.items[0]
    return reading if isinstance(only, Listed) and only.braces else only


def _tuple(reading: Ordered | Listed) -> tuple[Reading, ...] | None:
    """The items of `(1, 3)`, and `x = 1, y = 3` as (1, 3): only letters that follow one another in the alphabet have an
    order that is clear."""
    if isinstance(reading, Ordered):
        return reading.items if (reading.left, reading.right) == ("(", ")") else None
    named = [item for item in reading.items if isinstance(item, Chain) and len(item.name) == 1]
    if reading.braces or reading.either or len(named) != len(reading.items):
        return None
    named.sort(key=lambda item: item.name)
    if any(ord(b.name) - ord(a.name) != 1 for a, b in pairwise(named)):
        return None
    return tuple(item.sides[-1] for item in named)


def _pairwise(gold: tuple[Reading, ...], given: tuple[Reading, ...]) -> bool:
    return len(gold) == len(given) and all(same(a, b) for a, b in zip(gold, given, strict=True))


def _matched(gold: tuple[Reading, ...], given: tuple[Reading, ...]) -> bool:
    """The same things in any order; a thing named twice counts once."""
    return all(any(same(a, b) for b in given) for a in gold) and all(any(same(a, b) for a in gold) for b in given)


def _same_list(gold: Listed, given: Listed) -> bool:
    a, b = _flat(gold), _flat(given)
    names = [{item.name for item in items if isinstance(item, Chain) and item.name} for items in (a, b)]
    if (len(names[0]) > 1) == (len(names[1]) > 1):
        return _matched(a, b)
    if gold.braces or given.braces:  # `x_1 = 1, x_2 = 2` names the members of a set, `x = 1, y = 2` does not
        return len({name[0] for name in names[0] | names[1]}) == 1 and _matched(a, b)
    # `x = 1, y = 2` against `1, 2`: the order says which is which
    return not (gold.either or given.either) and _pairwise(a, b)


def _flat(listed: Listed) -> tuple[Reading, ...]:
    """Items of a list; those of a list without braces in it (`1 \\pm 2`) count as its own."""
    items: list[Reading] = []
    for item in listed.items:
        items += _flat(item) if isinstance(item, Listed) and not item.braces else (item,)
    return tuple(items)


def _same_words(gold: Reading, given: Reading) -> bool:
    texts = []
    for reading in (gold, given):
        if (
            isinstance(reading, Number)
            and reading.value.denominator == 1
            and 0 <= reading.value <= 12
            and not reading.percent
        ):
            texts.append(_WORD_NUMBERS[int(reading.value)])
        elif isinstance(reading, Words):
            texts.append(reading.text)
        elif isinstance(reading, Expression):
            texts.append(reading.latex.lower())
        else:
            return False
    return "".join(texts[0].split()) == "".join(texts[1].split())


def _same_chain(gold: Reading, given: Reading) -> bool:
    if isinstance(gold, Chain) and isinstance(given, Chain):
        if gold.name and given.name and gold.name == given.name:
            return same(gold.sides[-1], given.sides[-1])
        if len(gold.signs) == 1 and len(given.signs) == 1 and _same_relation(gold, given):
            return True
        a, b = _upward(gold), _upward(given)
        if a.signs == b.signs and _pairwise(a.sides, b.sides):
            return True
        return "=" not in gold.signs + given.signs and same_set(gold, given)
    chain, other = (gold, given) if isinstance(gold, Chain) else (given, gold)
    assert isinstance(chain, Chain)
    if set(chain.signs) == {"="}:
        if not chain.name and not all(is_constant(side) for side in chain.sides):
            return False
        if chain.name in _variables(chain.sides[-1]):
            return False  # `x = x + 3` names nothing
        return same(chain.sides[-1], other) if chain is gold else same(other, chain.sides[-1])
    if isinstance(other, Ordered | Union | Both | Without) or (isinstance(other, Listed) and other.braces):
        return same_set(gold, given)
    return False


def _variables(reading: Reading) -> set[str]:
    found = value(reading)
    own = {str(symbol) for symbol in found.free_symbols} if found is not None else set()
    return own.union(*(_variables(part) for part in parts(reading)))


def _upward(chain: Chain) -> Chain:
    """`3 > x >= 1` as `1 <= x < 3`."""
    if chain.signs[0] not in (">", ">="):
        return chain
    return Chain(chain.sides[::-1], tuple(_FLIPPED[sign] for sign in chain.signs[::-1]), chain.name)


def _same_relation(gold: Chain, given: Chain) -> bool:
    """Relations of two sides each: the same up to a constant factor, which flips an inequality if it is negative."""
    sides = [value(side) for side in gold.sides + given.sides]
    if any(side is None for side in sides):
        return False
    a, b, c, d = (side for side in sides if side is not None)
    left, right = a - b, c - d
    if is_zero(left) if not left.free_symbols else equal(left, sympy.S.Zero):
        return False
    factor = sympy.simplify(right / left)
    if factor.free_symbols or factor.atoms(AppliedUndef) or factor.is_zero is not False:
        return False
    sign = given.signs[0]
    if gold.signs[0] in ("=", "!="):
        return sign == gold.signs[0]
    if factor.is_negative:
        sign = _FLIPPED[sign]
    return bool(factor.is_real) and sign == gold.signs[0]
