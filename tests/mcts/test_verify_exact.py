"""Verdicts on hand-made steps and expressions, hostile ones included."""

from __future__ import annotations

import ast
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcts.types import Status
from mcts.verify.exact import (
    OPERATORS,
    Rules,
    combine,
    compose,
    format_number,
    judge_expression,
    judge_step,
    numbers_left,
    parse_number,
)

WHOLE = Rules(max_value=999)
FRACTIONS = Rules(max_value=169, max_numerator=24, max_denominator=13, zero=True)
FINE, WRONG, UNPARSABLE, CORRECT = None, Status.WRONG, Status.UNPARSABLE, Status.CORRECT

HOSTILE = [
    "",
    " ",
    ";",
    "|",
    "\0",
    "7 * 3 = 21 | 12 21 ;\0",
    "7 * 3 = 21 \0 12 21 ;",
    "__import__('os').system('true')",
    "__import__ * 3 = 21 | 12 21 ;",
    "10**10**10",
    "7 ** 3 = 343 | 12 343 ;",
    "9 ** 9 ** 9 ** 9",
    "(" * 200 + "7" + ")" * 200 + "+",
    "9" * 100_000,
    "7 * 3 = " + "9" * 5000 + " | 12 21 ;",
    "7 * 3 = 21 | 12 " + "1" * 300 + " ;",
    "7 × 3 = 21 | 12 21 ;",
    "٧ * 3 = 21 | 12 21 ;",
    "７ * 3 = 21 | 12 21 ;",
    "7 * ³ = 21 | 12 21 ;",
    "7.0 * 3 = 21 | 12 21 ;",
    "7e0 * 3 = 21 | 12 21 ;",
    "07 * 3 = 21 | 12 21 ;",
    "0x7 * 3 = 21 | 12 21 ;",
    "1_0 * 3 = 21 | 12 21 ;",
    "nan * inf = nan | nan nan ;",
    "lambda: 0",
    "{7}",
    "%s" * 50,
]


@pytest.mark.parametrize(
    ("step", "left", "rules", "expected"),
    [
        ("7 * 3 = 21 | 12 21 ;", "3 7 12", WHOLE, FINE),
        ("3 * 7 = 21 | 21 12 ;", "3 7 12", WHOLE, FINE),
        ("  7 * 3 = 21 | 12 21 ; ", "3 7 12", WHOLE, FINE),
        ("12 - 7 = 5 | 3 5 ;", "3 7 12", WHOLE, FINE),
        ("12 / 3 = 4 | 7 4 ;", "3 7 12", WHOLE, FINE),
        ("3 + 3 = 6 | 3 6 ;", "3 3 3", WHOLE, FINE),
        ("21 + 12 = 33", "12 21", WHOLE, FINE),
        ("21 - 12 = 9", "12 21", WHOLE, FINE),  # legal, whatever the target
        ("7 * 3 = 22 | 12 22 ;", "3 7 12", WHOLE, WRONG),  # arithmetic
        ("7 * 7 = 49 | 12 49 ;", "3 7 12", WHOLE, WRONG),  # a number used twice
        ("8 * 3 = 24 | 12 24 ;", "3 7 12", WHOLE, WRONG),  # a number that is not there
        ("7 * 3 = 21 | 21 ;", "3 7 12", WHOLE, WRONG),  # a number goes missing
        ("7 * 3 = 21 | 12 12 21 ;", "3 7 12", WHOLE, WRONG),  # a number too many
        ("7 * 3 = 21 | 12 22 ;", "3 7 12", WHOLE, WRONG),  # another number left
        ("7 * 3 = 21 | 3 7 12 21 ;", "3 7 12", WHOLE, WRONG),  # operands kept
        ("7 / 3 = 7/3 | 12 7/3 ;", "3 7 12", WHOLE, WRONG),  # fraction
        ("7 / 3 = 2 | 12 2 ;", "3 7 12", WHOLE, WRONG),  # rounded
        ("3 - 3 = 0 | 3 0 ;", "3 3 3", WHOLE, WRONG),  # zero
        ("3 - 7 = -4 | 12 -4 ;", "3 7 12", WHOLE, WRONG),  # negative
        ("3 - 7 = 4 | 12 4 ;", "3 7 12", WHOLE, WRONG),  # wrong way round
        ("12 * 90 = 1080 | 3 1080 ;", "3 12 90", WHOLE, WRONG),  # beyond the limit
        ("5 + 5 = 10", "5", WHOLE, WRONG),  # play is over
        ("7 * 3 = 021 | 12 021 ;", "3 7 12", WHOLE, UNPARSABLE),
        ("7 * 3 = 21 | 12 21", "3 7 12", WHOLE, UNPARSABLE),  # no delimiter
        ("7 * 3 = 21", "3 7 12", WHOLE, UNPARSABLE),  # what is left?
        ("7 * 3 = 21 ;", "3 7 12", WHOLE, UNPARSABLE),
        ("7 * 3 = 21 | ;", "3 7 12", WHOLE, UNPARSABLE),
        ("7 * 3 = 21 | 12 x ;", "3 7 12", WHOLE, UNPARSABLE),
        ("7 * 3 = x | 12 x ;", "3 7 12", WHOLE, UNPARSABLE),
        ("21 + 12 = 33 | 33 ;", "12 21", WHOLE, UNPARSABLE),
        ("21 + 12 = 33 ;", "12 21", WHOLE, UNPARSABLE),
        ("21 12 + = 33", "12 21", WHOLE, UNPARSABLE),
        ("7*3=21 | 12 21 ;", "3 7 12", WHOLE, UNPARSABLE),  # one token per word
        ("8 / 3 = 8/3 | 3 8 8/3 ;", "3 3 8 8", FRACTIONS, FINE),
        ("3 - 8/3 = 1/3 | 8 1/3 ;", "3 8 8/3", FRACTIONS, FINE),
        ("8 / 1/3 = 24", "8 1/3", FRACTIONS, FINE),
        ("3 - 3 = 0 | 8 8 0 ;", "3 3 8 8", FRACTIONS, FINE),
        ("8 / 0 = 0", "8 0", FRACTIONS, WRONG),  # division by zero
        ("0 / 8 = 0", "8 0", FRACTIONS, FINE),
        ("8 / 6 = 8/6 | 3 8/6 ;", "8 6 3", FRACTIONS, UNPARSABLE),  # not reduced
        ("8 / 4 = 2/1 | 3 2/1 ;", "8 4 3", FRACTIONS, UNPARSABLE),
        ("1/12 / 2 = 1/24", "1/12 2", FRACTIONS, WRONG),  # beyond the limit
    ],
)
def test_step_verdicts(step: str, left: str, rules: Rules, expected: Status | None) -> None:
    verdict = judge_step(step, left.split(), rules)
    assert (verdict and verdict.status) == expected, verdict
    assert verdict is None or (verdict.reward == 0.0 and verdict.why)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_refused_at_once(text: str) -> None:
    began = time.perf_counter()
    step = judge_step(text, ["3", "7", "12"], WHOLE)
    assert step is not None
    assert step.status is UNPARSABLE
    assert judge_expression(text, [3, 7, 12], 33, WHOLE).status is UNPARSABLE
    assert compose([text, text], ["3", "7", "12"]) is None
    assert time.perf_counter() - began < 0.5


