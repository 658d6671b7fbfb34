"""Game of 24: combine four numbers from 1 to 13 by + - * / and reach 24; fractions on the way are allowed.

The puzzles come from a CSV file with the columns Rank and Puzzles (rank 1 is the easiest), or are enumerated.
The held-out split is the puzzles of rank 901 to 1000; no set of theirs, nor of the dev split, occurs in training
under any target or in any order, warm-up included.

1,198 training puzzles are few: a small model learns them by heart. `train_high` above 13 adds the sets with numbers up
to it to warm-up and, where they reach the target, to the training puzzles; what is held out stays the same.

Steps never go below zero, for whoever writes a - b can write b - a and turn the sign that follows; a text format
with negative numbers would only need more words. An *answer* may: the game allows it.
"""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from mcts.tasks.arithmetic import ArithmeticTask, whole_number, yes_or_no
from mcts.tasks.base import TaskSettingError
from mcts.tasks.numbers import Int64
from mcts.tasks.plays import count_plays
from mcts.tasks.warmup import WarmupSettings
from mcts.types import Problem
from mcts.verify.exact import Rules

COUNT = 4
LOW, HIGH = 1, 13
SPLITS = ("train", "dev", "heldout")

Puzzle = tuple[int, ...]
"""Four numbers, ascending."""


class Game24(ArithmeticTask):
    """Settings: the puzzle file, the split, and which numbers a step may write.

    The limits of numbers follow from the rules: 169 is the largest product of two numbers, 13 the largest
    denominator of a quotient of two; fractions above 24/1 are left out. All 1362 puzzles stay solvable.
    """

    def __init__(
        self,
        path: str | None = None,
        target: int = 24,
        heldout_low: int = 901,
        heldout_high: int = 1000,
        dev_sets: int = 64,
        train_high: int = HIGH,
        extra_target_low: int | None = None,
        extra_target_high: int | None = None,
        train_problems: int | None = None,
        max_value: int = 169,
        max_numerator: int = 24,
        max_denominator: int = 13,
        warmup_target_low: int = 1,
        warmup_target_high: int = 99,
        warmup_share: float = 0.0,
        balanced: bool = False,
        exact_values: bool = False,
        negatives: int = 1,
        larger_first: bool = True,
        seed: int = 0,
    ) -> None:
        """path: CSV file; None: every solvable set, ranked by the chance that a random play wins. A file that is not
        here is an error once puzzles are asked for: a worker, which is sent its problems, needs no copy.
        train_high: largest number in training; above 13 its further sets are puzzles of their own, without a rank.
        extra_target_*: train also on every reachable target of this range (None: on `target` alone).
        warmup_share: share of warm-up plays that end at `target`, up to .5; 0: as random play has it.
        balanced: warm up on hard and easy problems about equally often; exact_values: label negatives by what can still
        be reached (see WarmupSettings)."""
        name = "game24"
        whole_number(name, "max_value", max_value, HIGH, 2000)
        whole_number(name, "max_numerator", max_numerator, 0, 2000)
        whole_number(name, "max_denominator", max_denominator, 1, 200)
        whole_number(name, "warmup_target_low", warmup_target_low, 1, max_value - 1)
        whole_number(name, "warmup_target_high", warmup_target_high, warmup_target_low + 1, max_value)
        whole_number(name, "target", target, warmup_target_low, warmup_target_high)
        whole_number(name, "heldout_low", heldout_low, 1, 10**6)
        whole_number(name, "heldout_high", heldout_high, heldout_low, 10**6)
        whole_number(name, "dev_sets", dev_sets, 0, 2000)
        whole_number(name, "train_high", train_high, HIGH, 50)
        whole_number(name, "negatives", negatives, 0, 64)
        yes_or_no(name, larger_first=larger_first, balanced=balanced, exact_values=exact_values)
        whole_number(name, "seed", seed, 0, 2**63 - 1)
        if train_problems is not None:
            whole_number(name, "train_problems", train_problems, 1, 10**9)
        if path is not None and not isinstance(path, str):
            raise TaskSettingError(f"game24: path must be the path of a file, not {path!r}")
        if not isinstance(warmup_share, int | float) or not 0 <= warmup_share <= 0.5:
            raise TaskSettingError(f"game24: warmup_share must be from 0 to 0.5, not {warmup_share!r}")
        self._extra: tuple[int, int] | None = None
        if extra_target_low is not None or extra_target_high is not None:
            low = whole_number(name, "extra_target_low", extra_target_low, warmup_target_low, warmup_target_high)
            high = whole_number(name, "extra_target_high", extra_target_high, low, warmup_target_high)
            self._extra = low, high
        super().__init__(
            name=name,
            count=COUNT,
            low=LOW,
            high=train_high,
            rules=Rules(max_value, max_numerator, max_denominator, zero=True),
            answer_rules=None,
            warmup=WarmupSettings(
                warmup_target_low,
                warmup_target_high,
                negatives,
                larger_first,
                target,
                float(warmup_share),
                balanced,
                exact_values,
            ),
        )
        self.target = target
        self._seed = seed
        self._train_problems = train_problems
        self.files = () if path is None else (path,)
        self._heldout = heldout_low, heldout_high
        self._dev_sets, self._train_high = dev_sets, train_high
        self._cache: dict[str, Sequence[Problem]] = {}
        if path is None or os.path.exists(path):
            _ = self._puzzles  # a bad file or setting is refused before anything runs

    @cached_property
    def _ranks(self) -> dict[Puzzle, int]:
        return read_puzzles(self.files[0]) if self.files else self._enumerated()

    @cached_property
    def _puzzles(self) -> dict[str, list[Puzzle]]:
        """By split."""
        low, high = self._heldout
        heldout = [puzzle for puzzle, rank in self._ranks.items() if low <= rank <= high]
        others = [puzzle for puzzle, rank in self._ranks.items() if not low <= rank <= high]
        if not heldout:
            raise TaskSettingError(f"game24: no puzzle has a rank from {low} to {high}: lower heldout_low")
        dev = self._dev_sets
        if dev >= len(others):
            raise TaskSettingError(f"game24: dev_sets would take all of the {len(others)} puzzles left: lower it")
        order = np.random.default_rng([self._seed, 0]).permutation(len(others)).tolist()
        shuffled = [others[k] for k in order]
        return {"heldout": heldout, "dev": shuffled[:dev], "train": shuffled[dev:]}

    @cached_property
    def _training(self) -> Int64:
        aside = {*self._puzzles["heldout"], *self._puzzles["dev"]}
        return np.array([row for row in _all_sets(self._train_high) if row not in aside], dtype=np.int64)

    def _enumerated(self) -> dict[Puzzle, int]:
        sets = _all_sets()
        share = self._shares(self.table.index(np.array(sets)), self.target)
        ranked = sorted((-chance, row) for chance, row in zip(share.tolist(), sets, strict=True) if chance > 0)
        return {row: rank for rank, (_, row) in enumerate(ranked, start=1)}

    def training_sets(self) -> Int64:
        """All multisets but those of the held-out and dev puzzles; also sets that cannot reach `target`."""
        return self._training

    def problems(self, split: str) -> Sequence[Problem]:
        """Held-out puzzles by rank, all of them; dev and train shuffled, without any that the limits of numbers
        make unsolvable. Meta: numbers, target, solutions (winning plays), share (chance that a random play wins)
        and, for puzzles, rank."""
        if split not in SPLITS:
            raise TaskSettingError(f"game24 has no split {split!r}: choose one of {', '.join(SPLITS)}")
        if split not in self._cache:
            self._cache[split] = tuple(self._make(split))
        return self._cache[split]

    def _make(self, split: str) -> list[Problem]:
        random = np.random.default_rng([self._seed, 1 + SPLITS.index(split)])
        puzzles = sorted(self._puzzles[split], key=self._ranks.__getitem__)
        reach = count_plays(self.table, self.table.index(np.array(puzzles)), self.target, self.target)
        assert reach.plays is not None
        numbers = random.permuted(np.array(puzzles), axis=1).tolist()
        found = [
            self.problem(drawn, self.target, solutions=plays, share=round(share, 9), rank=self._ranks[row])
            for row, drawn, plays, share in zip(
                puzzles, numbers, reach.plays[:, 0].tolist(), reach.share[:, 0].tolist(), strict=True
            )
            if split == "heldout" or plays > 0
        ]
        if split == "heldout":
            return found
        further = self._training[self._training[:, -1] > HIGH]
        if split == "train" and len(further):
            reach = count_plays(self.table, self.table.index(further), self.target, self.target)
            found += self.make_problems(further, reach, random=random, limit=None)
        if split == "train" and self._extra is not None:
            extra = count_plays(self.table, self.table.index(self._training), *self._extra)
            if self._extra[0] <= self.target <= self._extra[1]:
                extra.share[:, self.target - self._extra[0]] = 0.0  # those are the puzzles, made above
            found += self.make_problems(self._training, extra, random=random, limit=None)
        order = random.permutation(len(found)).tolist()
        return [found[k] for k in order][: self._train_problems if split == "train" else None]


