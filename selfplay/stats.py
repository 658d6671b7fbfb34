"""Small statistics that figures are reported with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion (95% by default); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that k samples hold a win, 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374).
    NaN where fewer than k samples were drawn."""
    if samples < k:
        return math.nan
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod((samples - correct - i) / (samples - i) for i in range(k))


def auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Chance that a positive scores above a negative, ties counted half; NaN where one class is missing."""
    values = np.asarray(scores, dtype=np.float64)
    positive = np.asarray(labels, dtype=np.bool_)
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if n_positive == 0 or n_negative == 0:
        return math.nan
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2.0)[inverse]  # mean rank of each tie group, from 1
    return float((ranks[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def paired_bootstrap_ratio(
    numerators: Sequence[tuple[float, float]],
    denominators: Sequence[tuple[float, float]],
    *,
    seed: int,
    draws: int = 2000,
) -> tuple[float, float, float]:
    """Ratio of two ratios of sums over the same problems, with its 95% percentile interval.

    Each entry is (cost, gain) of one problem, e.g. (tokens, win); the figure is
    (sum cost / sum gain of `numerators`) / (sum cost / sum gain of `denominators`). Problems are resampled in
    pairs. Draws without any gain are left out.
    """
    a = np.asarray(numerators, dtype=np.float64)  # [P, 2]
    b = np.asarray(denominators, dtype=np.float64)  # [P, 2]
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError("a paired bootstrap needs the same problems on both sides")
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(a), size=(draws, len(a)))
    figure = _ratio(a.sum(0), b.sum(0))
    ratios: npt.NDArray[np.float64] = np.array([_ratio(a[p].sum(0), b[p].sum(0)) for p in picks])
    ratios = ratios[np.isfinite(ratios)]
    if len(ratios) == 0:
        return figure, math.nan, math.nan
    low, high = np.quantile(ratios, [0.025, 0.975])
    return figure, float(low), float(high)


def _ratio(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    if a[1] == 0 or b[0] == 0 or b[1] == 0:
        return math.nan
    return float((a[0] / a[1]) / (b[0] / b[1]))
