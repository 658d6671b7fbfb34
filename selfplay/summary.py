"""What an iteration's play amounts to, read from its shards: the same numbers after a crash as before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from selfplay.columns import usage_total
from selfplay.shards import iter_batches


@dataclass(slots=True)
class PlaySummary:
    """Counts over the searches of one iteration."""

    problem_ids: list[str] = field(default_factory=list)
    solved: int = 0
    sampled: int = 0
    prompt: int = 0
    cached: int = 0
    discarded: int = 0
    uncounted_calls: int = 0
    uncounted_tokens: int = 0
    """At most (mcts.budget.Usage)."""
    errors: int = 0
    """Searches whose verifier timed out or failed."""
    failed: int = 0
    failure: str | None = None
    """What the first failed search said."""
    chain_wins: list[int] = field(default_factory=list)
    chains: list[int] = field(default_factory=list)
    steps: int = 0
    distinct_steps: int = 0
    behind: int = 0
    """Versions between what each search was played with and the newest that it could have been, summed."""

    def rates(
        self, index: Mapping[str, int]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(problem index, wins, chains), one entry per search."""
        return (
            np.array([index[p] for p in self.problem_ids], dtype=np.int64),
            np.array(self.chain_wins, dtype=np.float64),
            np.array(self.chains, dtype=np.float64),
        )

    def metrics(self) -> dict[str, Any]:
        searches = len(self.problem_ids)
        needed = self.prompt + self.cached
        return {
            "problems": searches,
            "solved": self.solved / searches if searches else None,
            "sampled_tokens": self.sampled,
            "uncounted_calls": self.uncounted_calls,
            "uncounted_tokens": self.uncounted_tokens,
            "tokens_per_win": self.sampled / self.solved if self.solved else None,
            "prefix_reuse": self.cached / needed if needed else None,
            "verifier_errors": self.errors,
            "failed": self.failed,
            "staleness": self.behind / searches if searches else None,
            "play_distinct_steps": self.distinct_steps / self.steps if self.steps else None,
        }


def merge(summaries: Iterable[PlaySummary]) -> PlaySummary:
    """One summary of all, their searches in order."""
    total = PlaySummary()
    for one in summaries:
        for f in fields(PlaySummary):
            ours, theirs = getattr(total, f.name), getattr(one, f.name)
            setattr(total, f.name, ours or theirs if f.name == "failure" else ours + theirs)
    return total


def summarise_shards(shards: Iterable[Path]) -> PlaySummary:
    """One pass over the small columns and the nodes' verdicts."""
    total = PlaySummary()
    for shard in shards:
        for batch in iter_batches(shard):
            total.problem_ids += batch["problem_id"].to_pylist()
            versions, iterations = (batch[name].to_numpy() for name in ("policy_version", "iteration"))
            total.behind += int((iterations - 1 - versions).sum())
            verdicts = batch["verdict"].to_pylist()
            total.solved += verdicts.count("correct")
            total.errors += sum(v in ("timeout", "error") for v in verdicts)
            failures = [why for why in batch["error"].to_pylist() if why is not None]
            total.failed += len(failures)
            total.failure = total.failure or next(iter(failures), None)
            for name in ("sampled", "prompt", "cached", "discarded", "uncounted_calls", "uncounted_tokens"):
                setattr(total, name, getattr(total, name) + usage_total(batch["usage"], name))
            nodes = batch["nodes"]
            flat = nodes.flatten()
            draws = flat.field("draws").to_numpy(zero_copy_only=False)
            terminal = flat.field("terminal").to_numpy(zero_copy_only=False)
            parent = flat.field("parent").to_numpy(zero_copy_only=False)
            won = np.asarray(flat.field("verdict").to_numpy(zero_copy_only=False) == "correct")
            row = np.repeat(np.arange(len(nodes)), np.asarray(nodes.value_lengths()))
            total.chain_wins += np.bincount(row, draws * won, len(nodes)).astype(int).tolist()
            total.chains += np.bincount(row, draws * terminal, len(nodes)).astype(int).tolist()
            total.steps += int(draws[parent >= 0].sum())
            total.distinct_steps += int((parent >= 0).sum())
    return total