def _all_sets(high: int = HIGH) -> list[Puzzle]:
    return list(itertools.combinations_with_replacement(range(LOW, high + 1), COUNT))


def read_puzzles(path: str | Path) -> dict[Puzzle, int]:
    """Puzzle -> rank from a CSV file with the columns Rank and Puzzles ("1 1 4 6"); other columns are ignored.

    Raises TaskSettingError in one sentence: no file, no such columns, or the first bad row by its number (1 is the row
    below the header).
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise TaskSettingError(f"game24: there is no puzzle file {path}: give path, or leave it out") from error
    except (OSError, UnicodeDecodeError) as error:
        raise TaskSettingError(f"game24: the puzzle file {path} cannot be read as text: {error}") from error
    reader = csv.DictReader(text.splitlines(), strict=True)
    ranks: dict[Puzzle, int] = {}
    taken: set[int] = set()
    row = 0
    try:
        if not {"Rank", "Puzzles"} <= set(reader.fieldnames or ()):
            raise TaskSettingError(f"game24: {path} needs the columns Rank and Puzzles in its first line")
        for row, fields in enumerate(reader, start=1):
            rank, puzzle = fields["Rank"] or "", _puzzle(fields["Puzzles"] or "")
            if not (rank.isascii() and rank.isdigit() and len(rank) < 7) or int(rank) in taken:
                raise TaskSettingError(f"row {row} of {path}: Rank must be a whole number of its own, not {rank!r}")
            if puzzle is None or puzzle in ranks:
                raise TaskSettingError(
                    f"row {row} of {path}: Puzzles must be four numbers from {LOW} to {HIGH} that no other row has, "
                    f"not {fields['Puzzles']!r}"
                )
            taken.add(int(rank))
            ranks[puzzle] = int(rank)
    except csv.Error as error:
        raise TaskSettingError(f"row {row + 1} of {path} is no CSV: {error}") from error
    if not ranks:
        raise TaskSettingError(f"game24: {path} has no puzzles")
    return ranks


def _puzzle(text: str) -> Puzzle | None:
    words = text.split()
    if len(words) != COUNT or not all(word.isascii() and word.isdigit() and len(word) < 4 for word in words):
        return None
    numbers = tuple(sorted(map(int, words)))
    return numbers if numbers[0] >= LOW and numbers[-1] <= HIGH else None
