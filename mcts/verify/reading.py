"""The structure of a mathematical answer, read from its text before any library sees it.

What a reading keeps is what a computer algebra system drops: which brackets stood around a pair, what each side of a
chain of equations says, the base of a numeral, the unit behind a number.
"""

from __future__ import annotations

import re

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
)
from mcts.verify.number import is_unit, read_number
from mcts.verify.tex import WRAPPED, Unreadable, clean, matching, split
from mcts.verify.units import read_unit

_WHOLE_WRAP = re.compile(rf"{WRAPPED}\s*\{{([^{{}}]*)\}}")
_AND = re.compile(rf"\s*,?\s*(?:{WRAPPED}\s*\{{\s*,?\s*(?:and|or)\s*\}}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*")
_NUMERAL = re.compile(
    rf"(?P<sign>-?)(?P<open>\()?(?P<wrap>{WRAPPED}\s*\{{\s*)?(?P<digits>[0-9A-Za-z]+)\s*(?(wrap)\}})(?(open)\))"
    rf"\s*_\s*\{{?\s*(?:{WRAPPED}\s*\{{\s*)?(?P<base>\d{{1,2}}|[a-z]+)\s*\}}*"
)
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
          "eleven": 11, "twelve": 12, "sixteen": 16}  # fmt: skip
