"""What a learning phase reports: means over its steps, and a ranking score of bounded memory."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

BINS = 4096


class RunningAuc:
    """Area under the ROC curve of predictions in [0, 1] against labels in [0, 1], over any number of them.

    A soft label counts as so much of a positive and the rest of a negative. Predictions closer than 1 / BINS are a
    tie, which counts half.
    """

    def __init__(self) -> None:
        self._positive = np.zeros(BINS)
        self._negative = np.zeros(BINS)

    def add(self, predictions: Tensor, labels: Tensor) -> None:
        """Both [V]."""
        place = (predictions.detach().double().cpu().numpy() * BINS).astype(np.int64).clip(0, BINS - 1)
        label = labels.detach().double().cpu().numpy()
        self._positive += np.bincount(place, label, BINS)
        self._negative += np.bincount(place, 1.0 - label, BINS)

    def merge(self, other: RunningAuc) -> None:
        """Count what `other` counted too."""
        for mine, theirs in zip(self.counts, other.counts, strict=True):
            mine += theirs

    @property
    def counts(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Positives and negatives by prediction, [BINS] each; they may be changed in place."""
        return self._positive, self._negative

    def value(self) -> float:
        """NaN without positives or without negatives."""
        pairs = self._positive.sum() * self._negative.sum()
        if pairs <= 0.0:
            return math.nan
        below = np.cumsum(self._negative) - self._negative
        return float((self._positive * (below + 0.5 * self._negative)).sum() / pairs)


class Means:
    """Weighted means by name; a name that was never added is absent."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, values: Mapping[str, float], weight: float = 1.0) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + weight * value
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {"sums": dict(self._sums), "weights": dict(self._weights)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        self._sums, self._weights = dict(state["sums"]), dict(state["weights"])

    def get(self, name: str) -> float:
        """NaN for a name without weight."""
        weight = self._weights.get(name, 0.0)
        return self._sums[name] / weight if weight else math.nan
