"""Numbers as people and models write them, read exactly; and the verifier for numeric answers.

Everything is a rational number read by a grammar of our own with bounds on digits and exponents, so nothing that a text
holds can make it slow. Edge cases decided here:
- `1,000`, `1 000`, `1\\,000`, `1{,}000` are a thousand; `1,22` is read as 1.22 only where a decimal comma is allowed.
- `1 1/2` and `1\\frac12` are mixed numbers; `-1 1/2` is -3/2.
- `0.\\overline{3}`, `0.(3)` and `0.333...` are one third.
- A decimal of at least 6 significant digits equals the exact number that it is the rounding or the cut of: `0.333333`
  is `1/3`, `0.33` is not. Of two decimals one stands for the other only from 6 decimals on: 16386.2 is not 16386.16.
- `60%` equals `60%`, `0.6` and `60`: problems that ask for a percentage are answered both ways.
- A unit on one side only is ignored; two units must measure the same: `300 cm` is `3 m`, `3 cm` is not. Words are
  units in `\\text{}` or where they are known; `loose` reading takes other words too (`18 eggs`) and single letters,
  but a letter that is no known unit must be gold's: `2 k` is not 2.
- `5 million` is 5000000, `minus 5` is -5; `5 squared`, `2 pi`, `3 quarters`, `5 below zero` are no plain numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from unicodedata import normalize

from mcts.types import Status, Verdict
from mcts.verify.base import check_partial, refuse
from mcts.verify.units import Unit, is_known, read_unit

MAX_DIGITS = 400
"""Most digits in one number."""
MAX_EXPONENT = 400
"""Largest power of ten, either way."""
ROUNDED_DIGITS = 6
"""Significant digits that a decimal needs to stand for a longer number."""

_GROUPED = r"[1-9]\d{0,2}(?:,\d{3})+(?!\d)|[1-9]\d{0,2}(?: \d{3})+(?!\d)"
_WHOLE = rf"(?:{_GROUPED}|\d+)"
_FRAC = r"\\[dtc]?frac\s*(?:\{\s*(-?\s*\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))"
_REPEAT = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{?\s*(\d+)\s*\}?|\((\d+)\))")
_ELLIPSIS = re.compile(r"(\d*)\.(\d+)\s*(?:\.\.\.|…|\\l?dots)")
_MIXED = re.compile(rf"(\d+)\s*(?:{_FRAC})|(\d+)\s+(\d+)\s*/\s*(\d+)")
_FRACTION = re.compile(rf"{_FRAC}|({_WHOLE})\s*/\s*({_WHOLE})(?![\d./])")
_DECIMAL = re.compile(
    rf"((?:{_WHOLE})?)(?:\.(\d*))?(?:[eE]\s*\{{?([+-]?\d+)\}}?|\s*(?:\\times|\\cdot|\*|×|x|·)\s*10\s*\^\s*\{{?\s*([+\-−]?\s*\d+)\s*\}}?)?"
)
_COMMA_DECIMAL = re.compile(r"(?:\d+,(?:\d{1,2}|\d{4,})|0,\d+)(?![,\d])")
_OPEN = re.compile(
    r"^\s*(?:\\\$|[$€£]|\\text\{\s*\$\s*\})?\s*((?i:[+\-−–]|(?:minus|negative)\s))?\s*((?:\\\$|[$€£])?)\s*"
)


_RAISED_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_RAISED = re.compile(r"⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_WRAPPED_NUMBER = re.compile(r"\\(?:text|mbox|mathrm|mathbf|textbf|boldsymbol)\s*\{\s*([-+−$]?\s*\d[^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Number:
    """A number with what stood around it."""

    value: Fraction
    """Without the percent sign: 60% is 60 with `percent`."""
    digits: int | None = None
    """Decimals written after the point, for a decimal; None for a number that is exact by its form (`1/3`)."""
    percent: bool = False
    unit: Unit | None = None
    cut: bool = False
    """`3.14...`: the digits go on."""

    def same(self, other: Number) -> bool:
        return bool(self.sameness(other))

    def sameness(self, other: Number) -> str:
        """Why `other` is the same as this one, gold, in a few words; empty if it is not."""
        if self.percent != other.percent:
            if _close(self, other) or _close(self._scaled(), other._scaled()):
                return "equal as a percentage"
            return ""
        if self.unit is None and other.unit is not None and other.unit.is_letter:
            return ""  # `2 k` for 2
        if self.unit is not None and other.unit is not None:
            if self.unit.dimension != other.unit.dimension:
                return ""
            if self.unit.factor != other.unit.factor:
                return (
                    "equal in other units" if self.value * self.unit.factor == other.value * other.unit.factor else ""
                )
        return _close(self, other)

    def _scaled(self) -> Number:
        """60% as 0.6."""
        if not self.percent:
            return self
        return replace(self, value=self.value / 100, digits=None if self.digits is None else self.digits + 2)


def _close(a: Number, b: Number) -> str:
    if a.value == b.value:
        return "equal numbers" if not (a.cut or b.cut) else ""
    for short, long in ((a, b), (b, a)):
        if short.digits is None or (long.digits is not None and not long.digits > short.digits >= ROUNDED_DIGITS):
            continue
        if stands_for(short.value, short.digits, long.value):
            return "equal to the digits given"
    return ""


def stands_for(decimal: Fraction, digits: int, exact: Fraction) -> bool:
    """Is `decimal`, written with `digits` decimals, the rounding or the cut of `exact`, with enough digits?"""
    if abs(decimal.numerator) * 10**digits < 10 ** (ROUNDED_DIGITS - 1) * decimal.denominator:
        return False
    step = Fraction(1, 10**digits)
    rounded = abs(decimal - exact) * 2 <= step
    cut = decimal * exact > 0 and 0 <= abs(exact) - abs(decimal) < step
    return rounded or cut


def tidy(text: str) -> str:
    """White space of TeX as spaces, its thousands separators as commas, one outer pair of `$` or `\\(` taken off."""
    text = text.strip()
    for left, right in (("$$", "$$"), ("\\(", "\\)"), ("\\[", "\\]"), ("$", "$")):
        if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right):
            inner = text[len(left) : -len(right)]
            if left not in inner:
                text = inner.strip()
                break
    text = re.sub(r"(?:\\\\\s*)+$", "", text)
    wrapped = _WRAPPED_NUMBER.fullmatch(text)
    text = wrapped[1] if wrapped is not None else text
    text = _VULGAR.sub(lambda match: rf"\frac{{{'}{'.join(normalize('NFKC', match[0]).split('⁄'))}}}", text)
    text = _RAISED.sub(lambda match: f"^{{{match[0].translate(_RAISED_DIGITS)}}}", text)
    text = re.sub(r"\s*\{\s*,\s*\}\s*", ",", re.sub(r"\\!\s*", "", text))
    text = re.sub(r"(?<!\\)\\(?:[,;: ]|quad|qquad)|~|\u00a0|\u2009|\u202f", " ", text)
    text = re.sub(r"\\(?:left|right|displaystyle|big|Big)(?![A-Za-z])", "", text)
    return text.replace("−", "-").strip()


def read_number(text: str, *, comma: bool = False, loose: bool = False) -> Number | None:
    """The number that the whole text is, None for any other text or one beyond the bounds.

    comma: read `1,22` as 1.22.
    loose: any words and letters behind it are its unit; else only units that are known or stand in `\\text{}`, since
    `2k` and `3 m` may be products.
    """
    if len(text) > 4 * MAX_DIGITS:
        return None
    text = tidy(text)
    opened = _OPEN.match(text)
    money = "" if opened is None else re.sub(r"[^$€£]", "", opened[0])
    sign = -1 if opened is not None and opened[1] not in (None, "+") else 1
    rest = text[opened.end() :] if opened is not None else text
    if comma and (dotted := _COMMA_DECIMAL.match(rest)) is not None:
        rest = dotted[0].replace(",", ".") + rest[dotted.end() :]
    found = _magnitude(rest)
    if found is None:
        return None
    number, end = found
    tail = _tail(rest[end:], loose)
    if tail is None:
        return None
    percent, unit_text, scale = tail
    if money:
        if unit_text and read_unit(unit_text) != read_unit(money[0]):
            return None
        unit_text = money[0]
    unit = read_unit(unit_text)
    return replace(number, value=sign * scale * number.value, percent=percent, unit=unit)


def _magnitude(text: str) -> tuple[Number, int] | None:
    """The unsigned number at the start of a text, and where it ends."""
    match = _MIXED.match(text)
    if match is not None:
        whole = match[1] or match[6]
        top, bottom = _first(match[2], match[3], match[7]), _first(match[4], match[5], match[8])
        fraction = _ratio(top, bottom)
        if fraction is None or fraction < 0 or len(whole) > MAX_DIGITS:
            return None
        if fraction < 1 or match[1]:  # `1 000/3` is no mixed number
            return Number(int(whole) + fraction), match.end()
    match = _FRACTION.match(text)
    if match is not None:
        top, bottom = _first(match[1], match[2], match[5]), _first(match[3], match[4], match[6])
        ratio = _ratio(top, bottom)
        return None if ratio is None else (Number(ratio), match.end())
    match = _REPEAT.match(text)
    if match is not None:
        return _repeating(match[1], match[2], _first(match[3], match[4])), match.end()
    match = _ELLIPSIS.match(text)
    if match is not None:
        block = _period(match[2])
        if block is not None:
            return _repeating(match[1], match[2], block), match.end()
        if len(match[0]) > MAX_DIGITS:
            return None
        return Number(Fraction(f"{match[1] or 0}.{match[2]}"), len(match[2]), cut=True), match.end()
    match = _DECIMAL.match(text)
    if match is None or not (match[1] or match[2]):
        return None
    whole = re.sub(r"[ ,]", "", match[1]) or "0"
    decimals = match[2] or ""
    exponent_text = re.sub(r"\s", "", match[3] or match[4] or "0").replace("−", "-")
    if len(whole) + len(decimals) > MAX_DIGITS or len(exponent_text) > 4 or abs(int(exponent_text)) > MAX_EXPONENT:
        return None
    exponent = int(exponent_text)
    value = Fraction(f"{whole}.{decimals or 0}") * Fraction(10) ** exponent
    digits = max(0, len(decimals) - exponent)
    return Number(value, digits if decimals else None), match.end()


def _first(*groups: str | None) -> str:
    return next((group for group in groups if group is not None), "")


def _ratio(top: str, bottom: str) -> Fraction | None:
    top, bottom = re.sub(r"[ ,]", "", top), re.sub(r"[ ,]", "", bottom)
    if not top or not bottom or len(top) + len(bottom) > MAX_DIGITS or int(bottom) == 0:
        return None
    return Fraction(int(top), int(bottom))


def _repeating(whole: str, start: str, block: str) -> Number:
    head = Fraction(f"{whole or 0}.{start or 0}")
    return Number(head + Fraction(int(block), (10 ** len(block) - 1) * 10 ** len(start)))


def _period(digits: str) -> str | None:
    """The block of digits that a written-out decimal repeats at its end, at least three times over (`333`, `1666`,
    `272727`); None where there is none."""
    for length in range(1, len(digits) // 3 + 1):
        block = digits[-length:]
        if digits.endswith(block * 3):
            return block
    return None


_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textnormal|textrm|textbf|mathbf|textit|operatorname)\s*\{([^{}]*)\}")
_WORD = r"[A-Za-zµ°€£¢$]+\.?(?:[A-Za-z]\.)?(?:\s*\^\s*\{?[23]\}?|[²³])?"
_UNIT = re.compile(rf"{_WORD}(?:(?:\s+|\s*[/\-]\s*){_WORD}){{0,5}}\.?")
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NO_UNITS = frozenset(
    """
    pi tau phi theta alpha beta gamma sigma omega lambda i e x y z sqrt root sin cos tan cot sec csc log ln
    exp inf infinity infty and or not nor but plus minus times divided over mod modulo choose factorial
    squared cubed half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh
    sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths percent pct
    percentage base is to by if maybe either zero below negative wrong incorrect false never none remainder
    doubled tripled
    """.split()  # noqa: SIM905
)
"""Words behind a number that change or hedge it, and so are no units."""
_PARTS = re.compile(r".*(?:teenth|tieth|leventh|elfth|illionth)s?")


def _tail(text: str, loose: bool) -> tuple[bool, str, int] | None:
    """(percent sign?, unit, scale) of what follows a number; None where it is none of these."""
    wrapped = _TEXT.search(text) is not None
    adjacent = text[:1].isalpha()
    text = _TEXT.sub(r" \1", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree", "°", text).replace("\\$", "$").strip()
    if not re.search(r"[A-Za-z]\.\s?[A-Za-z]\.$", text):
        text = text.rstrip(". \n")
    if re.fullmatch(r"\\?%|(?i:percent|pct|percentage|per cent)", text):
        return True, "", 1
    if not text or text == "$":
        return False, text, 1
    if not _UNIT.fullmatch(text):
        return None
    words = re.split(r"[\s/\-]+", text.lower())
    scale = 1
    while words and words[0].removesuffix("s") in _SCALES and not adjacent:
        scale *= _SCALES[words[0].removesuffix("s")]
        words, text = words[1:], text[len(words[0]) :].strip()
    plain = [re.split(r"[\^²³.]", word)[0] for word in words]
    if any(_changes(word) for word in plain) and not re.fullmatch(r"(?i:\w+ (?:squared|cubed))", text):
        return None
    if not wrapped and any(not (loose or is_known(word)) or (adjacent and not is_known(word)) for word in plain):
        return None
    if not wrapped and not loose and any(len(word) == 1 and word.isalpha() for word in plain):
        return None
    return False, text, scale


def _changes(word: str) -> bool:
    """Does a word (lower case) behind a number change or hedge it, so that it is no unit?"""
    return word in _NO_UNITS or _PARTS.fullmatch(word) is not None


def is_unit(text: str) -> bool:
    """Is a text behind a formula its unit, and nothing that changes it (`percent`, `million`, another number)?"""
    tail = _tail(text, loose=True)
    return tail is not None and not tail[0] and tail[2] == 1


class NumberVerifier:
    """`number`: numeric answers, as in GSM8K.

    partial: reward of a WRONG answer that is a well-formed number of gold's kind (ReFT's 0.1), in [0, 1).
    """

    name = "number"

    def __init__(self, partial: float = 0.0) -> None:
        self.partial = check_partial(partial)

    def verify(self, gold: str, prediction: str) -> Verdict:
        objection = refuse(gold, prediction)
        if objection is not None:
            return objection
        wanted, given = read_number(gold, comma=True, loose=True), read_number(prediction, comma=True, loose=True)
        if wanted is None:
            return Verdict(Status.UNPARSABLE, 0.0, prediction, "gold is no number")
        if given is None:
            return Verdict(Status.UNPARSABLE, 0.0, prediction, "the prediction is no number")
        why = wanted.sameness(given)
        if why:
            return Verdict(Status.CORRECT, 1.0, prediction, why)
        return Verdict(Status.WRONG, self.partial, prediction, difference(wanted, given))


def difference(wanted: Number, given: Number) -> str:
    """How two numbers differ, in a few words."""
    if wanted.unit is not None and given.unit is not None and wanted.unit.dimension != given.unit.dimension:
        return f"unit {given.unit.dimension}, not {wanted.unit.dimension}"
    return "another number"
