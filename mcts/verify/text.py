"""Answers that are words: equal after normalisation, or not."""

from __future__ import annotations

import re
import unicodedata

from mcts.types import Status, Verdict
from mcts.verify.base import refuse

_WRAPPERS = re.compile(r"\\(?:text|mbox|textbf|textit|mathrm|textnormal)\s*\{([^{}]*)\}")
_FORMULA = re.compile(r"^\s*\$+([^$]+)\$+\s*$|\$+(?![\s$])([^$]+)(?<!\s)\$+(?!\d)")


def normalise(text: str) -> str:
    """The text as it is compared: Unicode NFKC, case folded, runs of white space one space, `\\text{}` and the `$` of
    `$x$` taken off, and at the ends no quotes, asterisks or full stop. `Dr. No` keeps its inner full stop, `$5` its
    dollar sign."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = _FORMULA.sub(r" \1\2 ", _WRAPPERS.sub(r"\1", text))
    return " ".join(text.split()).strip(" \"'`*“”‘’").rstrip(".").rstrip()


class TextVerifier:
    """`exact`: the same words. `the Cat.` is `The  cat`; `cats` is not `cat`."""

    name = "exact"

    def verify(self, gold: str, prediction: str) -> Verdict:
        objection = refuse(gold, prediction)
        if objection is not None:
            return objection
        wanted, given = normalise(gold), normalise(prediction)
        if not wanted:
            return Verdict(Status.UNPARSABLE, 0.0, prediction, "gold holds no word")
        if wanted == given:
            return Verdict(Status.CORRECT, 1.0, prediction, "the same words")
        return Verdict(Status.WRONG, 0.0, prediction, "other words")
