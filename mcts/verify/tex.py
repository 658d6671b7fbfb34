"""The text of an answer as TeX: cleaned of what only sets its looks, and cut outside its brackets."""

from __future__ import annotations

import re

from mcts.verify.number import tidy


class Unreadable(ValueError):
    """The text is no mathematics that this grammar knows; the message says why."""


_SYMBOLS = str.maketrans(
    {
        "π": r"\pi ", "∞": r"\infty ", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "∪": r"\cup ", "∩": r"\cap ",
        "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∈": r"\in ", "±": r"\pm ", "√": r"\sqrt ",
        "≡": r"\equiv ", "−": "-", "–": "-", "θ": r"\theta ", "°": r"^\circ ", "\t": " ", "\n": " ", "\r": " ",
    }
)  # fmt: skip
WRAPPED = r"\\(?:text|mbox|mathrm|textnormal|textrm|textbf|mathbf|textit|mathit|operatorname|boldsymbol)"
"""Pattern of a command that sets its argument in another face."""
_ONE_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{(.*)\}", re.DOTALL)


def clean(text: str) -> str:
    """The text without boxes, sizes and spaces of TeX, Unicode symbols as commands, one spelling of each bracket."""
    text = text.strip()
    while True:
        box = _ONE_BOX.fullmatch(text.strip("$ "))
        if box is None or matching(text.strip("$ "), text.strip("$ ").index("{")) != len(text.strip("$ ")) - 1:
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


def split(text: str, pattern: re.Pattern[str]) -> list[str]:
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
        size, change = _bracket(text, position)
        depth += change
        if depth < 0:
            raise Unreadable("a bracket closes that was not opened")
        position += size
    if depth != 0:
        raise Unreadable("a bracket is not closed")
    return [*pieces, text[start:]]


def matching(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes (its last character); -1 where it does not."""
    depth = 0
    position = start
    while position < len(text):
        size, change = _bracket(text, position)
        depth += change
        position += size
        if change < 0 and depth == 0:
            return position - 1
    return -1


def _bracket(text: str, position: int) -> tuple[int, int]:
    """(characters, change of depth) of what stands at `position`: a bracket, an escaped character, or any other."""
    character = text[position]
    if character == "\\":
        return 2, {"{": 1, "}": -1}.get(text[position + 1 : position + 2], 0)
    return 1, (character in "([{") - (character in ")]}")
