"""Exact arithmetic on text that a model wrote: steps of a number game, and its final expression.

Everything is rational arithmetic on pairs of ints with a parser of our own: nothing is ever evaluated, and no
text can make it slow (lengths and digits are bounded before any arithmetic). Edge cases that are decided here:
a number has one spelling (`7`, `8/3`; not `07`, `4/2`, `8/1`, `+7`, nor digits outside ASCII), a result that the
rules forbid is WRONG even when the arithmetic holds, and text that is no step or no expression is UNPARSABLE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mcts.types import Status, Verdict

Rational = tuple[int, int]
"""(numerator, denominator), reduced, denominator > 0."""

OPERATORS = ("+", "-", "*", "/")
MAX_DIGITS = 9
"""Longest digit string that is still read as a number."""
MAX_TEXT = 400
"""Longest step or expression that is looked at, in characters."""

_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_DIGITS = frozenset("0123456789")


@dataclass(frozen=True, slots=True)
class Rules:
    """Which results of an operation are legal."""

    max_value: int
    """Largest integer."""
    max_numerator: int = 0
    """Largest numerator of a result that is no integer."""
    max_denominator: int = 1
    """Largest denominator; 1: integers only."""
    zero: bool = False
    """May a result be zero?"""

    def objection(self, value: Rational) -> str:
        """Why a result is illegal, as the end of a sentence ("12 - 12 is ..."); empty if it is legal."""
        numerator, denominator = value
        if numerator < 0:
            return "negative"
        if numerator == 0 and not self.zero:
            return "zero"
        if denominator == 1:
            return "" if numerator <= self.max_value else f"more than {self.max_value}"
        if self.max_denominator == 1:
            return "no whole number"
        if numerator > self.max_numerator or denominator > self.max_denominator:
            return f"beyond {self.max_numerator} above or {self.max_denominator} below the fraction bar"
        return ""


def parse_number(word: str) -> Rational | None:
    """The value of a number word, `21` or `8/3`; None for any other text, other spellings of a number included."""
    top, bar, bottom = word.partition("/")
    numerator = _integer(top)
    if not bar:
        return None if numerator is None else (numerator, 1)
    denominator = _integer(bottom)
    if numerator is None or denominator is None or denominator < 2 or math.gcd(numerator, denominator) != 1:
        return None
    return numerator, denominator


def _integer(word: str) -> int | None:
    if not (word.isdigit() and word.isascii()) or len(word) > MAX_DIGITS:
        return None
    return int(word) if word[0] != "0" or word == "0" else None


def format_number(value: Rational) -> str:
    """The one spelling of a value: `21`, `8/3`, `-2`."""
    numerator, denominator = value
    return str(numerator) if denominator == 1 else f"{numerator}/{denominator}"


def combine(left: Rational, operator: str, right: Rational) -> Rational | None:
    """`left operator right`, exactly; None for a division by zero. `operator` is one of OPERATORS."""
    a, b = left
    c, d = right
    if operator == "+":
        numerator, denominator = a * d + c * b, b * d
    elif operator == "-":
        numerator, denominator = a * d - c * b, b * d
    elif operator == "*":
        numerator, denominator = a * c, b * d
    else:
        if c == 0:
            return None
        numerator, denominator = a * d, b * c
        if denominator < 0:
            numerator, denominator = -numerator, -denominator
    if denominator == 1:
        return numerator, 1
    common = math.gcd(numerator, denominator)
    return numerator // common, denominator // common


def wrong(why: str, extracted: str | None = None) -> Verdict:
    return Verdict(Status.WRONG, 0.0, extracted, why)


def unparsable(why: str) -> Verdict:
    return Verdict(Status.UNPARSABLE, 0.0, None, why)


def judge_step(text: str, left: Sequence[str], rules: Rules) -> Verdict | None:
    """Judge one step against the number words `left` before it; None: legal and right.

    With three or more numbers left a step reads `7 * 3 = 21 | 12 21 ;` (the numbers after it in any order), with
    two it is the last one and reads `21 + 12 = 33`. Operands may stand in either order where the rules allow the
    result. The last step may end at any legal number: whether it is the target is for the answer's check.
    """
    count = len(left)
    if len(text) > MAX_TEXT:
        return unparsable(f"a step of more than {MAX_TEXT} characters")
    words = text.split()
    if count < 2:
        return wrong("no two numbers are left to combine")
    if len(words) < 5 or words[3] != "=" or words[1] not in OPERATORS:
        return unparsable("a step must begin with an equation like 7 * 3 = 21")
    if count == 2:
        if len(words) != 5:
            return unparsable("the last step must be an equation alone, like 21 + 12 = 33")
    elif len(words) < 8 or words[5] != "|" or words[-1] != ";":
        return unparsable("the equation must be followed by | and the numbers left, and end with ;")
    first, operator, second, _, result = words[:5]
    a, b = parse_number(first), parse_number(second)
    if a is None or b is None:
        return unparsable("an operand is no number")
    rest = list(left)
    for operand in (first, second):
        if operand not in rest:
            twice = "any more" if operand in left else "among the numbers left"
            return wrong(f"{operand} is not there {twice}")
        rest.remove(operand)
    value = combine(a, operator, b)
    if value is None:
        return wrong("division by zero")
    spelled = format_number(value)
    if objection := rules.objection(value):
        return wrong(f"{first} {operator} {second} is {objection}")
    if result != spelled:
        if parse_number(result.removeprefix("-")) is None:
            return unparsable("the result is no number")
        return wrong(f"{first} {operator} {second} is {spelled}, not {result}")
    if count == 2:
        return None
    rest.append(result)
    written = words[6:-1]
    if written != rest and sorted(written) != sorted(rest):
        if any(parse_number(word) is None for word in written):
            return unparsable("something after | is no number")
        return wrong(f"the numbers left are {' '.join(rest)}, not {' '.join(written)}")
    return None


def numbers_left(step: str) -> list[str] | None:
    """The number words that a step which was judged fine leaves; None if the text is no step."""
    words = step.split()
    if len(words) == 5:
        return [words[4]]
    if len(words) < 8 or words[5] != "|" or words[-1] != ";":
        return None
    return words[6:-1]


def compose(steps: Sequence[str], numbers: Sequence[str]) -> str | None:
    """The expression that finished steps amount to, like `(7 * 3) + 12`; None if they do not use up `numbers`.

    Results are taken as keys only and never trusted: judge the expression to know its value.
    """
    if len(steps) != len(numbers) - 1:
        return None
    made: dict[str, list[str]] = {}
    for word in numbers:
        made.setdefault(word, []).append(word)
    expression = None
    for step in steps:
        words = step[: MAX_TEXT + 1].split()
        if len(words) < 5 or words[1] not in OPERATORS or words[3] != "=":
            return None
        operands = []
        for word in (words[0], words[2]):
            if not made.get(word):
                return None
            part = made[word].pop()
            operands.append(f"({part})" if " " in part else part)
        expression = f"{operands[0]} {words[1]} {operands[1]}"
        made.setdefault(words[4], []).append(expression)
    return expression


def judge_expression(text: str, numbers: Sequence[int], target: int, rules: Rules | None) -> Verdict:
    """CORRECT if `text` is an expression over + - * / and brackets that uses each of `numbers` exactly once,
    every operation legal under `rules` (None: any but a division by zero), with the exact value `target`."""
    if len(text) > MAX_TEXT:
        return unparsable(f"an expression of more than {MAX_TEXT} characters")
    postfix = _postfix(text)
    if postfix is None:
        return unparsable("not an expression of whole numbers, + - * / and brackets")
    used = sorted(item for item in postfix if isinstance(item, int))
    if used != sorted(numbers):
        return wrong(f"uses {_listed(used)} instead of {_listed(sorted(numbers))}", text)
    stack: list[Rational] = []
    for item in postfix:
        if isinstance(item, int):
            stack.append((item, 1))
            continue
        right = stack.pop()
        left = stack.pop()
        value = combine(left, item, right)
        if value is None:
            return wrong("division by zero", text)
        if rules is not None and (objection := rules.objection(value)):
            return wrong(f"{format_number(left)} {item} {format_number(right)} is {objection}", text)
        stack.append(value)
    if stack[0] != (target, 1):
        return wrong(f"the value is {format_number(stack[0])}, not {target}", text)
    return Verdict(Status.CORRECT, 1.0, text)


def _listed(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers)) if len(numbers) <= 8 else f"{len(numbers)} numbers"


def _postfix(text: str) -> list[int | str] | None:
    """Shunting-yard: ints and operators in postfix order; None if the text is no expression."""
    output: list[int | str] = []
    waiting: list[str] = []
    operand_next = True
    at = 0
    while at < len(text):
        char = text[at]
        at += 1
        if char in " \t\n":
            continue
        if char in _DIGITS:
            start = at - 1
            while at < len(text) and text[at] in _DIGITS:
                at += 1
            number = _integer(text[start:at])
            if number is None or not operand_next:
                return None
            output.append(number)
            operand_next = False
        elif char == "(":
            if not operand_next:
                return None
            waiting.append(char)
        elif operand_next:
            return None
        elif char == ")":
            while waiting and waiting[-1] != "(":
                output.append(waiting.pop())
            if not waiting:
                return None
            waiting.pop()
        elif char in _PRECEDENCE:
            while waiting and waiting[-1] != "(" and _PRECEDENCE[waiting[-1]] >= _PRECEDENCE[char]:
                output.append(waiting.pop())
            waiting.append(char)
            operand_next = True
        else:
            return None
    if operand_next or "(" in waiting:
        return None
    output.extend(reversed(waiting))
    return output
