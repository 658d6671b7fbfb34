"""Strategies by name. A new one is one file and one line here; one of your own plugs in by its dotted path."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, cast

from mcts.registry import nearest, wrong_kind
from mcts.search import Strategy
from mcts.types import SettingError


class StrategyError(SettingError):
    """A strategy that cannot be built; the message is one sentence that says what to change."""


REGISTRY: dict[str, str] = {
    "beam": "mcts.strategies.beam.Beam",
    "best_of_n": "mcts.strategies.best_of_n.BestOfN",
    "greedy": "mcts.strategies.best_of_n.Greedy",
    "gumbel": "mcts.strategies.gumbel.Gumbel",
    "index": "mcts.strategies.index.Index",
    "mcts": "mcts.strategies.mcts.Mcts",
    "redraw": "mcts.strategies.redraw.Redraw",
}


def build(name: str, /, **settings: Any) -> Strategy:
    """A strategy from its registered name or the dotted path of its class, with its settings.
    Raises StrategyError for an unknown name, a path that cannot be imported, or an unknown or bad setting."""
    path = REGISTRY.get(name, name)
    module_name, _, class_name = path.replace(":", ".").rpartition(".")
    if not module_name:
        raise StrategyError(f"unknown strategy {name!r}{nearest(name, REGISTRY)}")
    try:
        made = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise StrategyError(f"strategy {name!r} cannot be imported: {error}") from error
    if not inspect.isclass(made) or not hasattr(made, "run"):
        raise StrategyError(f"strategy {name!r} is not a class with a `run` method")
    known = [p for p in inspect.signature(made).parameters if p not in ("args", "kwargs")]
    for setting in settings:
        if setting not in known:
            raise StrategyError(f"strategy {name!r} has no setting {setting!r}{nearest(setting, known)}")
    objection = wrong_kind(made, settings)
    if objection:
        raise StrategyError(f"strategy {name!r}: {objection}")
    try:
        return cast(Strategy, made(**settings))
    except (TypeError, ValueError) as error:
        raise StrategyError(f"strategy {name!r}: {error}") from error
