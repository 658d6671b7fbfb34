"""AlphaZero: the policy learns what the search made of it, the value what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from torch import Tensor

from selfplay.forward import Outputs, fit, token_logprobs
from selfplay.items import ValueRule, from_tree, policy_groups, value_labels
from selfplay.objectives.base import Models, Need, TraceLike
from selfplay.objectives.importance import Importance, ratio_runs
from selfplay.objectives.loss import Coefficients, Totals, composite_loss
from selfplay.objectives.wins import pick_wins
from selfplay.packing import Item, Packed


@dataclass(frozen=True, slots=True)
class AlphaZero:
    """Cross-entropy with the search's improved policy over the drawn siblings, plus the value loss; imitation of
    wins and a KL to a reference are coefficients of their own (DESIGN.md, decision 6)."""

    name: ClassVar[str] = "alphazero"

    policy: float = 1.0
    """Weight of the cross-entropy with the search's targets."""
    value: float = 0.5
    """Weight of the value loss."""
    nll: float = 0.0
    """Weight of imitating verified wins."""
    kl: float = 0.0
    """Weight of the KL to the reference."""
    max_wins: int = 3
    """Distinct wins imitated per problem and iteration."""
    importance: str = "none"
    """none, step or path: imitated steps count by how likely the weights that learn are to draw them, against those
    that did (`importance.Importance`)."""
    importance_cap: float = 2.0
    """Largest such ratio."""
    value_label: str = "mean"
    """outcome, mean or max (`items.ValueRule`)."""
    value_mix: float = 0.0
    """Share of the search's mean value Q in the labels."""
    value_share: float = 1.0
    """Share of the trees whose nodes carry value labels; the others are trained on for the policy alone. Labels keep
    whole trees in the batch, imitation only their winning paths."""

    def __post_init__(self) -> None:
        self.coefficients  # noqa: B018 (negative weights are refused)
        if self.max_wins < 1:
            raise ValueError(f"max_wins must be at least 1, not {self.max_wins}")
        if self.importance not in list(Importance):
            raise ValueError(f"importance must be one of {', '.join(Importance)}, not {self.importance!r}")
        if self.value_label not in list(ValueRule):
            raise ValueError(f"value_label must be one of {', '.join(ValueRule)}, not {self.value_label!r}")
        for name in ("value_mix", "value_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}")

    @property
    def coefficients(self) -> Coefficients:
        cap = self.importance_cap if self._weighs else None
        return Coefficients(policy=self.policy, nll=self.nll, value=self.value, kl=self.kl, importance_cap=cap)

    @property
    def _weighs(self) -> bool:
        return self.nll > 0.0 and self.importance != Importance.NONE

    @property
    def replay(self) -> Coefficients:
        return Coefficients(nll=1.0, value=self.value)

    @property
    def needs(self) -> frozenset[Need]:
        wanted = {Need.REFERENCE: self.kl > 0.0, Need.VALUE_HEAD: self.value > 0.0, Need.BEHAVIOR: self._weighs}
        return frozenset(need for need, needed in wanted.items() if needed)

    def prepare(self, traces: Sequence[TraceLike], models: Models, rng: np.random.Generator) -> list[Item]:
        rule = ValueRule(self.value_label)
        picked = pick_wins(traces, self.max_wins, rng) if self.nll else [[] for _ in traces]
        items = []
        for trace, wins in zip(traces, picked, strict=True):
            tree = trace.tree
            groups = policy_groups(tree, str(trace.settings.get("prior_rule", "exact"))) if self.policy else []
            labelled = self.value > 0.0 and (self.value_share == 1.0 or rng.random() < self.value_share)
            labels = value_labels(tree, rule, path=trace.path, mix=self.value_mix) if labelled else None
            item = from_tree(
                tree,
                wins=wins,
                groups=groups,
                values=labels,
                sampled=self.kl > 0.0,
                version=trace.policy_version,
                ratios=ratio_runs(trace, wins, Importance(self.importance)) if self._weighs else (),
            )
            if item is not None:
                items.append(item)
        items = fit(items, models.max_length, row_length=models.row_length, tree_mask=models.tree_mask)
        return with_reference(items, models) if self.kl else items

    def loss(self, outputs: Outputs, packed: Packed, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        return composite_loss(outputs, packed, totals, self.coefficients)


def with_reference(items: Sequence[Item], models: Models) -> list[Item]:
    """Items with the reference model's log-probabilities; the reference must be given."""
    if models.reference is None:
        raise ValueError("the KL needs a reference model; give one or set kl to 0")
    found = token_logprobs(models.reference, items, tokens=models.tokens, tree_mask=models.tree_mask)
    return [replace(item, reference=logprobs) for item, logprobs in zip(items, found, strict=True)]
