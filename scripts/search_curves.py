"""Tokens and wins of searches that stop at their first win, at every budget up to the one they had."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from selfplay.stats import paired_bootstrap_ratio

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """What a method did on P problems with S seeds."""

    tokens: Float64  # [S, P] tokens drawn, those of the win included
    won: Float64  # [S, P] 1 where a win was verified

    @property
    def tokens_per_win(self) -> float:
        wins = float(self.won.sum())
        return float(self.tokens.sum()) / wins if wins else math.inf

    def per_problem(self) -> list[tuple[float, float]]:
        """(tokens, wins) of each problem, all seeds together."""
        return list(zip(self.tokens.sum(0).tolist(), self.won.sum(0).tolist(), strict=True))

    def at(self, cap: float) -> tuple[float, float]:
        """Mean tokens and wins per search had every search been cut off at `cap` tokens."""
        return float(np.minimum(self.tokens, cap).mean()), float((self.won * (self.tokens <= cap)).mean())

    def curve(self, limit: int) -> Float64:
        """(tokens, wins) per search at the caps 0, 1, ..., limit, float64 [limit + 1, 2], both columns ascending."""
        drawn = self.tokens.ravel().astype(np.int64)
        ends = np.bincount(drawn, minlength=limit + 1)[: limit + 1]
        wins = np.bincount(drawn, weights=self.won.ravel(), minlength=limit + 1)[: limit + 1]
        alive = len(drawn) - np.concatenate(([0], np.cumsum(ends)[:-1]))  # still drawing at that cap
        alive[0] = 0
        return np.stack((np.cumsum(alive), np.cumsum(wins)), 1) / len(drawn)


def compare(method: Outcomes, sampler: Outcomes, limit: int, seed: int) -> dict[str, float]:
    """`method` against the sampler over the same problems. Ratios above 1: the method is better.

    `ratio` is the sampler's tokens per win over the method's, with its 95% interval over problems (paired bootstrap).
    At equal tokens: the tokens that both reach; at equal wins: the wins that both reach.
    """
    ratio, low, high = paired_bootstrap_ratio(sampler.per_problem(), method.per_problem(), seed=seed)
    ours, theirs = method.curve(limit), sampler.curve(limit)
    tokens = min(ours[-1, 0], theirs[-1, 0])
    wins = min(ours[-1, 1], theirs[-1, 1])
    our_wins, their_wins = (float(np.interp(tokens, c[:, 0], c[:, 1])) for c in (ours, theirs))
    our_tokens, their_tokens = (_tokens_for(c, wins) for c in (ours, theirs))
    return {
        "tokens_per_win": method.tokens_per_win,
        "wins": float(method.won.mean()),
        "tokens": float(method.tokens.mean()),
        "ratio": ratio,
        "low": low,
        "high": high,
        "equal_tokens": float(tokens),
        "wins_at_equal_tokens": our_wins,
        "sampler_wins_at_equal_tokens": their_wins,
        "wins_ratio": our_wins / their_wins if their_wins else math.nan,
        "equal_wins": float(wins),
        "tokens_at_equal_wins": our_tokens,
        "sampler_tokens_at_equal_wins": their_tokens,
        "tokens_ratio": their_tokens / our_tokens if our_tokens else math.nan,
    }


def _tokens_for(curve: Float64, wins: float) -> float:
    """Tokens per search at the smallest cap that gives `wins`."""
    return float(curve[int(np.searchsorted(curve[:, 1], wins - 1e-12)), 0])
