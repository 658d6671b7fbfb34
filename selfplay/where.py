"""The filter language of `inspect --where`, read by a small parser of its own; nothing is ever evaluated.

    verdict == 'correct' and sampled > 200
    not won and (depth >= 3 or nodes > 20)
    problem_id in ['a', 'b'] or 'timeout' in error
    meta.target == 24 and settings.temperature < 1

    condition  = conjunction { "or" conjunction }
    conjunction = negation { "and" negation }
    negation   = "not" negation | "(" condition ")" | comparison
    comparison = operand [ ( "==" | "!=" | "<" | "<=" | ">" | ">=" ) operand
                         | [ "not" ] "in" ( operand | "[" literals "]" | "(" literals ")" ) ]
    operand    = name | "string" | 'string' | number | true | false | null

Names are the columns of the format, the fields of `usage` (`usage.prompt` where a column has the same name), keys
of `meta` and `settings` after a dot, and three derived ones: `nodes` (how many), `depth` (of the deepest node),
`won`. Null equals null only; ordering and `in` are false for null. Text `in` text looks for a part.
"""

from __future__ import annotations

import difflib
import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from selfplay.errors import UserError
from selfplay.schema import SCHEMA, USAGE

MAX_LENGTH: Final = 4_000
"""Characters of an expression."""
MAX_DEPTH: Final = 50
"""Nested parentheses and negations."""

Row = Mapping[str, Any]


class WhereError(UserError):
    """An expression that cannot be used; the message is one sentence that says what to do."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A name or a literal."""

    text: str
    kind: str
    """"text", "number", "bool", "null", or "any" where only the data tell."""
    get: Callable[[Row], Any]
    columns: tuple[str, ...] = ()
    """Columns of the row that `get` reads, as `shards.project` names them."""
    single: bool = False
    """Stored as float32: a number is rounded likewise before it is compared."""
    literal: bool = False


@dataclass(frozen=True, slots=True)
class Predicate:
    """A condition on rows. `columns` are those it reads; rows may hold no others."""

    text: str
    columns: tuple[str, ...]
    test: Callable[[Row], bool]

    def __call__(self, row: Row) -> bool:
        return self.test(row)


def parse_where(text: str) -> Predicate:
    """The predicate that `text` states. Raises WhereError."""
    if len(text) > MAX_LENGTH:
        raise WhereError(f"a filter may have {MAX_LENGTH} characters, this one has {len(text)}; shorten it")
    parser = _Parser(text)
    test = parser.condition()
    if parser.kind != "end":
        raise parser.error("expected `and`, `or` or the end")
    return Predicate(text, tuple(dict.fromkeys(parser.columns)), test)


def resolve(name: str) -> Operand:
    """What a name stands for. Raises WhereError naming the nearest known one."""
    known = _NAMES.get(name)
    if known is not None:
        return known
    column, dot, key = name.partition(".")
    if dot and key and column in ("meta", "settings"):
        return Operand(name, "any", lambda row: _json_get(row[column], key), (column,))
    near = difflib.get_close_matches(name, _NAMES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(_NAMES))}."
    raise WhereError(f"unknown name {name[:80]} in a filter; {hint}")


def _json_get(text: str, key: str) -> Any:
    """Value at a dotted key of a JSON object; None where it has none."""
    value = json.loads(text)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _names() -> dict[str, Operand]:
    names: dict[str, Operand] = {}
    for field in SCHEMA:
        kind = _column_kind(field.type)
        if kind is not None:
            single = field.type == pa.float32()
            names[field.name] = Operand(field.name, kind, operator.itemgetter(field.name), (field.name,), single=single)
    for field in USAGE:
        column = f"usage.{field.name}"
        operand = Operand(column, "number", _usage_getter(field.name), (column,))
        names[column] = operand
        names.setdefault(field.name, operand)
    names["nodes"] = Operand("nodes", "number", lambda row: len(row["nodes"]), ("nodes.depth",))
    names["depth"] = Operand(
        "depth", "number", lambda row: max((n["depth"] for n in row["nodes"]), default=None), ("nodes.depth",)
    )
    names["won"] = Operand("won", "bool", lambda row: row["verdict"] == "correct", ("verdict",))
    return names


def _usage_getter(field: str) -> Callable[[Row], Any]:
    return lambda row: row["usage"][field]


def _column_kind(type_: pa.DataType) -> str | None:
    if pa.types.is_string(type_):
        return "text"
    return "number" if pa.types.is_integer(type_) or pa.types.is_floating(type_) else None


_NAMES: Final = _names()

_COMPARE: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_LITERALS: Final = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_WORDS: Final = ("and", "or", "not", "in")
_TOKEN: Final = re.compile(
    r"""\s*(?:(?P<number>-?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][+-]?\d{1,3})?)(?![\w.])
    |(?P<string>'(?:[^'\\]|\\['"\\])*'|"(?:[^"\\]|\\['"\\])*")
    |(?P<name>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)
    |(?P<mark>==|!=|<=|>=|<|>|[()\[\],])
    |(?P<end>\Z))""",
    re.VERBOSE | re.ASCII,
)


def _kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "text"
    return "null" if value is None else "other"


def _compare(mark: str, left: Any, right: Any) -> bool:
    if _kind_of(left) != _kind_of(right):
        return mark == "!="
    if mark not in ("==", "!=") and _kind_of(left) not in ("number", "text"):
        return False
    return bool(_COMPARE[mark](left, right))


