"""LaTeX formulas as sympy expressions, by the parser of math-verify. Runs in a worker only."""

from __future__ import annotations

import re
from functools import lru_cache

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy, normalize_latex

_NORMALISED = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
)
_CONVERTED = ConversionConfig(lowercase_symbols=False)
_BARE_NAMES = re.compile(
    r"(?<![\\A-Za-z])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|theta|alpha|beta|gamma)(?![A-Za-z])"
)
_INFINITY = re.compile(r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])")
_ENDLESS = re.compile(r"\\(?:lim|sum|prod|int)(?![A-Za-z])")
_BARE_ROOT = re.compile(r"(?<![A-Za-z])\\?sqrt\s*\(")


class CannotParse(ValueError):
    """The parser does not know this formula."""


@lru_cache(maxsize=256)
def parse(latex: str) -> sympy.Expr:
    """The formula, evaluated exactly. Raises CannotParse."""
    text = _BARE_NAMES.sub(r"\\\1", _roots(latex))
    text = _INFINITY.sub(r"\\infty", text)
    if "\\infty" in text and not re.fullmatch(r"[({\s]*[+-]?\s*\\infty[)}\s]*", text) and not _ENDLESS.search(text):
        raise CannotParse("infinity is no number to calculate with")
    try:
        found = latex2sympy(
            normalize_latex(text, _NORMALISED), is_real=False, normalization_config=None, conversion_config=_CONVERTED
        ).doit()
    except (MemoryError, RecursionError):
        raise
    except Exception as error:
        raise CannotParse(f"no formula: {latex[:40]}") from error
    if not isinstance(found, sympy.Expr) or found.has(sympy.nan, sympy.zoo):
        raise CannotParse(f"no formula: {latex[:40]}")
    found = found.subs({symbol: sympy.I for symbol in found.free_symbols if symbol.name == "i"})
    floats = found.atoms(sympy.Float)
    return found.subs({number: sympy.Rational(str(number)) for number in floats}) if floats else found


def _roots(text: str) -> str:
    """`sqrt(5+x)` as `\\sqrt{5+x}`."""
    while (match := _BARE_ROOT.search(text)) is not None:
        depth = 0
        for position in range(match.end() - 1, len(text)):
            depth += (text[position] == "(") - (text[position] == ")")
            if depth == 0:
                break
        else:
            raise CannotParse("a bracket is not closed")
        text = f"{text[: match.start()]}\\sqrt{{{text[match.end() : position]}}}{text[position + 1 :]}"
    return text
