"""Are two formulas the same, and is a constant zero? Runs in a worker only, with math-verify's parser and sympy.

Two formulas are equal if their difference vanishes at points where both are defined, each evaluated until it has 15
correct digits or until 1,000 digits of the terms have cancelled.
"""

from __future__ import annotations

from fractions import Fraction

import sympy
from sympy.core.evalf import PrecisionExhausted
from sympy.core.function import AppliedUndef

from mcts.verify.forms import Expression, Reading
from mcts.verify.formula import parse
from mcts.verify.number import Number, stands_for

CANCELLED_DIGITS = 1000
_POINTS = (
    ("3/7", "5/11", "13/17", "19/23"),
    ("-8/5", "9/7", "-6/13", "21/19"),
    ("29/11", "-31/17", "37/13", "-2/23"),
)
_FAR_POINTS = (("10007/3", "-9001/7", "8009/5", "-7013/9"), ("-10009/7", "9011/4", "-8011/3", "7019/8"))
"""Beyond where a formula made of pieces (`|x-3|`) changes its form, as small points may not be."""
_FACTORIALS = (sympy.factorial, sympy.binomial, sympy.gamma)
_PIECES = (sympy.Abs, sympy.Max, sympy.Min, sympy.Piecewise, sympy.sign)
"""Values of the first, second, ... variable, one row for each point; further variables repeat them, scaled."""


def value(reading: Reading) -> sympy.Expr | None:
    """A number or formula as sympy has it; None for anything else."""
    if isinstance(reading, Number):
        rational: sympy.Expr = sympy.Rational(reading.value.numerator, reading.value.denominator)
        return rational / 100 if reading.percent else rational
    return parse(reading.latex) if isinstance(reading, Expression) else None


def is_constant(reading: Reading) -> bool:
    """Is it a number or formula without variables?"""
    found = value(reading)
    return found is not None and not found.free_symbols and not found.atoms(AppliedUndef)


def same_formula(gold: Number | Expression, given: Number | Expression) -> bool:
    """Are two numbers or formulas equal? A decimal also stands for what rounds to it, percent for its hundredth; a unit
    counts where both have one."""
    if gold.unit is not None and given.unit is not None and gold.unit != given.unit:
        return False
    if gold.unit is None and given.unit is not None and given.unit.is_letter:
        return False
    a, b = value(gold), value(given)
    assert a is not None
    assert b is not None
    for number, other in ((gold, b), (given, a)):
        if isinstance(number, Number) and number.digits is not None and not other.free_symbols and other.is_real:
            close = sympy.N(other, number.digits + 30)
            exact = number.value
            if close.is_Float and stands_for(exact, number.digits, _fraction(close)):
                return True
    if equal(a, b):
        return True
    percent = [isinstance(reading, Number) and reading.percent for reading in (gold, given)]
    return percent[0] != percent[1] and equal(a * 100, b) if percent[0] else percent[1] and equal(a, b * 100)


def _fraction(number: sympy.Float) -> Fraction:
    rational = sympy.Rational(number)
    return Fraction(int(rational.p), int(rational.q))


def equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Are two formulas equal, as functions of their variables?"""
    if a == b:
        return True
    if not isinstance(a, sympy.Expr) or not isinstance(b, sympy.Expr):
        return bool(a == b)
    difference = plain(a - b)
    symbols = sorted(difference.free_symbols, key=str)
    if not symbols:
        zero = is_zero(difference)
        return bool(zero) if zero is not None else False
    if difference.has(*_FACTORIALS) and sympy.combsimp(difference) == 0:
        return True  # at points, they take minutes to cancel
    verdicts = []
    for point in _POINTS + (_FAR_POINTS if _in_pieces(difference) else ()):
        scale = [sympy.Rational(point[i % 4]) * (1 + i // 4) for i in range(len(symbols))]
        zero = is_zero(difference.subs(dict(zip(symbols, scale, strict=True))))
        if zero is False:
            return False
        verdicts.append(zero)
    return any(verdicts) or sympy.simplify(difference) == 0


def _in_pieces(formula: sympy.Expr) -> bool:
    """Does it hold an absolute value, a maximum, or an even root, which may be one?"""
    powers = formula.atoms(sympy.Pow)
    return formula.has(*_PIECES) or any(power.exp.is_Rational and power.exp.q % 2 == 0 for power in powers)


def plain(difference: sympy.Expr) -> sympy.Expr:
    """Unknown functions as variables: `f(2)` is one, `f(3)` another."""
    applied = sorted(difference.atoms(AppliedUndef), key=str)
    return difference.subs({f: sympy.Symbol(f"function_{f}") for f in applied}) if applied else difference


def is_zero(constant: sympy.Expr) -> bool | None:
    """Is a constant zero? None where it is not defined."""
    if constant.is_Rational:
        return bool(constant == 0)
    if constant.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo):
        return None
    for part in constant.as_real_imag() if constant.has(sympy.I) else (constant,):
        try:
            if part.is_Rational:
                if part != 0:
                    return False
                continue
            number = part.evalf(15, maxn=CANCELLED_DIGITS, strict=True)
        except PrecisionExhausted:
            continue  # it cancelled to the last digit
        if (
            not number.is_number
            or number.has(sympy.nan, sympy.zoo)
            or (not number.is_comparable and not number.has(sympy.I))
        ):
            return None
        if number != 0:
            return False
    return True
