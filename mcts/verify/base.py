"""What a verifier is: it compares an answer with gold and says what it found."""

from __future__ import annotations

from typing import Protocol

from mcts.types import SettingError, Status, Verdict


class VerifierSettingError(SettingError):
    """No such verifier or setting, or a value that the verifier refuses: a user's to mend before anything runs."""


class Verifier(Protocol):
    """Compares a prediction with gold. Safe to call from many threads; the same pair always gets the same verdict.

    CORRECT, WRONG (both were understood and differ), UNPARSABLE (one of the two could not be read; an unreadable gold
    never gives a win, not even for the same text), TIMEOUT and ERROR (nothing is known of the answer).
    """

    name: str

    def verify(self, gold: str, prediction: str) -> Verdict:
        """Judge `prediction`, an answer as `mcts.verify.extract.extract` takes it out of a model's text. `why` says
        the reason in a few words, for any status. Never raises for what a text holds."""
        ...


MAX_TEXT = 2000
"""Longest gold or prediction that is looked at, in characters."""


def unreadable(text: str) -> str:
    """Why a text is not even looked at, as the end of a sentence; empty if it is."""
    if not text.strip():
        return "is empty"
    if len(text) > MAX_TEXT:
        return f"is longer than {MAX_TEXT} characters"
    for character in text:
        code = ord(character)
        if (code < 32 and character not in "\t\n\r") or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000:
            return f"holds the character U+{code:04X}"
    return ""


def refuse(gold: str, prediction: str) -> Verdict | None:
    """UNPARSABLE where one of the two texts must not be looked at, gold first."""
    for name, text in (("gold", gold), ("the prediction", prediction)):
        objection = unreadable(text)
        if objection:
            return Verdict(Status.UNPARSABLE, 0.0, _shown(prediction), f"{name} {objection}")
    return None


def _shown(text: str) -> str:
    """A text as it may be stored: short, and valid Unicode."""
    return text[:MAX_TEXT].encode("utf-8", "replace").decode("utf-8")


def check_partial(partial: float) -> float:
    """A reward for a wrong answer of the right type: a number in [0, 1), never as good as a win."""
    if isinstance(partial, bool) or not isinstance(partial, int | float) or not 0 <= partial < 1:
        raise VerifierSettingError(
            f"partial is the reward of a well-formed wrong number, 0 to below 1, not {partial!r}"
        )
    return float(partial)
