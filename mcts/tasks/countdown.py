"""Countdown: combine positive integers by + - * / and reach a target; every result is a positive integer.

Problems are split by number set: no set of the held-out or the dev split occurs in training under any target or
in any order, warm-up included.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from mcts.tasks.arithmetic import ArithmeticTask, whole_number, yes_or_no
from mcts.tasks.base import TaskSettingError
from mcts.tasks.numbers import MAX_WORDS, Int64
from mcts.tasks.plays import Reach, count_plays, sample_plays
from mcts.tasks.warmup import WarmupSettings
from mcts.types import Problem
from mcts.verify.exact import Rules

MAX_SETS = 60_000
"""Most number sets that are told apart: beyond, a seeded sample of so many is all there is."""
ENUMERATED_NUMBERS = 5
"""Up to so many numbers every play is enumerated."""
SAMPLED_PLAYS = 2048
"""Random plays per set where they are not."""

SPLITS = ("train", "dev", "heldout")


class Countdown(ArithmeticTask):
    """Settings: how many `numbers` from `low`..`high`, targets, the largest legal result, and the split.

    `heldout_sets` and `dev_sets` number sets are set aside; `problems("train")` has the reachable targets of at
    most `train_sets` of the others (warm-up plays on all of them). `train_high` above `high` adds the sets with
    numbers up to it to training; what is held out stays the same. `*_problems` cut a split to a random part of it,
    None: all.
    """

    def __init__(
        self,
        numbers: int = 3,
        low: int = 1,
        high: int = 20,
        target_low: int = 10,
        target_high: int = 99,
        max_value: int = 999,
        heldout_sets: int = 256,
        dev_sets: int = 64,
        train_sets: int = 1500,
        train_high: int | None = None,
        train_problems: int | None = None,
        dev_problems: int | None = 256,
        heldout_problems: int | None = 500,
        negatives: int = 1,
        larger_first: bool = True,
        balanced: bool = False,
        exact_values: bool = False,
        seed: int = 0,
    ) -> None:
        name = "countdown"
        whole_number(name, "numbers", numbers, 3, 6)
        whole_number(name, "low", low, 1, MAX_WORDS)
        whole_number(name, "high", high, low, MAX_WORDS)
        most = high if train_high is None else whole_number(name, "train_high", train_high, high, MAX_WORDS)
        whole_number(name, "max_value", max_value, most, 1_000_000)
        whole_number(name, "target_low", target_low, 1, max_value)
        whole_number(name, "target_high", target_high, target_low + 1, min(max_value, target_low + MAX_WORDS))
        whole_number(name, "heldout_sets", heldout_sets, 0, MAX_SETS)
        whole_number(name, "dev_sets", dev_sets, 0, MAX_SETS)
        whole_number(name, "train_sets", train_sets, 1, MAX_SETS)
        whole_number(name, "negatives", negatives, 0, 64)
        yes_or_no(name, larger_first=larger_first, balanced=balanced, exact_values=exact_values)
        whole_number(name, "seed", seed, 0, 2**63 - 1)
        self._limits = {"train": train_problems, "dev": dev_problems, "heldout": heldout_problems}
        for split, limit in self._limits.items():
            if limit is not None:
                whole_number(name, f"{split}_problems", limit, 1, 10**9)
        rules = Rules(max_value=max_value)
        super().__init__(
            name=name,
            count=numbers,
            low=low,
            high=most,
            rules=rules,
            answer_rules=rules,
            warmup=WarmupSettings(
                target_low, target_high, negatives, larger_first, balanced=balanced, exact_values=exact_values
            ),
        )
        self._seed = seed
        self._train_sets = train_sets
        self._cache: dict[str, Sequence[Problem]] = {}
        sets = np.random.default_rng([seed, 0]).permutation(_number_sets(numbers, low, high, seed))
        aside = heldout_sets + dev_sets
        if aside >= len(sets):
            raise TaskSettingError(
                f"countdown: heldout_sets and dev_sets set aside {aside} of only {len(sets)} number sets: "
                "lower them or widen low to high"
            )
        self._sets = {
            "heldout": sets[:heldout_sets],
            "dev": sets[heldout_sets:aside],
            "train": sets[aside:],
        }
        if most > high:
            further = _number_sets(numbers, low, most, seed)
            training = np.concatenate([sets[aside:], further[further[:, -1] > high]])
            self._sets["train"] = np.random.default_rng([seed, 8]).permutation(training)

    def number_sets(self, split: str) -> Int64:
        """The number sets of a split, int64 [S, numbers], each row ascending."""
        if split not in SPLITS:
            raise TaskSettingError(f"countdown has no split {split!r}: choose one of {', '.join(SPLITS)}")
        return self._sets[split]

    def training_sets(self) -> Int64:
        return self._sets["train"]

    def problems(self, split: str) -> Sequence[Problem]:
        """Every problem can be solved. Meta: numbers, target, solutions (winning plays; None with six numbers,
        where targets are those that random plays reached) and share (chance that a random play wins)."""
        if split not in self._cache:
            sets = self.number_sets(split)
            if split == "train":
                sets = sets[: self._train_sets]
            random = np.random.default_rng([self._seed, 1 + SPLITS.index(split)])
            self._cache[split] = tuple(
                self.make_problems(sets, self._reach(sets), random=random, limit=self._limits[split])
            )
        return self._cache[split]

    def _reach(self, sets: Int64) -> Reach:
        low, high = self.warmup_settings.target_low, self.warmup_settings.target_high
        rows = self.table.index(sets)
        if self.count <= ENUMERATED_NUMBERS:
            return count_plays(self.table, rows, low, high)
        return sample_plays(self.table, rows, low, high, plays=SAMPLED_PLAYS, seed=self._seed)


def _number_sets(count: int, low: int, high: int, seed: int) -> Int64:
    """All multisets of `count` numbers, or a seeded sample of MAX_SETS of them, int64 [S, count], rows ascending."""
    if math.comb(high - low + count, count) <= MAX_SETS:
        numbers = range(low, high + 1)
        return np.array(list(itertools.combinations_with_replacement(numbers, count)), dtype=np.int64)
    random = np.random.default_rng([seed, 9])
    drawn = np.sort(random.integers(low, high + 1, size=(2 * MAX_SETS, count)), axis=1)
    _, first = np.unique(drawn, axis=0, return_index=True)
    return drawn[np.sort(first)][:MAX_SETS]
