"""Multiple choice: one letter."""

from __future__ import annotations

import re

from mcts.types import Status, Verdict
from mcts.verify.base import VerifierSettingError, refuse
from mcts.verify.doubt import DENIED

_WRAPPERS = re.compile(r"\\(?:text|mbox|textbf|mathrm|mathbf|textnormal)\s*\{([^{}]*)\}")
_TRIMMED = " \t\r\n$*_`\"'.:,;"


def read_choice(text: str, letters: str = "ABCDE") -> str | None:
    """The one letter that a text names, upper case; None where it names none or several.

    Read are `B`, `b`, `(B)`, `B)`, `B.`, `\\text{(B)}`, and a letter followed by the option's text: `(B) 12 miles`,
    `B) 12`, `B: 12`, `B. 12`. A letter in upper case may also stand before plain words (`C Cecile`), but not where it
    is the article of a sentence (`A` before a word in lower case: `A dog`).
    """
    bare = _WRAPPERS.sub(r"\1", text).strip(_TRIMMED)
    single = re.fullmatch(r"\(?\s*([A-Za-z])\s*\)?", bare)
    if single is not None:
        letter = single[1].upper()
        return letter if letter in letters else None
    named = re.match(r"\(([A-Za-z])\)|([A-Za-z])[).:,;。，]|([A-Z])\s+(?=[A-Z0-9$\\(-])", bare)
    if named is None:
        return None
    letter = next(group for group in named.groups() if group).upper()
    return letter if letter in letters and not _hedged(bare[named.end() :], set(letters) - {letter}) else None


_NEGATION = re.compile(r"\b(?:not|cannot|never|rather than|instead of|non|pas)\b|n[’']t\b|不是", re.IGNORECASE)


_REFUSED = re.compile(rf"\s*(?:{DENIED}|(?:is|was|can|could)\s*not\b|not\s+(?:this|that)\b)", re.IGNORECASE)


_OTHER = re.compile(
    r"\(([A-Za-z])\)|(?<![\w$\\'’])([B-HJ-Z])(?![\w'’])|\b(?:or|and)\s+(A)\b"
    r"|(?:^|(?<=[\s,;/]))([A-Za-z])(?=\s*(?:$|[,;/)]))"
)
"""A letter in brackets, a capital that is no word (`A`, `I`), or any letter that a mark or the end follows: `B, a`."""


def _hedged(rest: str, others: set[str]) -> bool:
    """Does what follows the letter refuse it, or name another option without saying that it is not the one?"""
    if _REFUSED.match(rest):
        return True
    named = next((match for match in _OTHER.finditer(rest) if match[match.lastindex or 0].upper() in others), None)
    return named is not None and _NEGATION.search(rest[: named.start()]) is None


class ChoiceVerifier:
    """`choice`: the letter of the right option.

    letters: the options that there are, upper case.
    """

    name = "choice"

    def __init__(self, letters: str = "ABCDE") -> None:
        if not re.fullmatch(r"[A-Z]+", str(letters)) or len(set(letters)) != len(letters):
            raise VerifierSettingError(f"letters are different capitals like 'ABCDE', not {letters!r}")
        self.letters = letters

    def verify(self, gold: str, prediction: str) -> Verdict:
        objection = refuse(gold, prediction)
        if objection is not None:
            return objection
        wanted, given = read_choice(gold, self.letters), read_choice(prediction, self.letters)
        if wanted is None:
            return Verdict(Status.UNPARSABLE, 0.0, prediction, f"gold names not one letter of {self.letters}")
        if given is None:
            return Verdict(Status.UNPARSABLE, 0.0, prediction, f"the prediction names not one letter of {self.letters}")
        if wanted == given:
            return Verdict(Status.CORRECT, 1.0, given, f"option {given}")
        return Verdict(Status.WRONG, 0.0, given, f"option {given}, not {wanted}")
