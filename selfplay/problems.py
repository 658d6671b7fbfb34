"""Which problems an iteration plays: drawn with weight by their measured solve rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(slots=True)
class SolveRates:
    """How often the policy's own chains won, per training problem, discounted over time.

    Counts are of finished chains in the trees (draws of terminal nodes), so a search that finds a win after many
    misses still marks its problem as hard. Halving the past at each iteration lets the rate follow the policy.
    """

    wins: npt.NDArray[np.float64]  # [n_problems]
    chains: npt.NDArray[np.float64]  # [n_problems]
    decay: float = 0.5

    @classmethod
    def empty(cls, n_problems: int) -> SolveRates:
        return cls(np.zeros(n_problems), np.zeros(n_problems))

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> SolveRates:
        """From `to_state`; sparse, because most problems of a large pool were not played yet."""
        rates = cls.empty(state["n"])
        rates.wins[state["index"]] = state["wins"]
        rates.chains[state["index"]] = state["chains"]
        return rates

    def to_state(self) -> dict[str, Any]:
        index = np.flatnonzero(self.chains)
        return {
            "n": len(self.chains),
            "index": index.tolist(),
            "wins": self.wins[index].tolist(),
            "chains": self.chains[index].tolist(),
        }

    def update(
        self, index: npt.NDArray[np.int64], wins: npt.NDArray[np.float64], chains: npt.NDArray[np.float64]
    ) -> None:
        """Add one iteration's counts; a problem's past is halved when it is played again."""
        self.wins[index] = self.wins[index] * self.decay + wins
        self.chains[index] = self.chains[index] * self.decay + chains

    def weights(self, floor: float) -> npt.NDArray[np.float64]:
        """Relative weight of each problem, float64 [n_problems].

        With a Beta(1, 1) prior on the rate r, the weight is the chance that one chain loses and one of a few more
        wins, (1 - r) * (1 - (1 - r)^8): most for problems won sometimes, little for the always solved and for
        those that many chains never solved; never below `floor`.
        """
        rate = (self.wins + 1.0) / (self.chains + 2.0)
        return np.maximum(floor, (1.0 - rate) * (1.0 - (1.0 - rate) ** 8))


def draw_problems(weights: npt.NDArray[np.float64], n: int, *, seed: int, iteration: int) -> npt.NDArray[np.int64]:
    """`n` different problems with chance by weight (Gumbel top-n), or all where there are fewer; int64, sorted.

    A function of its arguments, so that a resumed run draws the same.
    """
    rng = np.random.default_rng((seed, iteration, 0x9B0B))
    noise = rng.gumbel(size=len(weights))
    order = np.argsort(-(np.log(weights) + noise), kind="stable")
    return np.sort(order[:n]).astype(np.int64)
