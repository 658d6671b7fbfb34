"""What a launch, a dry run and a changed config must keep to. No part of the config's types: a run that began before a
rule can still be read, evaluated and resumed as it is."""

from __future__ import annotations

from mcts.engines.server_dialects import DIALECTS
from mcts.strategies import build as build_strategy
from selfplay.config import Config
from selfplay.errors import UserError
from selfplay.objectives import Need, build_objective


def check_rules(config: Config) -> None:
    """Raise SettingError where settings do not go together, and for a strategy or objective that cannot be built."""
    engine, search = config.engine, config.play.search
    if engine.kind == "torch" and engine.rows % 16:
        raise UserError(f"engine.rows must be a multiple of 16, not {engine.rows}")
    if search.budget >= engine.kv_slots:
        raise UserError(
            f"a search of play.search.budget ({search.budget}) tokens and its prompt cannot fit in engine.kv_slots "
            f"({engine.kv_slots}): raise kv_slots, or lower the budget"
        )
    if config.model.dtype == "float16" and not config.model.freeze_trunk:
        raise UserError(
            "training in float16 loses small gradients: set model.dtype to float32 or bfloat16 (engine.dtype: float16 "
            "plays in it), or freeze_trunk"
        )
    strategy = build_strategy(search.strategy.name, **search.strategy.settings)
    objective = build_objective(config.learn.objective.name, **config.learn.objective.settings)
    if engine.server is not None:
        own = getattr(strategy, "temperature", None)
        temperature = search.temperature if own is None else own
        _check_odds(engine.server.dialect, temperature, search.top_p, needed=Need.BEHAVIOR in objective.needs)


def _check_odds(dialect: str, temperature: float, top_p: float, *, needed: bool) -> None:
    """What a server says of how likely its draws were. `needed`: the objective asks for it."""
    if DIALECTS[dialect].scaled and temperature not in (0.0, 1.0):
        raise UserError(
            "SGLang returns log-probabilities under the temperature and not the model's: set the search's temperature "
            "to 1"
        )
    if needed and (temperature not in (0.0, 1.0) or (temperature and top_p != 1.0)):
        raise UserError(
            "a server does not say how likely its draws were under another temperature or top_p, and importance ratios "
            "need it: set play.search.temperature and top_p to 1, or the objective's importance to none"
        )
