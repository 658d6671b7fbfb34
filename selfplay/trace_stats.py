"""What the shards of an iteration say in figures: wins, tokens, tree shape, how far the value can be trusted.

Computed batch by batch from Arrow columns; what is kept per iteration are counts, problem ids and four numbers
per valued node.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mcts.types import Status
from selfplay.columns import usage_total
from selfplay.stats import auc

COLUMNS: Final = (
    "iteration",
    "problem_id",
    "policy_version",
    "verdict",
    "ended",
    "usage",
    *(f"nodes.{name}" for name in ("parent", "depth", "draws", "raw_value", "reward", "verdict", "terminal")),
)
"""What `TraceStats.add` reads of a batch."""

JUDGED: Final = (Status.CORRECT.value, Status.WRONG.value, Status.UNPARSABLE.value)
"""Verdicts that say something of the answer; a timeout or an error says nothing."""
BINS: Final = 10
"""Equal bins of [0, 1] for the expected calibration error."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Nodes:
    """The nodes of all trees of a batch, one after the other; N in all."""

    tree: npt.NDArray[np.int64]  # [N] row of the batch
    parent: npt.NDArray[np.int64]  # [N] position in these columns, -1 at a root
    depth: npt.NDArray[np.int64]  # [N]
    draws: npt.NDArray[np.int64]  # [N]
    raw_value: Floats  # [N] NaN where never computed
    reward: Floats  # [N]
    judged: npt.NDArray[np.bool_]  # [N] terminal with a verdict in JUDGED and a reward
    won: npt.NDArray[np.bool_]  # [N] terminal that was verified correct
    terminal: npt.NDArray[np.bool_]  # [N]


def nodes_of_batch(batch: pa.RecordBatch) -> Nodes:
    lists = batch.column("nodes")
    lengths = np.asarray(lists.value_lengths().to_numpy(zero_copy_only=False), dtype=np.int64)
    nodes = lists.flatten()
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)

    def column(name: str, dtype: type[np.generic]) -> Any:
        return np.asarray(nodes.field(name).to_numpy(zero_copy_only=False), dtype=dtype)

    parent = column("parent", np.int64)
    verdict = nodes.field("verdict").to_numpy(zero_copy_only=False)
    terminal = column("terminal", np.bool_)
    reward = column("reward", np.float64)
    return Nodes(
        tree=np.repeat(np.arange(len(lengths)), lengths),
        parent=np.where(parent < 0, -1, parent + starts),
        depth=column("depth", np.int64),
        draws=column("draws", np.int64),
        raw_value=column("raw_value", np.float64),
        reward=reward,
        judged=terminal & np.isin(verdict.astype("U"), JUDGED) & ~np.isnan(reward),
        won=terminal & (verdict == Status.CORRECT.value),
        terminal=terminal,
    )


