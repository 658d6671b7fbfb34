"""Values in [0, 1] for prefixes: from a served reward model, or from a local policy's value head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mcts.engines.server_asked import Omission, numbered
from mcts.types import SettingError


@dataclass(frozen=True, slots=True)
class ServedValue:
    """How a reward model is asked. `classify` reads `probs[label]`; `pooling` reads the last number of `data`, a
    logit where `sigmoid` is set."""

    url: str
    model: str
    endpoint: Literal["classify", "pooling"] = "classify"
    label: int = 1
    sigmoid: bool = False
    send: Literal["token_ids", "text"] = "text"
    """token_ids only where the reward model has the policy's tokenizer."""

    @property
    def path(self) -> str:
        return f"/{self.endpoint}"

    def payload(self, inputs: Sequence[Any]) -> dict[str, Any]:
        return {"model": self.model, "input": list(inputs)}

    def read(self, answer: object, count: int) -> list[float]:
        """[count] values in the order of the inputs. Raises Omission."""
        data = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(data, list) or len(data) != count:
            raise Omission(f"the reward model did not return one result for each of {count} inputs")
        return [self._one(row) for row in numbered(data, count, "the reward model's results")]

    def _one(self, row: Mapping[str, Any]) -> float:
        value: Any
        if self.endpoint == "classify":
            probs = row.get("probs")
            value = probs[self.label] if isinstance(probs, list) and len(probs) > self.label else None
        else:
            value = row.get("data")
            while isinstance(value, list) and value:
                value = value[-1]
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise Omission(f"the reward model returned no number where {self.endpoint} should hold one")
        if self.sigmoid:
            value = 1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, value))))
        if not 0.0 <= value <= 1.0:
            raise Omission(f"the reward model returned {value:g}, outside [0, 1]: set sigmoid where it returns logits")
        return float(value)


class LocalValue:
    """The value head of a policy on this machine, read by one plain forward per step: it computes the prefix again,
    so it costs a forward of the whole sequence."""

    def __init__(self, folder: str | Path, head: str | Path | None = None, device: str = "cpu", dtype: str = "float32"):
        self._device, self._dtype = device, dtype
        self.load(folder, head)

    def load(self, folder: str | Path, head: str | Path | None = None) -> None:
        """Other weights of a checkpoint or model folder. SettingError where it has no value head."""
        from mcts.engines.model import load_policy

        policy = load_policy(folder, self._device, self._dtype, head=head)
        if policy.head is None:
            raise SettingError(f"{folder} has no value head: give a checkpoint that has one, or another value source")
        self.policy = policy

    def values(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The head's output at each sequence's last token."""
        import torch

        policy, found = self.policy, []
        assert policy.head is not None
        with torch.inference_mode():
            for ids in sequences:
                hidden = policy.hidden(torch.tensor([list(ids)], device=policy.device))
                found.append(float(policy.head(hidden[0, -1])))
        return found
