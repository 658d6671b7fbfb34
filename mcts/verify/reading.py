"""The structure of a mathematical answer, read from its text before any library sees it.

What a reading keeps is what a computer algebra system drops: which brackets stood around a pair, what each side of a
chain of equations says, the base of a numeral, the unit behind a number.
"""

from __future__ import annotations

import re

from mcts.verify.forms import (
    Chain,
    Expression,
    Listed,
    Matrix,
    Numeral,
    Ordered,
    Ratio,
    Reading,
    Union,
    Words,
)
from mcts.verify.number import changes, read_number, tidy
from mcts.verify.units import read_unit


class Unreadable(ValueError):
    """The text is no mathematics that this grammar knows; the message says why."""


_SYMBOLS = str.maketrans(
    {
        "π": r"\pi ", "∞": r"\infty ", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "∪": r"\cup ", "∩": r"\cap ",
        "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∈": r"\in ", "±": r"\pm ", "√": r"\sqrt ",
        "−": "-", "–": "-", "θ": r"\theta ", "°": r"^\circ ", "\t": " ", "\n": " ", "\r": " ",
    }
)  # fmt: skip
_WRAPPED = r"\\(?:text|mbox|mathrm|textnormal|textrm|textbf|mathbf|textit|mathit|operatorname|boldsymbol)"
_ONE_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{(.*)\}", re.DOTALL)
_WHOLE_WRAP = re.compile(rf"{_WRAPPED}\s*\{{([^{{}}]*)\}}")
_AND = re.compile(rf"\s*,?\s*(?:{_WRAPPED}\s*\{{\s*,?\s*(?:and|or)\s*\}}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*")
_NUMERAL = re.compile(rf"(-?)(?:{_WRAPPED}\s*\{{\s*)?([0-9A-F]+)\s*\}}?\s*_\s*(?:\{{\s*(\d+)\s*\}}|(\d+))")
_UNIT_TAIL = re.compile(
    rf"(?P<rest>.*?)\s*(?:\\ )*{_WRAPPED}\s*\{{(?P<unit>[^{{}}]*)\}}(?P<power>\s*\^\s*\{{?[23]\}}?)?", re.DOTALL
)
_DEGREES = re.compile(r"(?P<rest>.*?)\s*\^\s*\{?\s*\\circ\s*\}?", re.DOTALL)
_MATRIX = re.compile(r"\\begin\{([pb]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_RELATIONS = {
    "<=": "<=", ">=": ">=", "!=": "!=", "=": "=", "<": "<", ">": ">", r"\leqslant": "<=", r"\geqslant": ">=",
    r"\leq": "<=", r"\geq": ">=", r"\neq": "!=", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\lt": "<", r"\gt": ">",
}  # fmt: skip
_RELATION = re.compile(r"<=|>=|!=|:=|==|[=<>]|\\(?:leqslant|geqslant|leq|geq|neq|le|ge|ne|lt|gt)(?![A-Za-z])")
_APPROX = re.compile(r"\\approx(?![A-Za-z])|\\simeq(?![A-Za-z])|~=")
_IN = re.compile(r"\\in(?![A-Za-z])")
_CUP = re.compile(r"\\cup(?![A-Za-z])")
_PROSE = re.compile(
    r"(?:^|(?<=[\s(:]))(?!(?:sqrt|arcsin|arccos|arctan|sinh|cosh|tanh|theta|alpha|beta|gamma|infinity)\b)"
    r"[A-Za-z]{4,}(?=$|[\s).:!?'])"
)
_DOTS = re.compile(r"\\[lcvd]?dots[bcmio]?(?![A-Za-z])|\.\.\.|…")
_POWER_WORD = re.compile(r"\b(?:squared|cubed)\b")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_EMPTY = re.compile(r"\\(?:emptyset|varnothing)|∅")
_REALS = re.compile(r"\\mathbb\s*\{\s*R\s*\}|\\R(?![A-Za-z])|ℝ")
_FUNCTIONS = frozenset(
    (*("sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "pi", "frac", "max", "min"),
     *("arcsin", "arccos", "arctan", "sinh", "cosh", "tanh"))
)  # fmt: skip
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def read(text: str) -> Reading:
    """The reading of a text. Raises Unreadable."""
    return _read(_clean(text), 0)


def _clean(text: str) -> str:
    text = text.strip()
    while True:
        box = _ONE_BOX.fullmatch(text.strip("$ "))
        if box is None or _matching(text.strip("$ "), text.strip("$ ").index("{")) != len(text.strip("$ ")) - 1:
            break
        text = box[1].strip()
    text = re.sub(r"\\?[\"“”]", "", text.translate(_SYMBOLS))
    if not re.search(r"matrix|array|cases", text):
        text = re.sub(r"\\\\(?=[A-Za-z({\[)}\]])", r"\\", text)  # a backslash escaped once too often
    text = re.sub(r"\\\$(?=\s*\d)", "", text)
    text = re.sub(r"(?<!\\)\$", " ", tidy(text)).replace(r"\$", " ")
    text = re.sub(r"\\(?:left|right|displaystyle|bigl|bigr|Bigl|Bigr|limits)(?![A-Za-z])\s*\.?", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\text\s*\{\s*\}", "", text).replace(r"\mathrm{e}", "e").replace(r"\mathrm{i}", "i")
    text = re.sub(r"\\(?:lbrace|rbrace)", lambda m: r"\{" if m[0] == r"\lbrace" else r"\}", text)
    text = re.sub(r"\\langle|\\lbrack", lambda m: "(" if m[0] == r"\langle" else "[", text)
    text = re.sub(r"\\rangle|\\rbrack", lambda m: ")" if m[0] == r"\rangle" else "]", text)
    text = re.sub(r"\\phantom\s*(?:\{[^{}]*\}|\S)", "", text).replace("**", "^")
    text = re.sub(r"\\frac\s*(\\[a-z]+)\s+(\w)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"^\s*(?:\\approx|~|=)\s*", "", text)
    return re.sub(r"[.,;]+$", "", " ".join(text.split())).strip()


def _read(text: str, depth: int) -> Reading:
    text = text.strip()
    if not text:
        raise Unreadable("an empty part")
    if depth > 12:
        raise Unreadable("nested too deeply")
    if _EMPTY.fullmatch(text):
        return Listed((), braces=True)
    text = _REALS.sub(r"(-\\infty,\\infty)", text)
    if _DATE.fullmatch(text):
        return Words(text)
    number = read_number(text)
    if number is not None:
        return number
    words = _words(text)
    if words is not None:
        return words
    for reader in (
        _listed,
        _approximate,
        _membership,
        _chain,
        _union,
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


def _split(text: str, pattern: re.Pattern[str]) -> list[str]:
    """Pieces of a text between matches of `pattern` that stand outside all brackets, with the matches between them:
    [piece, match, piece, ...]. Raises Unreadable where brackets do not close."""
    pieces = []
    start = position = depth = 0
    environments = 0
    while position < len(text):
        if text.startswith("\\begin{", position):
            environments += 1
        elif text.startswith("\\end{", position):
            environments -= 1
        if depth == 0 and environments == 0:
            match = pattern.match(text, position)
            if match is not None and match.end() > position:
                pieces += [text[start:position], match[0]]
                start = position = match.end()
                continue
        character = text[position]
        if character == "\\":
            if text[position + 1 : position + 2] in ("{", "}"):
                depth += 1 if text[position + 1] == "{" else -1
            position += 2
            continue
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if depth < 0:
            raise Unreadable("a bracket closes that was not opened")
        position += 1
    if depth != 0:
        raise Unreadable("a bracket is not closed")
    return [*pieces, text[start:]]


def _matching(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes (its last character); -1 where it does not."""
    depth = 0
    position = start
    while position < len(text):
        character = text[position]
        if character == "\\":
            escaped = text[position + 1 : position + 2]
            if escaped == "{":
                depth += 1
            elif escaped == "}":
                depth -= 1
                if depth == 0:
                    return position + 1
            position += 2
            continue
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return -1


_SEPARATOR = re.compile(r"[,;]|" + _AND.pattern)


def _items(text: str, depth: int) -> tuple[Reading, ...] | None:
    """The things that a text lists, None for one thing."""
    pieces = _split(text, _SEPARATOR)
    if len(pieces) == 1:
        return None
    parts = [part.strip() for part in pieces[::2]]
    if not parts[-1]:
        parts.pop()
    return tuple(_read(part, depth + 1) for part in parts if part or len(parts) == 1)


def _listed(text: str, depth: int) -> Reading | None:
    items = _items(text, depth)
    return None if items is None else Listed(items, braces=False)


def _approximate(text: str, depth: int) -> Reading | None:
    """`1/3 \\approx 0.33` says 1/3; `x \\approx 11` says x = 11."""
    pieces = _split(text, _APPROX)
    if len(pieces) == 1:
        return None
    first = pieces[0].strip()
    name = re.sub(r"\s", "", first) if is_name(first) else ""
    return Chain((_read(first, depth + 1), _read(pieces[2], depth + 1)), ("~",), name)


def _membership(text: str, depth: int) -> Reading | None:
    """`x \\in S` says S."""
    pieces = _split(text, _IN)
    if len(pieces) != 3:
        return None
    if not is_name(pieces[0].strip()):
        raise Unreadable("membership of more than a variable")
    return _read(pieces[2], depth + 1)


def _chain(text: str, depth: int) -> Reading | None:
    pieces = _split(text, _RELATION)
    if len(pieces) == 1:
        return None
    signs = tuple(_RELATIONS.get(sign, "=") for sign in pieces[1::2])
    named = set(signs) == {"="} and is_name(pieces[0])
    name = re.sub(r"\s", "", pieces[0]) if named else ""
    return Chain(tuple(_read(side, depth + 1) for side in pieces[::2]), signs, name)


def _union(text: str, depth: int) -> Reading | None:
    pieces = _split(text, _CUP)
    return None if len(pieces) == 1 else Union(tuple(_read(piece, depth + 1) for piece in pieces[::2]))


def _plus_minus(text: str, depth: int) -> Reading | None:
    if not re.search(r"\\pm(?![A-Za-z])", text):
        return None
    upper = re.sub(r"\\mp(?![A-Za-z])", "-", re.sub(r"\\pm(?![A-Za-z])", "+", text))
    lower = re.sub(r"\\mp(?![A-Za-z])", "+", re.sub(r"\\pm(?![A-Za-z])", "-", text))
    return Listed((_read(upper.lstrip("+ "), depth + 1), _read(lower, depth + 1)), braces=False)


def _bracketed(text: str, depth: int) -> Reading | None:
    if text.startswith("\\{"):
        if _matching(text, 0) != len(text) - 1:
            return None
        inner = text[2:-2].strip()
        if not inner:
            return Listed((), braces=True)
        return Listed(_items(inner, depth) or (_read(inner, depth + 1),), braces=True)
    if text[0] not in _PAIRS or _matching(text, 0) != len(text) - 1:
        return None
    inner = text[1:-1]
    items = _items(inner, depth)
    if items is None and text[0] in "[(" and _MATRIX.fullmatch(inner.strip()):
        return _read(inner, depth + 1)
    if text[0] == "{":
        return _read(inner, depth + 1) if items is None else Listed(items, braces=True)
    if items is not None:
        return Ordered(items, text[0], text[-1])
    return _read(inner, depth + 1) if text[0] == "(" and text[-1] == ")" else None


def _matrix(text: str, depth: int) -> Reading | None:
    match = _MATRIX.fullmatch(text)
    if match is None or "\\begin" in match[2]:
        return None
    rows = [row for row in re.split(r"\\\\", match[2]) if row.strip()]
    return Matrix(tuple(tuple(_read(cell, depth + 1) for cell in row.split("&")) for row in rows))


def _numeral(text: str, depth: int) -> Reading | None:  # noqa: ARG001 - one of the readers
    match = _NUMERAL.fullmatch(text)
    if match is None or (not match[2][0].isdigit() and "\\" not in text):
        return None
    return Numeral(match[1] + (match[2].lstrip("0") or "0"), int(match[3] or match[4]))


def _ratio(text: str, depth: int) -> Reading | None:
    pieces = _split(text, re.compile(r":|\\colon(?![A-Za-z])"))
    return None if len(pieces) == 1 else Ratio(tuple(_read(piece, depth + 1) for piece in pieces[::2]))


def _expression(text: str) -> Reading:
    unit = None
    tail = _UNIT_TAIL.fullmatch(text)
    degrees = _DEGREES.fullmatch(text)
    if tail is not None and tail["rest"].strip():
        words = re.findall(r"[a-z]+", tail["unit"].lower())
        if any(changes(word) for word in words) and not _POWER_WORD.search(tail["unit"]):
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
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.strip())
    return Expression(_exact_decimals(text), unit)


def _exact_decimals(text: str) -> str:
    """Decimals as fractions, since a computer algebra system reads them as floating-point numbers."""

    def fraction(match: re.Match[str]) -> str:
        whole, decimals = match[0].split(".")
        return rf"\frac{{{int((whole or '0') + decimals)}}}{{{10 ** len(decimals)}}}"

    return re.sub(r"(?<![\d.])\d*\.\d+(?![\d.])", fraction, text)


def is_name(text: str) -> bool:
    """Does a side of an equation only name the other: `x`, `f(-2)`, `a_{37}`, `|AB|`, `m+n`, `(p,q)`?

    A number in it makes it an equation (`2x = 6`), unless it is a subscript or an argument."""
    bare = re.sub(r"_\s*(?:\{[^{}]*\}|\w)", "", text)
    bare = re.sub(r"(?<=[A-Za-z])\s*\([^()]*\)", "", bare)
    return bool(re.search(r"[A-Za-z]", bare)) and not re.search(r"\d|\^", bare)
