"""Which errors are a user's to mend: their message is one sentence, shown without a traceback."""

from __future__ import annotations

import sys

from mcts.types import SettingError

__all__ = ["Interrupted", "NonFiniteLoss", "SettingError", "UserError", "known_errors", "out_of_memory"]


class UserError(SettingError):
    """Something asked for that cannot be: a wrong path, name or value. Exit code 2."""


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient was not a finite number; the weights are those before the step that failed."""


class Interrupted(RuntimeError):
    """A phase was asked to stop; what it had done so far is saved, and it goes on from there."""


RUNTIME = (
    ("selfplay.store", "RunError"),
    ("selfplay.shards", "ShardError"),
    ("selfplay.checkpoint", "CheckpointError"),
    ("selfplay.errors", "NonFiniteLoss"),
    ("selfplay.errors", "Interrupted"),
    ("mcts.types", "SearchError"),
    ("mcts.engines.model", "DamagedModel"),
)
"""Errors of what a user has, not of what a user typed. Exit code 1."""


def known_errors() -> tuple[type[BaseException], ...]:
    """The error types whose message is meant for users. A class counts only if its module was loaded at all, so that
    asking costs no import."""
    loaded = [(sys.modules.get(module), name) for module, name in RUNTIME]
    return (SettingError, *(getattr(module, name) for module, name in loaded if module is not None))


def out_of_memory(error: BaseException) -> str:
    """What to tell a user whose machine or device had no memory left for an array; empty for any other error."""
    torch = sys.modules.get("torch")
    device = torch is not None and isinstance(error, torch.OutOfMemoryError)
    host = isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
    if not device and not host:
        return ""
    said = str(error).partition(" to allocate ")[2].partition(". ")[0].partition(" for ")[0]
    wanted = f" ({said} more were needed)" if said else ""
    return (
        f"out of memory{wanted}: lower engine.kv_slots, engine.rows, engine.max_context or learn.batch_tokens; "
        "selfplay launch CONFIG --dry-run says what fits"
    )
