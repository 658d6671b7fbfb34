"""The parts that objectives are sums of. Each part is a mean over everything in the optimiser step, so the loss does
not depend on how the step was cut into batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from selfplay.forward import Outputs
from selfplay.packing import Item, Packed


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Weights of the parts of a loss; a part of weight 0 is reported where it costs nothing and trains nothing."""

    policy: float = 0.0
    """Cross-entropy between the target and the policy renormalised over the drawn siblings, mean over groups."""
    nll: float = 0.0
    """Negative log-likelihood per imitated token."""
    value: float = 0.0
    """Binary cross-entropy per value label."""
    kl: float = 0.0
    """KL to the reference per sampled token, k3 estimator."""
    importance_cap: float | None = None
    """Imitated steps count by their importance ratio, truncated at this (at least 1); None: all alike."""

    def __post_init__(self) -> None:
        for name in ("policy", "nll", "value", "kl"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"the {name} coefficient must not be negative, not {getattr(self, name)}")
        if self.importance_cap is not None and not 1.0 <= self.importance_cap < math.inf:
            raise ValueError(f"importance_cap must be a number of at least 1, not {self.importance_cap}")


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums of weights over an optimiser step: what the parts are divided by."""

    groups: float
    nll: float
    values: float
    sampled: float
    ratios: float = 0.0

    @classmethod
    def of(cls, items: Sequence[Item]) -> Totals:
        return cls(
            groups=float(sum(item.group_weight.sum() for item in items)),
            nll=float(sum(item.nll_weight.sum() for item in items)),
            values=float(sum(item.value_weight.sum() for item in items)),
            sampled=float(sum(item.sampled.sum() for item in items)),
            ratios=float(sum(item.ratios.units for item in items)),
        )


def group_cross_entropy(logprobs: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every sibling group and the entropy of its target, both [G] in nats.

    The policy is the softmax over the siblings of the summed log-probabilities of their tokens. The difference of
    the two is the KL from the target to the policy: 0 where the search had nothing to add.
    """
    groups = len(packed.group_weight)
    spans = logprobs.new_zeros(len(packed.span_target)).index_add(
        0, packed.token_span, logprobs.index_select(0, packed.span_token)
    )
    with torch.no_grad():
        top = spans.new_full((groups,), -torch.inf).scatter_reduce(0, packed.span_group, spans, "amax")
    weight = (spans - top.index_select(0, packed.span_group)).exp()
    total = spans.new_zeros(groups).index_add(0, packed.span_group, weight).log() + top
    share = spans - total.index_select(0, packed.span_group)
    target = packed.span_target
    cross = spans.new_zeros(groups).index_add(0, packed.span_group, -target * share)
    own = spans.new_zeros(groups).index_add(0, packed.span_group, -torch.xlogy(target, target))
    return cross, own


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference) from drawn tokens, never negative [M]
    (Schulman 2020, "Approximating KL divergence": r - 1 - log r with r = p_reference / p)."""
    log_ratio = reference - logprobs
    return log_ratio.exp() - 1.0 - log_ratio


def weighed_likelihood(logprobs: Tensor, packed: Packed, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of -log p over the imitated tokens, each counted min(cap, p / p when drawn) times (without gradient): the
    ratio of its step or of its whole path (`packing.Ratios`). Beside it the U ratios so truncated, and which were.

    With reward 1 for a win it is the truncated importance-sampling policy gradient: the gradient of the win rate of
    the weights that learn, from paths that other weights drew; a cap bounds its variance and biases it towards them
    (Espeholt et al. 2018, "IMPALA", arXiv 1802.01561, the truncated rho).
    """
    runs = logprobs.new_zeros(len(packed.ratio_weight)).index_add(
        0, packed.token_ratio, logprobs.index_select(0, packed.ratio_token)
    )
    with torch.no_grad():
        apart = runs.new_zeros(packed.units).index_add(0, packed.ratio_unit, runs - packed.ratio_behavior)
        ratio = apart.clamp(max=math.log(cap)).exp()
    loss = -(packed.ratio_weight * ratio.index_select(0, packed.ratio_unit) * runs).sum()
    return loss, ratio, apart > math.log(cap)


def composite_loss(
    outputs: Outputs, packed: Packed, totals: Totals, coefficients: Coefficients
) -> tuple[Tensor, dict[str, Tensor]]:
    """One batch's share of the loss of its step, and of its parts (without gradient).

    Summed over the batches of a step, a part is its mean over the step. Parts without anything to count are absent.
    Raises ValueError where a coefficient needs what is not there (reference log-probabilities, a value head).
    """
    loss = outputs.logprobs.new_zeros(())
    parts: dict[str, Tensor] = {}

    def add(name: str, part: Tensor, coefficient: float) -> None:
        nonlocal loss
        parts[name] = part.detach()
        if coefficient:
            loss = loss + coefficient * part

    if totals.groups:
        cross, own = group_cross_entropy(outputs.logprobs, packed)
        add("cross_entropy", (packed.group_weight * cross).sum() / totals.groups, coefficients.policy)
        parts["target_kl"] = (packed.group_weight * (cross - own)).sum().detach() / totals.groups
    if totals.nll and coefficients.importance_cap is None:
        add("nll", -(packed.nll_weight * outputs.logprobs).sum() / totals.nll, coefficients.nll)
    elif totals.nll:
        if bool(torch.isnan(packed.ratio_behavior).any()) or not totals.ratios:
            raise ValueError("importance ratios need behaviour log-probabilities; the items have none")
        each, ratio, cut = weighed_likelihood(outputs.logprobs, packed, coefficients.importance_cap or math.inf)
        add("nll", each / totals.nll, coefficients.nll)
        parts["importance_ratio"] = ratio.sum() / totals.ratios
        parts["importance_capped"] = cut.sum() / totals.ratios
    if totals.values and outputs.value_logits is not None:
        each = F.binary_cross_entropy_with_logits(outputs.value_logits, packed.value_label, reduction="none")
        add("value_loss", (packed.value_weight * each).sum() / totals.values, coefficients.value)
    elif totals.values and coefficients.value:
        raise ValueError("the value loss needs a value head and the policy has none; add one or set its weight to 0")
    if coefficients.kl and totals.sampled:
        drawn = packed.sampled > 0
        if bool(torch.isnan(packed.reference[drawn]).any()):
            raise ValueError("the KL needs reference log-probabilities; give the objective a reference model")
        each = k3(outputs.logprobs[drawn], packed.reference[drawn])
        add("kl", (packed.sampled[drawn] * each).sum() / totals.sampled, coefficients.kl)
    return loss, parts