def outcomes(nodes: Nodes) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Per node the mean reward of the judged terminals at or below it, each weighted by its draws (NaN without
    any), and whether one of them won."""
    weight = np.where(nodes.judged, np.maximum(nodes.draws, 1), 0).astype(np.float64)
    gain = np.where(nodes.judged, nodes.reward, 0.0) * weight
    wins = nodes.won.astype(np.int64)
    for depth in range(int(nodes.depth.max(initial=0)), 0, -1):
        at = np.flatnonzero(nodes.depth == depth)
        for column in (weight, gain, wins):
            np.add.at(column, nodes.parent[at], column[at])
    mean = np.divide(gain, weight, out=np.full(len(gain), math.nan), where=weight > 0)
    return mean, wins > 0


@dataclass(slots=True)
class IterationStats:
    """One iteration's counts."""

    iteration: int
    policy_versions: set[int] = field(default_factory=set)
    problems: set[str] = field(default_factory=set)
    solved: set[str] = field(default_factory=set)
    verdicts: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    searches: int = 0
    sampled: int = 0
    discarded: int = 0
    uncounted_calls: int = 0
    uncounted_tokens: int = 0
    """At most (mcts.budget.Usage)."""
    nodes: int = 0
    steps: int = 0
    """Nodes but the roots."""
    inner: int = 0
    """Nodes with children."""
    draws: int = 0
    depth: int = 0
    """Sum over trees of the deepest node's depth."""
    values: list[tuple[Floats, Floats, Floats, Floats]] = field(default_factory=list)
    """(depth, raw value, mean reward, won) of nodes that are valued, inner and have a judged terminal below."""

    def row(self) -> dict[str, Any]:
        """The figures, JSON-able; None where there is nothing to compute one from."""
        wins = self.verdicts.get(Status.CORRECT.value, 0)
        return {
            "iteration": self.iteration,
            "policy_versions": sorted(self.policy_versions),
            "searches": self.searches,
            "problems": len(self.problems),
            "solved": len(self.solved),
            "wins": wins,
            "sampled_tokens": self.sampled,
            "discarded_tokens": self.discarded,
            "uncounted_calls": self.uncounted_calls,
            "uncounted_tokens": self.uncounted_tokens,
            "tokens_per_win": self.sampled / wins if wins else None,
            "nodes": _ratio(self.nodes, self.searches),
            "depth": _ratio(self.depth, self.searches),
            "branching": _ratio(self.steps, self.inner),
            "repeat_draws": _ratio(self.draws - self.steps, self.draws),
            "verdicts": dict(sorted(self.verdicts.items())),
            "ended": dict(sorted(self.ended.items())),
            "value": value_figures(self.values),
        }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def value_figures(values: list[tuple[Floats, Floats, Floats, Floats]]) -> dict[str, Any]:
    """How well the raw value foretells what lies below a node.

    `brier` is the mean squared difference to the mean reward of the judged terminals below (by draws), `ece` the
    expected calibration error over `BINS` equal bins, `auc` the chance that a node with a win below is valued
    above one without, over all depths and per depth. Search chooses what lies below, so read these figures as a
    comparison between iterations rather than as the policy's own.
    """
    if not values:
        return {"nodes": 0, "brier": None, "ece": None, "auc": None, "auc_by_depth": {}}
    depth, raw, reward, won = (np.concatenate(column) for column in zip(*values, strict=True))
    which = np.minimum((raw * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(which, weights=raw - reward, minlength=BINS)
    per_depth = {int(d): _auc(raw[depth == d], won[depth == d]) for d in np.unique(depth)}
    return {
        "nodes": len(raw),
        "brier": float(np.mean((raw - reward) ** 2)),
        "ece": float(np.abs(gaps).sum() / len(raw)),
        "auc": _auc(raw, won),
        "auc_by_depth": per_depth,
    }


def _auc(raw: Floats, won: Floats) -> float | None:
    """`stats.auc`; None where all nodes won or none did."""
    figure = auc(raw.tolist(), (won > 0).tolist())
    return None if math.isnan(figure) else figure


class TraceStats:
    """Figures per iteration, fed batch by batch."""

    def __init__(self) -> None:
        self.iterations: dict[int, IterationStats] = {}

    def rows(self) -> list[dict[str, Any]]:
        """One row per iteration, in order (see `IterationStats.row`)."""
        return [self.iterations[i].row() for i in sorted(self.iterations)]

    def add(self, batch: pa.RecordBatch) -> None:
        """Count the traces of a batch that has at least `COLUMNS`."""
        iteration = batch.column("iteration").to_numpy(zero_copy_only=False)
        nodes = nodes_of_batch(batch)
        reward, won = outcomes(nodes)
        parents = np.unique(nodes.parent[nodes.parent >= 0])
        inner = np.zeros(len(nodes.parent), dtype=np.bool_)
        inner[parents] = True
        valued = inner & ~np.isnan(nodes.raw_value) & ~np.isnan(reward)
        for number in np.unique(iteration):
            stats = self.iterations.setdefault(int(number), IterationStats(int(number)))
            rows = np.flatnonzero(iteration == number)
            self._add_rows(stats, batch.take(pa.array(rows)))
            here = np.isin(nodes.tree, rows)
            steps = here & (nodes.depth > 0)
            stats.nodes += int(here.sum())
            stats.steps += int(steps.sum())
            stats.inner += int((inner & here).sum())
            stats.draws += int(nodes.draws[steps].sum())
            deepest = np.zeros(batch.num_rows, dtype=np.int64)
            np.maximum.at(deepest, nodes.tree[here], nodes.depth[here])
            stats.depth += int(deepest.sum())
            at = valued & here
            if at.any():
                stats.values.append(
                    (
                        nodes.depth[at].astype(np.float64),
                        nodes.raw_value[at],
                        reward[at],
                        won[at].astype(np.float64),
                    )
                )

    @staticmethod
    def _add_rows(stats: IterationStats, batch: pa.RecordBatch) -> None:
        problems = batch.column("problem_id").to_pylist()
        verdicts = batch.column("verdict").to_pylist()
        usage = batch.column("usage")
        stats.searches += batch.num_rows
        stats.policy_versions.update(batch.column("policy_version").to_pylist())
        stats.problems.update(problems)
        stats.solved.update(p for p, verdict in zip(problems, verdicts, strict=True) if verdict == Status.CORRECT.value)
        stats.verdicts.update("none" if verdict is None else verdict for verdict in verdicts)
        stats.ended.update(batch.column("ended").to_pylist())
        for name in ("sampled", "discarded", "uncounted_calls", "uncounted_tokens"):
            setattr(stats, name, getattr(stats, name) + usage_total(usage, name))
