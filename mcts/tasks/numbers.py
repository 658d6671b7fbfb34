"""The numbers that legal play can write, and the result of every operation on them as a table.

Number i is the i-th smallest, so "the larger operand" is the larger index. Play and enumeration then touch
integer arrays only: no fraction is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mcts.tasks.base import TaskSettingError
from mcts.verify.exact import Rational, Rules, format_number

Int16 = npt.NDArray[np.int16]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

ILLEGAL = -1
"""A result that the rules forbid."""
UNWRITTEN = -2
"""A legal result that ends play without being a possible target, so it needs no word."""
OPERATION_SIGNS = ("+", "*", "-", "/", "/")
"""Sums, products, larger - smaller, larger / smaller, smaller / larger (the last for fractions only)."""
REVERSED = 4
MAX_WORDS = 2000
"""Most number words of a task: results[V, V] stay small, and so does the model's vocabulary."""


@dataclass(frozen=True, slots=True, eq=False)
class NumberTable:
    """V numbers in ascending order and what each operation makes of two of them."""

    values: tuple[Rational, ...]  # [V]
    words: tuple[str, ...]  # [V]
    results: Int16  # [O, V, V] index of the result, ILLEGAL or UNWRITTEN; first the larger operand, then the smaller
    whole: Int64  # [V] the value where it is an integer, else -1

    def index(self, integers: Int64) -> Int64:
        """Indices of integers that are in the table, int64, of the same shape. KeyError for others."""
        order = np.flatnonzero(self.whole >= 0)
        found = np.minimum(np.searchsorted(self.whole[order], integers), len(order) - 1)
        if (self.whole[order][found] != integers).any():
            raise KeyError("a number that play cannot write")
        return order[found]


def number_table(rules: Rules, *, count: int, low: int, high: int, target_low: int, target_high: int) -> NumberTable:
    """All that can be written on a play of `count` numbers from low..high towards a target of the range.

    What k numbers can make is closed over all ways to split k, whatever the other numbers are, so it may hold
    a few results that no play with `count` numbers leads to a target; final results count only as targets.
    Raises TaskSettingError above MAX_WORDS words.
    """
    made = {1: _codes(np.arange(low, high + 1), np.ones(high - low + 1, dtype=np.int64))}
    for size in range(2, count):
        parts = [_codes(*_legal_results(rules, made[k], made[size - k])) for k in range(1, size // 2 + 1)]
        made[size] = np.unique(np.concatenate(parts))
        _refuse_above_limit(len(made[size]))
    targets = np.arange(target_low, target_high + 1)
    codes = np.unique(np.concatenate([*made.values(), _codes(targets, np.ones_like(targets))]))
    _refuse_above_limit(len(codes))
    numerators, denominators = _decode(codes)
    order = np.argsort(numerators / denominators, kind="stable")
    codes, numerators, denominators = codes[order], numerators[order], denominators[order]
    values = tuple(zip(numerators.tolist(), denominators.tolist(), strict=True))
    return NumberTable(
        values=values,
        words=tuple(map(format_number, values)),
        results=_results(rules, codes),
        whole=np.where(denominators == 1, numerators, -1),
    )


def _refuse_above_limit(words: int) -> None:
    if words > MAX_WORDS:
        raise TaskSettingError(f"play would need {words} number words, more than {MAX_WORDS}: lower max_value")


_BASE = 1 << 20  # codes are numerator * _BASE + denominator; settings keep both far below


def _codes(numerators: Int64, denominators: Int64) -> Int64:
    return np.unique(numerators * _BASE + denominators)


def _decode(codes: Int64) -> tuple[Int64, Int64]:
    return codes // _BASE, codes % _BASE


def _apply(operation: int, larger: Int64, smaller: Int64, rules: Rules) -> tuple[Int64, Int64, Bool]:
    """Numerators, denominators (reduced) and legality of one operation on codes [...], broadcast."""
    (a, b), (c, d) = _decode(larger), _decode(smaller)
    legal = np.broadcast_to(np.True_, np.broadcast_shapes(a.shape, c.shape))
    sign = OPERATION_SIGNS[operation]
    if sign == "+":
        numerators, denominators = a * d + c * b, b * d
    elif sign == "*":
        numerators, denominators = a * c, b * d
    elif sign == "-":
        numerators, denominators = a * d - c * b, b * d
    elif operation == REVERSED:
        numerators, denominators = c * b, d * a
        # Of two equal numbers larger / smaller is the same move.
        legal = (a > 0) & (numerators != denominators)
    else:
        numerators, denominators = a * d, b * c
        legal = np.broadcast_to(c > 0, legal.shape)
    denominators = np.maximum(denominators, 1)
    common = np.gcd(numerators, denominators)
    numerators, denominators = numerators // common, denominators // common
    least = 0 if rules.zero else 1
    integer = (denominators == 1) & (numerators >= least) & (numerators <= rules.max_value)
    fraction = (denominators > 1) & (denominators <= rules.max_denominator) & (numerators > 0)
    fraction &= numerators <= rules.max_numerator
    return numerators, denominators, legal & (integer | fraction)


def operations(rules: Rules) -> int:
    """How many of OPERATION_SIGNS a task has: smaller / larger is never an integer."""
    return REVERSED + 1 if rules.max_denominator > 1 else REVERSED


def _legal_results(rules: Rules, left: Int64, right: Int64) -> tuple[Int64, Int64]:
    """Numerators and denominators [R] of all legal results on codes [A] and [B], larger operand first."""
    (a, b), (c, d) = _decode(left[:, None]), _decode(right[None, :])
    swapped = a * d < c * b
    larger = np.where(swapped, right[None, :], left[:, None])
    smaller = np.where(swapped, left[:, None], right[None, :])
    numerators, denominators = [], []
    for operation in range(operations(rules)):
        n, d, legal = _apply(operation, larger, smaller, rules)
        numerators.append(n[legal])
        denominators.append(d[legal])
    return np.concatenate(numerators), np.concatenate(denominators)


def _results(rules: Rules, codes: Int64) -> Int16:
    """`NumberTable.results` for codes [V] in ascending order of value; entries with larger < smaller are ILLEGAL."""
    size = len(codes)
    results = np.full((operations(rules), size, size), ILLEGAL, dtype=np.int16)
    by_code = np.argsort(codes)
    ordered = codes[by_code]
    below = np.tri(size, dtype=np.bool_)
    for operation in range(len(results)):
        numerators, denominators, legal = _apply(operation, codes[:, None], codes[None, :], rules)
        wanted = np.where(legal, numerators, 0) * _BASE + denominators
        found = np.minimum(np.searchsorted(ordered, wanted), size - 1)
        index = np.where(ordered[found] == wanted, by_code[found], UNWRITTEN)
        results[operation] = np.where(legal & below, index, ILLEGAL)
    return results
