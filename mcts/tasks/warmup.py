"""Worked examples from random legal play, relabelled with the number that the play reached.

A play that reached 33 is a win of the problem with target 33 and a loss of the same problem with any other
target. No model token is spent, and nothing is looked up in a solution: the rules alone make them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from mcts.tasks.base import TaskSettingError
from mcts.tasks.numbers import OPERATION_SIGNS, Bool, Int64, NumberTable
from mcts.tasks.plays import Float64, Plays, chances, random_plays
from mcts.types import Float32, Int32

SYMBOLS = ("+", "-", "*", "/", "=", "|", ";", "->", ":")
CHUNK = 4096
"""Plays drawn together; part of what a seed means."""
PATIENCE = 256
"""Chunks without a single usable play after which the settings are taken to be impossible."""


@dataclass(frozen=True, slots=True, eq=False)
class WarmupBatch:
    """B examples of n numbers, all of the same length L: prompt, n - 1 steps, and EOS left out."""

    words: Int32  # [B, L] indices into the task's vocabulary()
    ends: Int32  # [n] column of the last word of the prompt and of each step; EOS would follow column L - 1
    values: Float32  # [B, n] value labels in [0, 1], at `ends`; 1 throughout where `imitate`
    imitate: Bool  # [B] False: a negative, the policy does not learn from it

    def __len__(self) -> int:
        return len(self.words)


@dataclass(frozen=True, slots=True)
class WarmupSettings:
    """What the stream is made of."""

    target_low: int
    target_high: int
    negatives: int = 1
    """Losses per win: the same play under a target that it did not reach."""
    larger_first: bool = True
    """Write sums and products with the larger operand first; False: in random order."""
    focus: int | None = None
    """A target that is wanted more often than random play reaches it."""
    focus_share: float = 0.0
    """Share of the plays that end at `focus`, in [0, .5]; 0: as often as it happens. Negatives follow, so that
    the target alone tells nothing about the label."""
    balanced: bool = False
    """Every problem (number set and target that it can reach) about equally often, instead of as often as random play
    reaches it: plays are kept with a chance inverse to that rate, down to a rate that one problem in ten is below."""
    exact_values: bool = False
    """Label a negative's states by whether any play reaches its target from there, instead of as lost throughout."""

    @property
    def counted(self) -> bool:
        """Whether the plays of every set must be counted."""
        return self.balanced or self.exact_values


def columns(count: int) -> tuple[int, Int32]:
    """Words of an example with `count` numbers, and `WarmupBatch.ends`."""
    lengths = [count + 3, *(left + 6 for left in range(count, 2, -1)), 5]
    ends = np.cumsum(lengths) - 1
    return sum(lengths), ends.astype(np.int32)


def warmup_batches(
    table: NumberTable, sets: Int64, settings: WarmupSettings, seed: int, plays: int, share: Float64 | None = None
) -> Iterator[WarmupBatch]:
    """Endless batches of `plays` * (1 + negatives) examples: each play, then its negatives. The examples are a
    function of `seed`, whatever the batch size.

    sets: number indices int64 [S, n] to play from, all equally likely. share: `plays.chances` of them, where
    `settings.counted`. Raises TaskSettingError where random play does not reach the targets.
    """
    _, ends = columns(sets.shape[1])
    rows = plays * (1 + settings.negatives)
    words = np.empty((0, ends[-1] + 1), dtype=np.int32)
    values = np.empty((0, len(ends)), dtype=np.float32)
    imitate = np.arange(rows) % (1 + settings.negatives) == 0
    for chunk, labels in _chunks(table, sets, settings, seed, share):
        words, values = np.concatenate([words, chunk]), np.concatenate([values, labels])
        while len(words) >= rows:
            yield WarmupBatch(words[:rows].copy(), ends, values[:rows].copy(), imitate.copy())
            words, values = words[rows:], values[rows:]


def _chunks(
    table: NumberTable, sets: Int64, settings: WarmupSettings, seed: int, share: Float64 | None
) -> Iterator[tuple[Int32, Float32]]:
    """Word rows [any, L] and their value labels [any, n]: each play, then its negatives."""
    random = np.random.default_rng(seed)
    empty = 0
    keep = _keeping(share) if share is not None and settings.balanced else None
    focus = settings.focus if settings.focus_share > 0 else None
    odds = None
    if share is not None and keep is not None and focus is not None:
        odds = _odds(share[:, focus - settings.target_low], focus)
    while True:
        if keep is not None and odds is not None:
            plays, reached = _balanced_and_focused(table, sets, settings, random, keep, odds)
        else:
            plays, reached = _usable(table, sets, settings, random, random.integers(len(sets), size=CHUNK))
            if keep is not None:
                kept = _kept(keep, plays.rows, reached - settings.target_low, random)
                plays, reached = plays.keep(kept), reached[kept]
            if focus is not None:
                kept = _focused(reached == focus, settings.focus_share)
                plays, reached = plays.keep(kept), reached[kept]
        if len(reached) == 0:
            empty += 1
            if empty >= PATIENCE:
                raise TaskSettingError(
                    f"random play does not reach the targets {settings.target_low} to {settings.target_high}: "
                    "widen the targets or the numbers"
                )
            continue
        empty = 0
        yield _with_negatives(table, plays, reached, settings, random, share if settings.exact_values else None)


