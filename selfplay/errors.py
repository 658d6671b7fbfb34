"""Which errors are a user's to mend: their message is one sentence, shown without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something asked for that cannot be: a wrong path, name or value. Exit code 2."""


def known_errors() -> tuple[type[BaseException], ...]:
    """The error types whose message is meant for users. A library's class counts only if it was loaded at all,
    so that asking costs no import."""
    import sys

    found: list[type[BaseException]] = [UserError]
    for module, name in (
        ("selfplay.run_folder", "RunError"),
        ("selfplay.shards", "ShardError"),
        ("selfplay.checkpoint", "CheckpointError"),
        ("selfplay.learner", "NonFiniteLoss"),
        ("mcts.tasks", "TaskError"),
        ("mcts.strategies", "StrategyError"),
        ("mcts.engines.base", "EngineFull"),
        ("mcts.engines.model", "ModelError"),
    ):
        loaded = sys.modules.get(module)
        if loaded is not None:
            found.append(getattr(loaded, name))
    return tuple(found)
