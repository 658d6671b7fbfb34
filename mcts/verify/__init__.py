"""Judges of what a model wrote. Nothing here evaluates text in this process."""

from __future__ import annotations

from typing import cast

from mcts.registry import load
from mcts.verify.base import Verifier, VerifierSettingError

__all__ = ["VERIFIERS", "Verifier", "VerifierSettingError", "load_verifier"]

VERIFIERS: dict[str, str] = {
    "choice": "mcts.verify.choice.ChoiceVerifier",
    "exact": "mcts.verify.text.TextVerifier",
    "math": "mcts.verify.math.MathVerifier",
    "number": "mcts.verify.number.NumberVerifier",
    "program": "mcts.verify.sandbox_program.ProgramVerifier",
}
"""Registered name -> dotted path of the class (or function) that makes the verifier from its settings."""


def load_verifier(name: str, **settings: object) -> Verifier:
    """Make a verifier from its name in `VERIFIERS`, or from `package.module.Class`.

    Raises VerifierSettingError in one sentence: no such verifier or setting (naming the nearest one), a setting that is
    missing, or one that the verifier refuses.
    """
    return cast(Verifier, load("verifier", name, VERIFIERS, settings, VerifierSettingError, "verify"))
