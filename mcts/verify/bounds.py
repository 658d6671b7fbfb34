"""Cheap checks before anything is computed: what could take for ever is not even tried."""

from __future__ import annotations

import re

MAX_LENGTH = 1000
"""Characters of one answer."""
MAX_DEPTH = 30
"""Nested brackets."""
MAX_DIGITS = 400
"""Digits in a row, and decimals of a decimal."""
MAX_EXPONENT_DIGITS = 4
MAX_POWERS = 12
"""Powers in one answer."""
MAX_TOWER = 2
"""Powers in the exponent of a power."""
MAX_FACTORIAL_DIGITS = 3
MAX_COMMAS = 100
_OPENING, _CLOSING = "([{", ")]}"
_DEFINITIONS = re.compile(
    r"\\(?:def|newcommand|renewcommand|let|input|include|write|immediate|catcode|csname|loop|read|openin|usepackage)(?![a-z])"
)
_DEGREES = re.compile(r"\^\{?\\circ(?![A-Za-z])\}?")
_SMALL_FACTORIAL = re.compile(r"(?:\b|(?<=[_{}\s(]))\d{1,3}!")


def beyond(text: str) -> str:
    """Why an answer is not computed with, as the end of a sentence; empty if it is within bounds. One pass."""
    if len(text) > MAX_LENGTH:
        return f"is longer than {MAX_LENGTH} characters"
    depth = 0
    for character in text:
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth > MAX_DEPTH:
            return f"is nested deeper than {MAX_DEPTH} brackets"
    if re.search(rf"\d{{{MAX_DIGITS + 1}}}", re.sub(r"(?<=\d)[ ,](?=\d)", "", text)):
        return f"holds a number of more than {MAX_DIGITS} digits"
    if text.count(",") + text.count(";") > MAX_COMMAS:
        return f"lists more than {MAX_COMMAS} things"
    if _DEFINITIONS.search(text):
        return "holds a command of TeX that is no mathematics"
    return _powers(text) or _factorials(text)


def _powers(text: str) -> str:
    caret = _DEGREES.sub("", text.replace("**", "^").replace(" ", ""))
    small = len(re.findall(r"\^\{?\d\d?(?!\d)\}?", caret))
    if caret.count("^") - small > MAX_POWERS:
        return f"holds more than {MAX_POWERS} powers"
    for match in re.finditer(r"\^[{(\s-]*(\d+)", caret):
        if len(match[1]) > MAX_EXPONENT_DIGITS:
            return f"has an exponent of more than {MAX_EXPONENT_DIGITS} digits"
    for start in re.finditer(r"\^", caret):
        if _tower(caret, start.end()) > MAX_TOWER:
            return f"is a tower of more than {MAX_TOWER} powers"
    return ""


def _tower(text: str, start: int) -> int:
    """How many powers stand on one another from the exponent that starts at `start`."""
    height, position = 1, start
    while True:
        match = re.compile(r"[{(]*-?[\w.\\]*[})]*\^").match(text, position)
        if match is None:
            break
        # `x^{2}^{3}` is no tower but `x^{2^{3}}` is: the braces of the exponent must be open still
        piece = match[0]
        if piece.count("{") + piece.count("(") < piece.count("}") + piece.count(")"):
            break
        height, position = height + 1, match.end()
        if height > MAX_TOWER:
            break
    return height


def _factorials(text: str) -> str:
    factorials = re.sub(r"!=|\\!", "", text)
    count = factorials.count("!")
    if (
        "!!" in factorials.replace(" ", "")
        or count > 6
        or count > len(_SMALL_FACTORIAL.findall(factorials)) + len(re.findall(r"[A-Za-z)}]\s*!", factorials))
    ):
        return "holds factorials beyond bounds"
    if re.search(r"[)}]\s*!", factorials) and re.search(r"\d{4,}|\^", factorials):
        return "holds the factorial of a large number"
    for match in re.finditer(r"\\[dt]?binom\s*\{([^{}]*)\}", text):
        if re.search(r"\d{5,}", match[1]):
            return "holds a binomial coefficient beyond bounds"
    return ""
