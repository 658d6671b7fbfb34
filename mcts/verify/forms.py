"""The forms that a mathematical answer may have, as `reading` finds them in its text."""

from __future__ import annotations

from dataclasses import dataclass

from mcts.verify.number import Number
from mcts.verify.units import Unit


@dataclass(frozen=True, slots=True)
class Words:
    """Words, as compared: lower case, single spaces."""

    text: str


@dataclass(frozen=True, slots=True)
class Expression:
    """A formula in LaTeX, to be parsed by math-verify."""

    latex: str
    unit: Unit | None = None


@dataclass(frozen=True, slots=True)
class Numeral:
    """Digits in a stated base."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Listed:
    """Several things without an order: `{1, 2}`, or `1, 2` (`braces` False). One of them twice counts once."""

    items: tuple[Reading, ...]
    braces: bool
    either: bool = False
    """Joined by "or"."""


@dataclass(frozen=True, slots=True)
class Ordered:
    """`(a, b)`, `[a, b]`, `(a, b, c)`: a tuple, a vector, or with two items an interval."""

    items: tuple[Reading, ...]
    left: str
    right: str


@dataclass(frozen=True, slots=True)
class Union:
    """`A \\cup B`, `x < -1 or x > 1`."""

    items: tuple[Reading, ...]


@dataclass(frozen=True, slots=True)
class Both:
    """Conditions that hold together: `x > -1 and x < 1`, `x > 0, y > 0`."""

    items: tuple[Reading, ...]


@dataclass(frozen=True, slots=True)
class Without:
    """`A \\setminus B`."""

    items: tuple[Reading, Reading]


@dataclass(frozen=True, slots=True)
class Residue:
    """`5 \\pmod 7`, `x \\equiv 5 \\pmod 7`: what stands before the modulus, as written, and the modulus."""

    items: tuple[Reading, Reading]


@dataclass(frozen=True, slots=True)
class Ratio:
    """`3:2`, `12:00`."""

    items: tuple[Reading, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    rows: tuple[tuple[Reading, ...], ...]


@dataclass(frozen=True, slots=True)
class Chain:
    """`a = b = c`, `1 < x <= 2`: sides and what stands between them, in {=, <, <=, >, >=, !=, ~ (about)}."""

    sides: tuple[Reading, ...]
    signs: tuple[str, ...]
    name: str = ""
    """The text of the first side, where it only names the last one: `x` in `x = 2 + 3 = 5`. Else empty. Where only the
    last side names the others, the chain is held backwards: `5 = x` as `x = 5`."""


Reading = (
    Words | Expression | Number | Numeral | Listed | Ordered | Union | Both | Without | Residue | Ratio | Matrix | Chain
)


def parts(reading: Reading) -> tuple[Reading, ...]:
    """The readings that a reading is made of."""
    if isinstance(reading, Listed | Ordered | Union | Both | Without | Residue | Ratio):
        return reading.items
    if isinstance(reading, Chain):
        return reading.sides
    if isinstance(reading, Matrix):
        return tuple(cell for row in reading.rows for cell in row)
    return ()
