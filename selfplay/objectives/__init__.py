"""Ways of learning, by name; a dotted path `module.Class` plugs in a user's own."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from typing import Any

from mcts.registry import wrong_kind
from selfplay.errors import UserError
from selfplay.objectives.alphazero import AlphaZero
from selfplay.objectives.base import Models, Need, Objective, TraceLike
from selfplay.objectives.loss import Coefficients, Totals, composite_loss
from selfplay.objectives.sft import Sft

__all__ = [
    "OBJECTIVES",
    "AlphaZero",
    "Coefficients",
    "Models",
    "Need",
    "Objective",
    "ObjectiveError",
    "Sft",
    "Totals",
    "TraceLike",
    "build_objective",
    "composite_loss",
]

OBJECTIVES: dict[str, type[Any]] = {"alphazero": AlphaZero, "sft": Sft}


class ObjectiveError(UserError):
    """An objective that cannot be built; the message is one sentence that says what to change."""


def build_objective(name: str, **settings: Any) -> Objective:
    """The objective called `name` (or the class at the dotted path `name`). Raises ObjectiveError."""
    kind = OBJECTIVES.get(name) or _imported(name)
    if dataclasses.is_dataclass(kind):
        known = [f.name for f in dataclasses.fields(kind) if f.init]
        for key in settings:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(known)}"
                raise ObjectiveError(f"objective {name} has no setting {key}; {hint}")
    objection = wrong_kind(kind, settings)
    if objection:
        raise ObjectiveError(f"objective {name}: {objection}")
    try:
        objective: Objective = kind(**settings)
    except (TypeError, ValueError) as error:
        raise ObjectiveError(f"objective {name}: {error}") from error
    return objective


def _imported(name: str) -> type[Any]:
    module, _, attribute = name.rpartition(".")
    if not module:
        near = difflib.get_close_matches(name, OBJECTIVES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(OBJECTIVES)}, or a dotted path module.Class"
        raise ObjectiveError(f"there is no objective {name}; {hint}")
    try:
        found: type[Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ObjectiveError(f"objective {name} cannot be imported: {error}") from error
    return found