@pytest.mark.parametrize(
    ("expression", "rules", "expected"),
    [
        ("(7 * 3) + 12", WHOLE, CORRECT),
        ("7 * 3 + 12", WHOLE, CORRECT),
        ("12+7*3", WHOLE, CORRECT),
        (" ( (12) + ((3)*7) ) ", WHOLE, CORRECT),
        ("7 * (3 + 12)", WHOLE, WRONG),
        ("33", WHOLE, WRONG),
        ("12 + 21", WHOLE, WRONG),
        ("7 * 3 + 12 + 12", WHOLE, WRONG),  # twice
        ("7 * 3 + 12 * 3 / 3", WHOLE, WRONG),  # the value is right, the 3 used three times
        ("7 * 3", WHOLE, WRONG),  # unused
        ("3 - 7 + 37", WHOLE, WRONG),
        ("7 / (3 - 12)", WHOLE, WRONG),
        ("12 / (7 - 7)", WHOLE, WRONG),
        ("12 + * 3 7", WHOLE, UNPARSABLE),
        ("7 * 3 + 12 = 33", WHOLE, UNPARSABLE),
        ("(7 * 3 + 12", WHOLE, UNPARSABLE),
        ("7 * 3) + 12", WHOLE, UNPARSABLE),
        ("()", WHOLE, UNPARSABLE),
        ("7 (3) 12", WHOLE, UNPARSABLE),
        ("-7 * 3 + 12", WHOLE, UNPARSABLE),
        ("7 3 12", WHOLE, UNPARSABLE),
        ("7 * 3 + 12 #", WHOLE, UNPARSABLE),
        ("07 * 3 + 12", WHOLE, UNPARSABLE),
    ],
)
def test_expression_verdicts(expression: str, rules: Rules, expected: Status) -> None:
    verdict = judge_expression(expression, [3, 7, 12], 33, rules)
    assert verdict.status == expected, verdict
    assert verdict.reward == (1.0 if expected is CORRECT else 0.0)


def test_rules_bind_every_operation_of_an_expression() -> None:
    """(3 - 7) * (2 - 12) is 40: a win where negatives may stand on the way, not where they may not."""
    assert judge_expression("(3 - 7) * (2 - 12)", [2, 3, 7, 12], 40, None).won
    assert judge_expression("(3 - 7) * (2 - 12)", [2, 3, 7, 12], 40, WHOLE).status is WRONG
    assert judge_expression("8 / (3 - 8 / 3)", [3, 3, 8, 8], 24, None).won
    assert judge_expression("8 / (3 - 8 / 3)", [3, 3, 8, 8], 24, WHOLE).status is WRONG
    assert judge_expression("8 / (3 - 3)", [3, 3, 8], 24, None).why == "division by zero"


