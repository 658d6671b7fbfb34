"""Words that stand around an answer in a sentence and say that it is another one, or none: `not 18`, `half of 18`."""

from __future__ import annotations

import re

DENIED = r"(?:is|was)\s+(?:not|wrong|incorrect|false|out)\b|(?:is|was)n[’']t\b"
"""Pattern of what says of the words before it that they are not so."""
_BEFORE = re.compile(
    r"\b(?:not|never|negative|minus|plus|without|except|but|neither|nor|or|none|unlike|half|third|quarter|twice|thrice"
    r"|double|triple|times|hundred|thousand|million|than|at least|at most|over|under|above|below|between|root"
    r"|cube|square|maybe|perhaps|possibly|unknown|wrong|incorrect|cannot)\b|n[’']t\b",
    re.IGNORECASE,
)
_BEHIND = re.compile(
    r"\s*[-*]?\s*(?:(?:squared|cubed|factorial|times|plus|minus|choose|mod|modulo|percent|below|to|or)\b"
    r"|(?:half|halves|third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth|dozen|hundred"
    rf"|thousand|million|billion|trillion)s?\b|{DENIED})",
    re.IGNORECASE,
)
_CLAUSE = re.compile(r"[,;:.](?=\s)")
NEAR = 4
"""Words before an answer that are looked at, within its clause."""


def doubtful(sentence: str, answer: str) -> bool:
    """Do the words around some occurrence of `answer` in `sentence` change it, negate it or hedge it?"""
    for match in re.finditer(rf"(?<![\w.]){re.escape(answer)}(?!\w)", sentence):
        clause = _CLAUSE.split(sentence[: match.start()])[-1]
        if _BEFORE.search(" ".join(clause.split()[-NEAR:])) or _BEHIND.match(sentence[match.end() :]):
            return True
    return False