def _usable(
    table: NumberTable, sets: Int64, settings: WarmupSettings, random: np.random.Generator, origin: Int64
) -> tuple[Plays, Int64]:
    """A random play from each of the sets `origin`: those that end at a target (rows: their sets), and the targets."""
    plays = random_plays(table, random.permuted(sets[origin], axis=1), random)
    # UNWRITTEN is negative and reads the appended entry.
    reached = np.append(table.whole, -1)[np.maximum(plays.reached, -1)]
    wanted = np.flatnonzero((reached >= settings.target_low) & (reached <= settings.target_high))
    return replace(plays, rows=origin[plays.rows]).keep(wanted), reached[wanted]


def _rare(share: Float64) -> float:
    """The rate that one reachable problem in ten is below; 1 where none is reachable."""
    reachable = share[share > 0]
    return float(np.quantile(reachable, 0.1)) if len(reachable) else 1.0


def _keeping(share: Float64) -> Float64:
    """Chance to keep a play of each problem, float64 [S, T], that makes reachable ones about equally likely."""
    chance: Float64 = np.minimum(1.0, _rare(share) / np.maximum(share, 1e-12))
    return chance


def _odds(share: Float64, focus: int) -> Float64:
    """Running sum of how often to start from each set, float64 [S], so that each is about as often seen to end at
    `focus` as the others. Raises TaskSettingError."""
    if not share.any():
        raise TaskSettingError(f"random play does not reach {focus} from any training set: choose another target")
    odds: Float64 = np.cumsum(np.where(share > 0, 1.0 / np.maximum(share, _rare(share)), 0.0))
    return odds


def _kept(keep: Float64, origin: Int64, column: Int64, random: np.random.Generator) -> Int64:
    """The plays that stay."""
    return np.flatnonzero(random.random(len(origin)) < keep[origin, column])


def _balanced_and_focused(
    table: NumberTable,
    sets: Int64,
    settings: WarmupSettings,
    random: np.random.Generator,
    keep: Float64,
    odds: Float64,
) -> tuple[Plays, Int64]:
    """Plays that end at the focus and others in their ratio, problems of either kind about equally likely.

    Few plays end at one target, so those start from the sets that `odds` favours, instead of being thrown away where
    they are frequent.
    """
    origin = np.searchsorted(odds, random.random(CHUNK) * odds[-1], side="right")
    plays, reached = _usable(table, sets, settings, random, origin)
    hits = np.flatnonzero(reached == settings.focus)
    others, other = _usable(table, sets, settings, random, random.integers(len(sets), size=CHUNK // 4))
    kept = _kept(keep, others.rows, other - settings.target_low, random)
    kept = kept[other[kept] != settings.focus]
    ratio = (1.0 - settings.focus_share) / settings.focus_share
    hits = hits[: int(len(kept) / ratio)]
    kept = kept[: round(len(hits) * ratio)]
    mixed = random.permutation(len(hits) + len(kept))
    return plays.keep(hits).joined(others.keep(kept)).keep(mixed), np.append(reached[hits], other[kept])[mixed]


def _focused(hit: Bool, share: float) -> Int64:
    """All plays that hit, and as many of the first others as keep their share."""
    others = round(hit.sum() * (1 - share) / share)
    return np.flatnonzero(hit | (np.cumsum(~hit) <= others))


def _with_negatives(
    table: NumberTable,
    plays: Plays,
    reached: Int64,
    settings: WarmupSettings,
    random: np.random.Generator,
    share: Float64 | None,
) -> tuple[Int32, Float32]:
    """The word rows of plays and their negatives, and the value labels; exact ones with the `share` of all sets."""
    words = _words(table, plays, settings, random)
    values = np.zeros((len(words), 1 + settings.negatives, len(plays.after) + 1), dtype=np.float32)
    values[:, 0] = 1.0
    if settings.negatives == 0:
        return words, values[:, 0]
    shape = len(reached), settings.negatives
    other = random.integers(settings.target_low, settings.target_high, size=shape)
    other += other >= reached[:, None]  # uniform over the targets but the one reached
    if settings.focus is not None and settings.focus_share > 0:
        turn = settings.focus_share / (1 - settings.focus_share)
        turned = (random.random(shape) < turn) & (reached[:, None] != settings.focus)
        other[turned] = settings.focus
    if share is not None:
        low, high = settings.target_low, settings.target_high
        chance = [share[plays.rows], *(chances(table, states, low, high) for states in plays.after[:-1])]
        for k, found in enumerate(chance):
            values[:, 1:, k] = np.take_along_axis(found, other - low, axis=1) > 0
    targets = np.concatenate([reached[:, None], other], axis=1).ravel()
    words = np.repeat(words, 1 + settings.negatives, axis=0)
    words[:, plays.numbers.shape[1] + 1] = table.index(targets)
    return words, values.reshape(len(words), -1)


def _words(table: NumberTable, plays: Plays, settings: WarmupSettings, random: np.random.Generator) -> Int32:
    """The texts of plays with the number reached as target, int32 [B, L]."""
    symbol = {text: len(table.words) + k for k, text in enumerate(SYMBOLS)}
    signs = np.array([symbol[sign] for sign in OPERATION_SIGNS])
    size, count = plays.numbers.shape
    left, right = plays.left, plays.right
    if not settings.larger_first:
        swap = (random.random(left.shape) < 0.5) & np.isin(plays.operation, (0, 1))
        left, right = np.where(swap, right, left), np.where(swap, left, right)

    def constant(text: str) -> Int64:
        return np.full((size, 1), symbol[text])

    parts = [plays.numbers, constant("->"), plays.reached[:, None], constant(":")]
    for k, after in enumerate(plays.after):
        parts += [left[k][:, None], signs[plays.operation[k]][:, None], right[k][:, None], constant("=")]
        parts += [after[:, -1:]]
        if k < count - 2:
            parts += [constant("|"), after, constant(";")]
    return np.concatenate(parts, axis=1).astype(np.int32)