def test_equal_numbers_are_counted() -> None:
    assert judge_expression("5 * 5 - 5", [5, 5, 5], 20, WHOLE).won
    assert judge_expression("5 * 5 - 5", [5, 5, 5, 5], 20, WHOLE).status is WRONG
    assert judge_expression("5 * 5 - 5 + 5 - 5", [5, 5, 5], 20, WHOLE).status is WRONG


def test_operators_of_one_rank_bind_to_the_left() -> None:
    assert judge_expression("12 - 7 - 3", [3, 7, 12], 2, WHOLE).won
    assert judge_expression("12 / 6 * 2", [2, 6, 12], 4, WHOLE).won


EXPRESSIONS = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.one_of(
        inner.map(lambda text: f"({text})"),
        st.tuples(inner, st.sampled_from(OPERATORS), inner).map(" ".join),
        st.tuples(inner, st.sampled_from(OPERATORS), inner).map("".join),
    ),
    max_leaves=8,
)


@given(st.text(alphabet="0123456789+-*/() =|;", max_size=12))
def test_what_is_parsed_is_an_expression_to_python_too(text: str) -> None:
    if judge_expression(text, [1], 1, None).status is not UNPARSABLE:
        ast.parse(text.strip(), mode="eval")


@given(EXPRESSIONS)
def test_expressions_have_the_value_that_fractions_give(text: str) -> None:
    """Against Python's own parser and Fraction."""
    assert judge_expression(text, [1], 1, None).status is not UNPARSABLE

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            a, b = value(node.left), value(node.right)
            match node.op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Div():
                    return a / b
        assert isinstance(node, ast.Constant), node
        return Fraction(node.value)

    tree = ast.parse(text.strip(), mode="eval").body
    used = sorted(n.value for n in ast.walk(tree) if isinstance(n, ast.Constant))
    try:
        exact = value(tree)
    except ZeroDivisionError:
        assert judge_expression(text, used, 1, None).why == "division by zero"
        return
    if exact.denominator == 1:
        assert judge_expression(text, used, exact.numerator, None).won
        assert not judge_expression(text, used, exact.numerator + 1, None).won


@given(st.fractions(), st.sampled_from(OPERATORS), st.fractions())
def test_combine_agrees_with_fractions(a: Fraction, operator: str, b: Fraction) -> None:
    found = combine(a.as_integer_ratio(), operator, b.as_integer_ratio())
    if operator == "/" and b == 0:
        assert found is None
    else:
        expected = {"+": a.__add__, "-": a.__sub__, "*": a.__mul__, "/": a.__truediv__}[operator](b)
        assert found == expected.as_integer_ratio()


@given(st.fractions(min_value=0, max_denominator=999, max_value=10**8))
def test_a_number_has_one_spelling(value: Fraction) -> None:
    pair = value.as_integer_ratio()
    if max(pair) < 10**9:
        assert parse_number(format_number(pair)) == pair


@pytest.mark.parametrize(
    "word", ["", "07", "00", "4/2", "8/1", "3/0", "0/3", "/", "1/", "/2", "1/2/3", "-3", "+3", "3 ", "²", "٣"]
)
def test_other_spellings_are_no_numbers(word: str) -> None:
    assert parse_number(word) is None


def test_numbers_left_are_those_after_the_bar() -> None:
    assert numbers_left("7 * 3 = 21 | 12 21 ;") == ["12", "21"]
    assert numbers_left("21 + 12 = 33") == ["33"]
    assert numbers_left("21 + 12") is None


def test_compose_follows_values_and_uses_each_number_once() -> None:
    assert compose(["7 * 3 = 21 | 12 21 ;", "21 + 12 = 33"], ["3", "7", "12"]) == "(7 * 3) + 12"
    steps = ["5 + 5 = 10 | 5 5 10 ;", "5 + 5 = 10 | 10 10 ;", "10 * 10 = 100"]
    text = compose(steps, ["5"] * 4)
    assert text == "(5 + 5) * (5 + 5)"
    assert judge_expression(text, [5] * 4, 100, WHOLE).won
    assert compose(["7 * 3 = 21 | 12 21 ;"], ["3", "7", "12"]) is None
    assert compose(["7 * 3 = 21 | 12 21 ;", "9 + 12 = 21"], ["3", "7", "12"]) is None


def test_a_false_result_wins_nothing() -> None:
    """Steps that were never checked cannot smuggle a target in: the expression is judged by its own value."""
    text = compose(["7 * 3 = 12 | 12 12 ;", "12 + 12 = 33"], ["3", "7", "12"])
    assert text is not None
    assert judge_expression(text, [3, 7, 12], 33, WHOLE).won  # 7 * 3 is 21 in truth
    assert not judge_expression(text, [3, 7, 12], 24, WHOLE).won
