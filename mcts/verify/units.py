"""Units of measure behind a number: `cm`, `\\text{ square inches}`, `mph`, `dollars`, `apples`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_LENGTH = {
    "mm": "1/1000", "millimeter": "1/1000", "millimetre": "1/1000", "cm": "1/100", "centimeter": "1/100",
    "centimetre": "1/100", "dm": "1/10", "m": "1", "meter": "1", "metre": "1", "km": "1000", "kilometer": "1000",
    "kilometre": "1000", "in": "127/5000", "inch": "127/5000", "inche": "127/5000", "ft": "381/1250",
    "foot": "381/1250", "feet": "381/1250", "yd": "1143/1250", "yard": "1143/1250", "mi": "201168/125",
    "mile": "201168/125",
}  # fmt: skip
_TIME = {
    "s": "1", "sec": "1", "second": "1", "min": "60", "minute": "60", "h": "3600", "hr": "3600", "hour": "3600",
    "day": "86400", "week": "604800",
}  # fmt: skip
_MASS = {
    "mg": "1/1000000", "g": "1/1000", "gram": "1/1000", "kg": "1", "kilogram": "1", "lb": "45359237/100000000",
    "pound": "45359237/100000000", "oz": "45359237/1600000000", "ounce": "45359237/1600000000",
}  # fmt: skip
_VOLUME = {
    "ml": "1/1000", "milliliter": "1/1000", "l": "1", "liter": "1", "litre": "1", "gal": "473176473/125000000",
    "gallon": "473176473/125000000",
}  # fmt: skip
_MONEY = {"cent": "1/100", "¢": "1/100", "$": "1", "dollar": "1", "usd": "1"}
_OTHER = {"°": ("degree", "1"), "degree": ("degree", "1"), "deg": ("degree", "1"), "€": ("euro", "1"),
          "£": ("pound sterling", "1"), "rad": ("radian", "1"), "%": ("%", "1"), "mph": ("mile/hour", "1"),
          "kph": ("kilometer/hour", "1"), "kmh": ("kilometer/hour", "1")}  # fmt: skip
_SCALES: dict[str, tuple[str, Fraction]] = {
    word: (dimension, Fraction(factor))
    for dimension, table in (("m", _LENGTH), ("s", _TIME), ("kg", _MASS), ("l", _VOLUME), ("dollar", _MONEY))
    for word, factor in table.items()
} | {word: (dimension, Fraction(factor)) for word, (dimension, factor) in _OTHER.items()}
_POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "cu": 3}
_RATES = {"mi/h": "mile/hour", "mi/hr": "mile/hour", "mile/hour": "mile/hour", "km/h": "kilometer/hour",
          "km/hr": "kilometer/hour", "kilometer/hour": "kilometer/hour"}  # fmt: skip
_SUPERSCRIPTS = str.maketrans({"²": "^2", "³": "^3"})


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit in base units of its dimension. Two units are comparable where `dimension` is the same."""

    dimension: str
    """`m^2`, `s`, `dollar`, or for words that are in no table the words themselves, singular."""
    factor: Fraction
    """How many base units one of it is."""

    @property
    def is_letter(self) -> bool:
        """Is it a single letter that is in no table? Then it may be a factor or a scale as well (`2 k`, `5 M`)."""
        return len(self.dimension) == 1 and self.dimension.isalpha() and self.dimension not in _SCALES


def read_unit(text: str) -> Unit | None:
    """The unit that a text names; None for no unit at all, and for `units`, which names none."""
    text = text.translate(_SUPERSCRIPTS).replace("{", "").replace("}", "")
    text = re.sub(r"\s*\^\s*", "^", text)
    power = 1
    words = []
    for word in re.findall(r"[^\s,;]+", text):
        word = word if word in ("°", "%", "$") else word.replace(".", "")
        base, caret, exponent = word.partition("^")
        if caret and exponent in ("2", "3"):
            power, word = int(exponent), base
        if word.lower() in _POWERS:
            power = _POWERS[word.lower()]
        elif word:
            words.append(_singular(word))
    name = re.sub(r"\s*(?:/| per )\s*", "/", " ".join(words))
    name = _RATES.get(name, name)
    if name in ("", "unit"):
        return None
    dimension, factor = _SCALES.get(name, (name, Fraction(1)))
    return Unit(dimension if power == 1 else f"{dimension}^{power}", factor**power)


def is_known(word: str) -> bool:
    """Is the word (lower case) in a table of units, or one that makes a unit (`square`, `per`)?"""
    return word in ("", "unit", "units", "per") or word in _POWERS or _singular(word) in _SCALES


def _singular(word: str) -> str:
    low = word.lower()
    if len(word) == 1 and word != low and word != "L":
        return word  # M is no metre
    if low in _SCALES:
        return low
    return low[:-1] if len(low) > 2 and low.endswith("s") and not low.endswith("ss") else low