class _Parser:
    """Recursive descent over the tokens of one expression, one token ahead."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.columns: list[str] = []
        self.depth = 0
        self.start = self.stop = 0
        self.kind = self.token = ""
        self.advance()

    def error(self, what: str) -> WhereError:
        found = f"{self.token[:40]!r}" if self.kind != "end" else "the end"
        return WhereError(f"cannot read the filter at character {self.start + 1} ({found}): {what}")

    def advance(self) -> None:
        match = _TOKEN.match(self.text, self.stop)
        if match is None:
            rest = self.text[self.stop :]
            self.start = self.stop + len(rest) - len(rest.lstrip())
            self.kind, self.token = "odd", rest.strip()[:10]
            raise self.error("expected a name, a quoted string, a number or an operator")
        self.kind = str(match.lastgroup)
        self.start, self.stop = match.span(self.kind)
        self.token = match[self.kind]
        if self.kind == "name" and self.token in _WORDS:
            self.kind = "mark"

    def accept(self, mark: str) -> bool:
        if self.kind == "mark" and self.token == mark:
            self.advance()
            return True
        return False

    def expect(self, mark: str) -> None:
        if not self.accept(mark):
            raise self.error(f"expected {mark}")

    def condition(self) -> Callable[[Row], bool]:
        tests = [self.conjunction()]
        while self.accept("or"):
            tests.append(self.conjunction())
        return tests[0] if len(tests) == 1 else lambda row: any(test(row) for test in tests)

    def conjunction(self) -> Callable[[Row], bool]:
        tests = [self.negation()]
        while self.accept("and"):
            tests.append(self.negation())
        return tests[0] if len(tests) == 1 else lambda row: all(test(row) for test in tests)

    def negation(self) -> Callable[[Row], bool]:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(f"more than {MAX_DEPTH} nested parentheses or negations; simplify it")
        if self.accept("not"):
            inner = self.negation()
            test: Callable[[Row], bool] = lambda row: not inner(row)  # noqa: E731
        elif self.accept("("):
            test = self.condition()
            self.expect(")")
        else:
            test = self.comparison()
        self.depth -= 1
        return test

    def operand(self) -> Operand:
        kind, token = self.kind, self.token
        if kind == "name" and token not in _LITERALS:
            operand = resolve(token)
            self.columns.extend(operand.columns)
            self.advance()
            return operand
        value = self.literal()
        return Operand(token, _kind_of(value), lambda _row: value, literal=True)

    def literal(self) -> Any:
        kind, token = self.kind, self.token
        if kind == "string":
            value: Any = re.sub(r"\\(.)", r"\1", token[1:-1])
        elif kind == "number":
            value = float(token) if re.search(r"[.eE]", token) else int(token)
            if not math.isfinite(value):
                raise self.error("this number is too large")
        elif kind == "name" and token in _LITERALS:
            value = _LITERALS[token]
        else:
            raise self.error("expected a quoted string, a number, true, false, null or a name")
        self.advance()
        return value

    def comparison(self) -> Callable[[Row], bool]:
        left = self.operand()
        mark = self.token if self.kind == "mark" else ""
        if mark in _COMPARE:
            self.advance()
            return self.relation(left, mark, self.operand())
        if mark in ("in", "not"):
            self.advance()
            if mark == "not":
                self.expect("in")
            inside = self.membership(left)
            return inside if mark == "in" else lambda row: not inside(row)
        if left.kind in ("bool", "any"):
            return lambda row: left.get(row) is True
        raise self.error(f"compare {left.text} with something, as in {left.text} == ...")

    def relation(self, left: Operand, mark: str, right: Operand) -> Callable[[Row], bool]:
        kinds = {left.kind, right.kind} - {"any"}
        if mark in ("==", "!="):
            kinds -= {"null"}
        elif kinds & {"null", "bool"}:
            raise WhereError(f"{left.text} {mark} {right.text}: null, true and false have no order; use == or !=")
        if len(kinds) > 1:
            raise WhereError(
                f"{left.text} {mark} {right.text}: one is a {left.kind}, the other a {right.kind}; "
                "text needs quotes, numbers none"
            )
        left_get, right_get = _rounded(left, right), _rounded(right, left)
        return lambda row: _compare(mark, left_get(row), right_get(row))

    def membership(self, left: Operand) -> Callable[[Row], bool]:
        closing = {"[": "]", "(": ")"}.get(self.token) if self.kind == "mark" else None
        if closing is None:
            right = self.operand()
            if {left.kind, right.kind} - {"any"} - {"text"}:
                raise WhereError(f"{left.text} in {right.text}: only text can lie in text; a list needs [ ]")
            return lambda row: _part_of(left.get(row), right.get(row))
        self.advance()
        values = [self.literal()]
        while self.accept(","):
            values.append(self.literal())
        self.expect(closing)
        for value in values:
            if _kind_of(value) != left.kind and left.kind != "any":
                raise WhereError(f"{left.text} is a {left.kind}, so the list may hold no {_kind_of(value)}")
        if left.single:
            values = [_single(value) for value in values]
        return lambda row: any(_compare("==", left.get(row), value) for value in values)


def _rounded(operand: Operand, other: Operand) -> Callable[[Row], Any]:
    """`operand.get`; a number literal beside a float32 column is rounded as the column was."""
    if operand.literal and operand.kind == "number" and other.single:
        value = _single(operand.get({}))
        return lambda _row: value
    return operand.get


def _single(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _part_of(part: Any, whole: Any) -> bool:
    return isinstance(part, str) and isinstance(whole, str) and part in whole
