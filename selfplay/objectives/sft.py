"""Expert iteration: supervised learning on verified wins (STaR, ReST-EM), with the value head beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from selfplay.forward import Outputs
from selfplay.objectives.alphazero import AlphaZero
from selfplay.objectives.base import Models, Need, TraceLike
from selfplay.objectives.loss import Coefficients, Totals
from selfplay.packing import Item, Packed


@dataclass(frozen=True, slots=True)
class Sft:
    """AlphaZero with the imitation of wins alone (DESIGN.md, decision 6)."""

    name: ClassVar[str] = "sft"

    value: float = 0.0
    """Weight of the value loss; 0 leaves the value head as it is and trains on winning paths only."""
    max_wins: int = 3
    """Distinct wins imitated per problem and iteration."""
    importance: str = "none"
    """none, step or path (`importance.Importance`): with one, the truncated off-policy gradient of the win rate."""
    importance_cap: float = 2.0
    """Largest importance ratio."""
    value_label: str = "mean"
    """outcome, mean or max (`items.ValueRule`)."""
    value_mix: float = 0.0
    """Share of the search's mean value Q in the labels."""
    value_share: float = 1.0
    """Share of the trees whose nodes carry value labels."""
    kl: float = 0.0
    """Weight of the KL to the reference."""

    def __post_init__(self) -> None:
        self._whole  # noqa: B018 (bad settings are refused)

    @property
    def _whole(self) -> AlphaZero:
        return AlphaZero(
            policy=0.0,
            nll=1.0,
            value=self.value,
            kl=self.kl,
            max_wins=self.max_wins,
            importance=self.importance,
            importance_cap=self.importance_cap,
            value_label=self.value_label,
            value_mix=self.value_mix,
            value_share=self.value_share,
        )

    @property
    def needs(self) -> frozenset[Need]:
        return self._whole.needs

    @property
    def replay(self) -> Coefficients:
        return self._whole.replay

    def prepare(self, traces: Sequence[TraceLike], models: Models, rng: np.random.Generator) -> list[Item]:
        return self._whole.prepare(traces, models, rng)

    def loss(self, outputs: Outputs, packed: Packed, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        return self._whole.loss(outputs, packed, totals)
