"""Legal play on arrays: every move, random play, and the exhaustive count of plays that reach each target.

A state is a row of number indices (see `NumberTable`). A move takes two positions and an operation, removes both
numbers and appends the result; every play of n numbers has n - 1 moves. Random play draws uniformly among the
legal moves, moves on different positions counted apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from mcts.tasks.numbers import ILLEGAL, REVERSED, Int64, NumberTable

Float64 = npt.NDArray[np.float64]
ROWS = 1 << 14
"""States that are expanded together: a bound on memory, without influence on results."""
SETS = 1 << 12
"""Number sets that `chances` counts together; like SUMMED another such bound."""
SUMMED = 1 << 8
"""States whose moves it adds up together."""


@cache
def _pairs(count: int) -> tuple[Int64, Int64, Int64]:
    """Positions i < j of all P pairs, int64 [P] each, and the positions that stay, int64 [P, count - 2]."""
    first, second = np.triu_indices(count, 1)
    stay = [[k for k in range(count) if k not in (i, j)] for i, j in zip(first, second, strict=True)]
    return first, second, np.array(stay, dtype=np.int64).reshape(len(first), count - 2)


def moves(table: NumberTable, states: Int64) -> tuple[Int64, Int64, Int64]:
    """Every move from `states` [B, k]: larger and smaller operand [B, P] and result [B, O, P] (or ILLEGAL)."""
    first, second, _ = _pairs(states.shape[1])
    a, b = states[:, first], states[:, second]
    larger, smaller = np.maximum(a, b), np.minimum(a, b)
    results = np.stack([made[larger, smaller] for made in table.results], axis=1)
    return larger, smaller, results.astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Plays:
    """B finished plays of n numbers; number indices int64. The larger operand comes first, but where a smaller
    number is divided by a larger one."""

    rows: Int64  # [B] row of the numbers that the play started from
    numbers: Int64  # [B, n]
    left: Int64  # [n - 1, B] first operand of each move
    operation: Int64  # [n - 1, B] index into OPERATION_SIGNS
    right: Int64  # [n - 1, B] second operand
    after: tuple[Int64, ...]  # n - 1 arrays [B, n - 1 - k]: numbers left after move k, result last

    @property
    def reached(self) -> Int64:
        """Index of the number each play ended at, int64 [B]; UNWRITTEN where it cannot be a target."""
        return self.after[-1][:, 0]

    def keep(self, which: npt.NDArray[np.bool_] | Int64) -> Plays:
        """The plays that a mask or an index array selects."""
        return Plays(
            self.rows[which],
            self.numbers[which],
            self.left[:, which],
            self.operation[:, which],
            self.right[:, which],
            tuple(states[which] for states in self.after),
        )

    def joined(self, other: Plays) -> Plays:
        """These plays, then the other ones."""
        return Plays(
            np.append(self.rows, other.rows),
            np.concatenate([self.numbers, other.numbers]),
            np.concatenate([self.left, other.left], axis=1),
            np.concatenate([self.operation, other.operation], axis=1),
            np.concatenate([self.right, other.right], axis=1),
            tuple(np.concatenate(pair) for pair in zip(self.after, other.after, strict=True)),
        )


def random_plays(table: NumberTable, numbers: Int64, random: np.random.Generator) -> Plays:
    """One uniformly random legal play from each row of `numbers` [B, n]. Rows that run out of legal moves are
    left out, so fewer than B plays may come back."""
    rows = np.arange(len(numbers))
    alive = np.ones(len(numbers), dtype=np.bool_)
    states = numbers
    left, operation, right, after = [], [], [], []
    for count in range(numbers.shape[1], 1, -1):
        larger, smaller, results = moves(table, states)
        flat = results.reshape(len(states), -1)  # [B, O * P]
        order = np.cumsum(flat != ILLEGAL, axis=1)
        drawn = np.floor(random.random(len(states)) * order[:, -1]).astype(np.int64)
        move = (order > drawn[:, None]).argmax(axis=1)
        alive &= order[:, -1] > 0
        # A dead row plays on with any number, so that shapes stay; it is left out below.
        result = np.where(alive, flat[rows, move], 0)
        kind, pair = np.divmod(move, larger.shape[1])
        turned = kind == REVERSED
        a, b = larger[rows, pair], smaller[rows, pair]
        stay = np.take_along_axis(states, _pairs(count)[2][pair], axis=1)
        states = np.concatenate([stay, result[:, None]], axis=1)
        left.append(np.where(turned, b, a))
        right.append(np.where(turned, a, b))
        operation.append(kind)
        after.append(states)
    plays = Plays(rows, numbers, np.stack(left), np.stack(operation), np.stack(right), tuple(after))
    return plays if alive.all() else plays.keep(alive)


@dataclass(frozen=True, slots=True, eq=False)
class Reach:
    """How S number sets reach each of T = target_high - target_low + 1 targets."""

    target_low: int
    share: Float64  # [S, T] chance that a uniformly random legal play ends at the target
    plays: Int64 | None  # [S, T] winning plays, each sequence of moves counted once; None where not enumerated


def count_plays(table: NumberTable, numbers: Int64, target_low: int, target_high: int) -> Reach:
    """Play out every legal play of every row of `numbers` [S, n].

    Cost in plays per row: about 100 for three numbers, 1,500 for four, 40,000 for five, 2 million for six.
    """
    width = target_high - target_low + 1
    share = np.zeros(len(numbers) * width)
    plays = np.zeros(len(numbers) * width)
    whole = np.append(table.whole, [-1, -1])  # ILLEGAL and UNWRITTEN read the appended entries

    def expand(states: Int64, chance: Float64, origin: Int64) -> None:
        for start in range(0, len(states), ROWS):
            part = slice(start, start + ROWS)
            here = states[part]
            results = moves(table, here)[2]  # [B, O, P]
            legal = results != ILLEGAL
            total = legal.sum(axis=(1, 2))
            row, kind, pair = np.nonzero(legal)
            result = results[row, kind, pair]
            weight = chance[part][row] / total[row]
            if here.shape[1] == 2:
                reached = whole[result]
                hit = (reached >= target_low) & (reached <= target_high)
                cell = origin[part][row][hit] * width + reached[hit] - target_low
                np.add.at(share, cell, weight[hit])
                np.add.at(plays, cell, 1)
            else:
                stay = here[row[:, None], _pairs(here.shape[1])[2][pair]]
                expand(np.concatenate([stay, result[:, None]], axis=1), weight, origin[part][row])

    expand(numbers, np.ones(len(numbers)), np.arange(len(numbers)))
    shape = len(numbers), width
    return Reach(target_low, share.reshape(shape), plays.astype(np.int64).reshape(shape))


def chances(table: NumberTable, numbers: Int64, target_low: int, target_high: int) -> Float64:
    """`count_plays(...).share` but for rounding, for many sets: each state that play comes to is counted once,
    whatever the ways to it. Seconds for all 42,504 sets of five numbers from 1 to 20, where those take a minute."""
    whole = np.append(table.whole, [-1, -1])  # ILLEGAL and UNWRITTEN read the appended entries

    def of(states: Int64) -> Float64:
        found = np.zeros((len(states), target_high - target_low + 1))
        results = moves(table, states)[2]  # [B, O, P]
        row, kind, pair = np.nonzero(results != ILLEGAL)
        result = results[row, kind, pair]
        if states.shape[1] == 2:
            reached = whole[result]
            hit = (reached >= target_low) & (reached <= target_high)
            np.add.at(found, (row[hit], reached[hit] - target_low), 1.0)
        else:
            stay = states[row[:, None], _pairs(states.shape[1])[2][pair]]
            distinct, which = _distinct(np.concatenate([stay, result[:, None]], axis=1))
            after = of(distinct)
            movable, first = np.unique(row, return_index=True)
            first = np.append(first, len(row))
            for start in range(0, len(movable), SUMMED):
                ends = first[start : start + SUMMED + 1]
                added = np.add.reduceat(after[which[ends[0] : ends[-1]]], ends[:-1] - ends[0], axis=0)
                found[movable[start : start + SUMMED]] = added
        return found / np.maximum(np.bincount(row, minlength=len(states)), 1)[:, None]

    distinct, which = _distinct(numbers)
    return np.concatenate([of(distinct[k : k + SETS]) for k in range(0, len(distinct), SETS)])[which]


def _distinct(states: Int64) -> tuple[Int64, Int64]:
    """The distinct multisets among rows [B, k], each ascending, in lexicographic order, and which one each row is."""
    states = np.sort(states, axis=1)
    order = np.lexsort(states.T[::-1])
    ordered = states[order]
    new = np.ones(len(states), dtype=np.bool_)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    which = np.empty(len(states), dtype=np.int64)
    which[order] = np.cumsum(new) - 1
    return ordered[new], which


def sample_plays(
    table: NumberTable, numbers: Int64, target_low: int, target_high: int, *, plays: int, seed: int
) -> Reach:
    """`Reach` estimated from `plays` random plays of every row of `numbers` [S, n], where playing out all of them
    takes too long. A share above zero still proves that a target can be reached."""
    width = target_high - target_low + 1
    found = np.zeros(len(numbers) * width)
    whole = np.append(table.whole, [-1, -1])
    random = np.random.default_rng(seed)
    at_once = max(1, ROWS // plays)
    for start in range(0, len(numbers), at_once):
        origin = np.repeat(np.arange(start, min(start + at_once, len(numbers))), plays)
        drawn = random_plays(table, numbers[origin], random)
        reached = whole[drawn.reached]
        hit = (reached >= target_low) & (reached <= target_high)
        np.add.at(found, origin[drawn.rows[hit]] * width + reached[hit] - target_low, 1)
    return Reach(target_low, found.reshape(len(numbers), width) / plays, None)