_BASED = re.compile(r"[\d)]\s*_")
_PREFIXED = re.compile(r"(?<![\w.])0[xXbBoO][0-9A-Fa-f]")
_SLASH = re.compile(
    r"(?:/|\\div)\s*\d+(?:\.\d+)?\s*(?=[A-Za-z(]|\\(?!cdot|times|div|ast|pm|mp|begin|end|to|text|math|mbox|circ)[A-Za-z])"
)
"""`1/2x`: (1/2)x or 1/(2x)."""
_SIDE_BY_SIDE = re.compile(
    r"(?:[)}]|(?<![\\A-Za-z\d.])(?<!frac )(?<!binom )\d[\d.]*)\s+\d|%\s*[^\s%]"
    rf"|{WRAPPED}\s*\{{[^{{}}]*\s[^{{}}]*\}}\s*[\w\\(]"
)
"""`16 0` and `36.9\\text{ but not }0`: they are products to a parser."""
_SCRIPTS = re.compile(r"[_^]\s*(?:\{[^{}]*\}|\S)")
_TIME = re.compile(rf"(\d\d?(?::\d\d)*)\s*(?:{WRAPPED}\s*\{{\s*)?([aApP])(?:\.\s?)?[mM]\.?\s*\}}?")
_MOD = re.compile(
    r"(?P<value>[^=<>]+?)\s*\(?\s*\\?[bp]?mod(?![A-Za-z])\s*(?P<modulus>\{[^{}]*\}|[^{}()]*?)\s*\)?", re.DOTALL
)
_UNIT_TAIL = re.compile(
    rf"(?P<rest>.*?)\s*(?:\\ )*(?!\\(?:math|text)bf|\\boldsymbol){WRAPPED}\s*\{{(?P<unit>[^{{}}]*)\}}"
    r"(?P<power>\s*\^\s*\{?[23]\}?)?",
    re.DOTALL,
)
"""Bold letters are vectors."""
_DEGREES = re.compile(r"(?P<rest>.*?)\s*\^\s*\{?\s*\\circ\s*\}?", re.DOTALL)
_MATRIX = re.compile(r"\\begin\{([pb]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_ROW_END = re.compile(r"\\\\(?:\[-?[\d.]+\s*[a-z]{2}\])?")
_RELATIONS = {
    "<=": "<=", ">=": ">=", "!=": "!=", "=": "=", "<": "<", ">": ">", r"\leqslant": "<=", r"\geqslant": ">=",
    r"\leq": "<=", r"\geq": ">=", r"\neq": "!=", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\lt": "<", r"\gt": ">",
}  # fmt: skip
_RELATION = re.compile(r"<=|>=|!=|:=|==|[=<>]|\\(?:leqslant|geqslant|leq|geq|neq|le|ge|ne|lt|gt)(?![A-Za-z])")
_APPROX = re.compile(r"\\approx(?![A-Za-z])|\\simeq(?![A-Za-z])|~=")
_IN = re.compile(r"\\in(?![A-Za-z])")
_SUCH_THAT = re.compile(
    r"([A-Za-z])\s*(?:\\in\s*\(-\\infty,\\infty\)\s*)?(?:\||:|\\mid(?![A-Za-z])|\\colon(?![A-Za-z]))\s*"
    r"(?P<conditions>.*\1.*)"
)
"""What stands in `\\{x \\mid x > 2\\}`, the real numbers written as the interval that they are."""
_CUP = re.compile(r"\\cup(?![A-Za-z])")
_SETMINUS = re.compile(r"\\(?:setminus|backslash)(?![A-Za-z])")
_TRIGONOMETRIC = re.compile(r"(?<!arc)(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_NUMBER_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\circ\s*\}?")
_PROSE = re.compile(
    r"(?:^|(?<=[\s(:]))(?!(?:sqrt|arcsin|arccos|arctan|sinh|cosh|tanh|theta|alpha|beta|gamma|infinity)\b)"
    r"[A-Za-z]{4,}(?=$|[\s).:!?'])"
)
_DOTS = re.compile(r"\\[lcvd]?dots[bcmio]?(?![A-Za-z])|\.\.\.|…")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_EMPTY = re.compile(r"\\(?:emptyset|varnothing)|∅")
_NO_SOLUTION = re.compile(r"(?:there (?:is|are) )?no solutions?(?: exists?)?|(?:the )?empty set")
_REALS = re.compile(r"\\mathbb\s*\{\s*R\s*\}|\\R(?![A-Za-z])|ℝ")
_FUNCTIONS = frozenset(
    (*("sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "pi", "frac", "max", "min"),
     *("arcsin", "arccos", "arctan", "sinh", "cosh", "tanh"))
)  # fmt: skip
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def read(text: str) -> Reading:
    """The reading of a text. Raises Unreadable."""
    return _read(clean(text), 0)


def _read(text: str, depth: int) -> Reading:
    text = text.strip()
    if not text:
        raise Unreadable("an empty part")
    if depth > 12:
        raise Unreadable("nested too deeply")
    if _EMPTY.fullmatch(text):
        return Listed((), braces=True)
    text = _REALS.sub(r"(-\\infty,\\infty)", text)
    time = _TIME.fullmatch(text)
    text = text if time is None else rf"{time[1]}\text{{ {time[2].lower()}m}}"
    if _DATE.fullmatch(text):
        return Words(text)
    number = read_number(text)
    if number is not None:
        return number
    words = _words(text)
    if words is not None:
        return _named_thing(words)
    for reader in (
        _residue,
        _listed,
        _approximate,
        _membership,
        _chain,
        _union,
        _without,
        _plus_minus,
        _bracketed,
        _matrix,
        _numeral,
        _ratio,
    ):
        reading = reader(text, depth)
        if reading is not None:
            return reading
    return _expression(text)


def _named_thing(words: Words) -> Reading:
    """What words name where a symbol stands for the same: no solution, infinity."""
    if words.text == "infinity":
        return Expression(r"\infty")
    return Listed((), braces=True) if _NO_SOLUTION.fullmatch(words.text) else words


def _words(text: str) -> Words | None:
    """The words that a text is, where it is nothing else; a single formula letter is an expression."""
    inner = _WHOLE_WRAP.fullmatch(text)
    bare = inner[1] if inner else _WHOLE_WRAP.sub(r"\1", text)
    bare = " ".join(bare.strip(" .\"'`*").split())
    single = re.fullmatch(r"\(\s*([A-Za-z])\s*\)", bare)
    if single is not None and inner:
        return Words(single[1].lower())
    if not re.fullmatch(r"[^\W\d_][^\W_]*(?:['’\-. ]+[^\W_]+)*", bare):
        return None
    if re.search(r"(?<![A-Za-z])(?:and|or)(?![A-Za-z])", bare) and len(bare.split()) <= 9 and "\\" not in text[:1]:
        return None
    parts = re.findall(r"[A-Za-z]+", bare)
    long = [part for part in parts if len(part) >= 4 and part.lower() not in _FUNCTIONS]
    if inner or (long and "\\" not in bare):
        return Words(bare.lower())
    return None


_SEPARATOR = re.compile(r"[,;]|" + _AND.pattern)
_JOINT = re.compile(r"(?<![A-Za-z])(and|or)(?![A-Za-z])")
_INEQUALITY = frozenset(("<", "<=", ">", ">=", "!="))


def _items(text: str, depth: int) -> tuple[Reading, ...] | None:
    """The things that a text lists, None for one thing."""
    pieces = split(text, _SEPARATOR)
    if len(pieces) == 1:
        return None
    parts = [part.strip() for part in pieces[::2]]
    if not parts[-1]:
        parts.pop()
    return tuple(_read(part, depth + 1) for part in parts if part or len(parts) == 1)


def _listed(text: str, depth: int) -> Reading | None:
    items = _items(text, depth)
    if items is None:
        return None
    joints = {match[1] for match in map(_JOINT.search, split(text, _SEPARATOR)[1::2]) if match}
    if not any(isinstance(item, Chain) and _INEQUALITY.issuperset(item.signs) for item in items):
        return Listed(items, braces=False, either="or" in joints)
    if len(joints) > 1:
        raise Unreadable('conditions joined by "and" and by "or"')
    return Union(items) if "or" in joints else Both(items)


def _residue(text: str, depth: int) -> Reading | None:
    """`5 \\pmod 7`, `x \\equiv 5 (mod 7)`."""
    if "mod" not in text:
        return None
    match = _MOD.fullmatch(re.sub(rf"{WRAPPED}\s*\{{([^{{}}]*\bmod\b[^{{}}]*)\}}", r" \1 ", text))
    if match is None or "mod" in match["value"] + match["modulus"]:
        return None
    named, *rest = re.split(r"\\equiv(?![A-Za-z])", match["value"])
    if len(rest) > 1 or (rest and not re.search(r"[A-Za-z]", named)):
        raise Unreadable("a chain of congruences")
    return Residue((_read("=".join([named, *rest]), depth + 1), _read(match["modulus"], depth + 1)))


def _approximate(text: str, depth: int) -> Reading | None:
    """`1/3 \\approx 0.33` says 1/3; `x \\approx 11` says x = 11."""
    pieces = split(text, _APPROX)
    if len(pieces) == 1:
        return None
    first = pieces[0].strip()
    name = re.sub(r"\s", "", first) if is_name(first) else ""
    return Chain((_read(first, depth + 1), _read(pieces[2], depth + 1)), ("~",), name)


def _membership(text: str, depth: int) -> Reading | None:
    """`x \\in S` says S."""
    pieces = split(text, _IN)
    if len(pieces) != 3:
        return None
    if not is_name(pieces[0].strip()):
        raise Unreadable("membership of more than a variable")
    return _read(pieces[2], depth + 1)


def _chain(text: str, depth: int) -> Reading | None:
    pieces = split(text, _RELATION)
    if len(pieces) == 1 or _relations_united(text):
        return None
    signs = tuple(_RELATIONS.get(sign, "=") for sign in pieces[1::2])
    sides = pieces[::2]
    if set(signs) == {"="} and is_name(sides[-1]) and not is_name(sides[0]):
        sides.reverse()
    named = set(signs) == {"="} and is_name(sides[0])
    name = re.sub(r"\s", "", sides[0]) if named else ""
    return Chain(tuple(_read(side, depth + 1) for side in sides), signs, name)


def _relations_united(text: str) -> bool:
    """Is it `x < -1 \\cup x > 1`, and no relation that holds a union (`S = A \\cup B`)?"""
    pieces = split(text, _CUP)[::2]
    return len(pieces) > 1 and all(len(split(piece, _RELATION)) > 1 for piece in pieces)


def _union(text: str, depth: int) -> Reading | None:
    pieces = split(text, _CUP)
    return None if len(pieces) == 1 else Union(tuple(_read(piece, depth + 1) for piece in pieces[::2]))


def _without(text: str, depth: int) -> Reading | None:
    pieces = split(text, _SETMINUS)
    return None if len(pieces) != 3 else Without((_read(pieces[0], depth + 1), _read(pieces[2], depth + 1)))


def _plus_minus(text: str, depth: int) -> Reading | None:
    if not re.search(r"\\pm(?![A-Za-z])", text):
        return None
    upper = re.sub(r"\\mp(?![A-Za-z])", "-", re.sub(r"\\pm(?![A-Za-z])", "+", text))
    lower = re.sub(r"\\mp(?![A-Za-z])", "+", re.sub(r"\\pm(?![A-Za-z])", "-", text))
    return Listed((_read(upper.lstrip("+ "), depth + 1), _read(lower, depth + 1)), braces=False)


def _bracketed(text: str, depth: int) -> Reading | None:
    if text.startswith("\\{"):
        if matching(text, 0) != len(text) - 1:
            return None
        inner = text[2:-2].strip()
        if not inner:
            return Listed((), braces=True)
        such = _SUCH_THAT.fullmatch(inner)
        if such is not None:
            return _read(such["conditions"], depth + 1)
        return Listed(_items(inner, depth) or (_read(inner, depth + 1),), braces=True)
    if text[0] not in _PAIRS or matching(text, 0) != len(text) - 1:
        return None
    inner = text[1:-1]
    items = _items(inner, depth)
    if items is None and text[0] in "[(" and _MATRIX.fullmatch(inner.strip()):
        return _read(inner, depth + 1)
    if text[0] == "{":
        return _read(inner, depth + 1) if items is None else Listed(items, braces=True)
    if items is not None and len(items) != 2 and _PAIRS[text[0]] != text[-1]:
        raise Unreadable("a bracket that another kind closes")
    if items is not None:
        return Ordered(items, text[0], text[-1])
    return _read(inner, depth + 1) if text[0] == "(" and text[-1] == ")" else None


def _matrix(text: str, depth: int) -> Reading | None:
    """A matrix, and a factor before it as one of each of its cells."""
    factor, begin, rest = text.partition("\\begin")
    match = _MATRIX.fullmatch(begin + rest)
    if match is None or "\\begin" in match[2]:
        return None
    factor = re.sub(r"\\(?:cdot|times)\s*$", "", factor.strip())
    cells = [row.split("&") for row in _ROW_END.split(match[2]) if row.strip()]
    if factor:
        cells = [[rf"({factor if factor != '-' else '-1'})\cdot({cell})" for cell in row] for row in cells]
    return Matrix(tuple(tuple(_read(cell, depth + 1) for cell in row) for row in cells))


def _numeral(text: str, depth: int) -> Reading | None:
    """`52_8`, `ff_{16}`, `52_{\\text{eight}}`; `5_{10}` is the number 5. Letters are digits where the base has them, a
    letter alone only in `\\text{}`: `a_{16}` is a member of a sequence."""
    match = _NUMERAL.fullmatch(text)
    if match is None:
        return None
    base = int(match["base"]) if match["base"].isdigit() else _BASES.get(match["base"], 0)
    digits = match["digits"].upper()
    if not base:
        return None
    if not digits.isdigit():
        beyond = any(int(digit, 36) >= base for digit in digits)
        if beyond or (len(digits) == 1 and not match["wrap"]):
            return None
    if base == 10:
        return _read(match["sign"] + digits, depth + 1)
    return Numeral(match["sign"] + (digits.lstrip("0") or "0"), base)


def _ratio(text: str, depth: int) -> Reading | None:
    pieces = split(text, re.compile(r":|\\colon(?![A-Za-z])|(?<=\d)\s+to\s+(?=\d)"))
    return None if len(pieces) == 1 else Ratio(tuple(_read(piece, depth + 1) for piece in pieces[::2]))


def _expression(text: str) -> Reading:
    unit = None
    if _TRIGONOMETRIC.search(text):
        text = _NUMBER_DEGREES.sub(r"\\frac{\1\\pi}{180}", text)
        if "\\circ" in text:
            raise Unreadable("degrees of what is no number")
    tail = _UNIT_TAIL.fullmatch(text)
    degrees = _DEGREES.fullmatch(text)
    if tail is not None and tail["rest"].strip():
        if not is_unit(rf"\text{{{tail['unit']}}}{tail['power'] or ''}"):
            raise Unreadable("words behind a formula that change it")
        unit, text = read_unit(tail["unit"] + (tail["power"] or "")), tail["rest"]
    elif degrees is not None and degrees["rest"].strip():
        unit, text = read_unit("°"), degrees["rest"]
    if not re.search(r"[A-Za-z0-9]", text):
        raise Unreadable("no letter and no digit")
    if _DOTS.search(text):
        raise Unreadable("something is left out")
    if _PROSE.search(text):
        raise Unreadable("words among a formula")
    if _BASED.search(text) or _PREFIXED.search(text):
        raise Unreadable("a numeral in some base among a formula")
    if _SIDE_BY_SIDE.search(_SCRIPTS.sub("", text)):
        raise Unreadable("a number side by side with what may be another answer")
    if _SLASH.search(text):
        raise Unreadable("a product behind a slash, which may belong below it or not")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.strip())
    text = re.sub(r"(?<=[A-Za-z])'+", lambda primes: f"_{{{len(primes[0])}prime}}", text)  # a parser drops them
    return Expression(_exact_decimals(text), unit)


def _exact_decimals(text: str) -> str:
    """Decimals as fractions, since a computer algebra system reads them as floating-point numbers."""

    def fraction(match: re.Match[str]) -> str:
        whole, decimals = match[2].split(".")
        exact = rf"\frac{{{int((whole or '0') + decimals)}}}{{{10 ** len(decimals)}}}"
        return rf"{match[1]}{{{exact}}}" if match[1] else exact

    return re.sub(r"((?:\^\s*)?)(?<![\d.])(\d*\.\d+)(?![\d.])", fraction, text)


def is_name(text: str) -> bool:
    """Does a side of an equation only name the other: `x`, `f(-2)`, `a_{37}`, `|AB|`, `m+n`, `(p,q)`?

    A number in it makes it an equation (`2x = 6`), unless it is a subscript or an argument, and so does a minus before
    it: `-x = 6` says x = -6."""
    bare = re.sub(r"_\s*(?:\{[^{}]*\}|\w)", "", text)
    bare = re.sub(r"(?<=[A-Za-z])\s*\([^()]*\)", "", bare)
    return bool(re.search(r"[A-Za-z]", bare)) and not re.search(r"\d|\^|^[\s({]*-", bare)
