"""Whether a step's recorded log-probabilities are also those of the distribution that it was drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcts.types import Kind


def drawn_plainly(settings: Mapping[str, Any], kind: str) -> bool:
    """Whether steps of this kind were drawn at temperature 1 and top_p 1, by the settings of their row.

    Where they were, a step without `behavior_logprobs` was drawn with its `logprobs`. Where they were not, such a step
    comes from an engine that does not tell its odds (a server under another temperature), and they are unknown.
    """
    temperature = settings.get("temperature", 1.0)
    if kind == Kind.ROLLOUT:
        own = _section(settings, "value").get("temperature", 0.0)
    else:
        own = _section(settings, "strategy").get("temperature")
    return bool((temperature if own is None else own) == 1.0 and settings.get("top_p", 1.0) == 1.0)


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = settings.get(name)
    return found if isinstance(found, Mapping) else {}
