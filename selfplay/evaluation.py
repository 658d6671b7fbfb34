"""Measuring one checkpoint within a run: which searches that takes, and the scores that come of their answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mcts.types import Problem, SearchError
from selfplay.config import Config
from selfplay.fleet import Evaluated
from selfplay.stats import pass_at_k, wilson
from selfplay.worker import Answered, EvaluationJob, chain_search

if TYPE_CHECKING:
    from mcts.tasks.base import Task


class Evaluation:
    """Greedy searches on dev and held-out, and `evaluate.samples` chains per held-out problem, in jobs of at most
    `play.unit` problems. `waiting` holds the names of jobs without an answer."""

    def __init__(self, task: Task, config: Config, iteration: int, began: float) -> None:
        self.began = began
        self.samples = config.evaluate.samples
        self.problems = {split: task.problems(split) for split in ("heldout", "dev")}
        greedy = chain_search(task, 1, 0.0)
        parts = [("heldout", "heldout", greedy), ("dev", "dev", greedy)]
        if self.samples:
            parts.append(("samples", "heldout", chain_search(task, self.samples, 1.0)))
        self._jobs: dict[str, list[EvaluationJob]] = {
            name: [
                EvaluationJob(tuple(chunk), search, config.seed, iteration, f"{name}-{part}")
                for part, chunk in enumerate(chunks_of(self.problems[split], config.play.unit))
            ]
            for name, split, search in parts
        }
        self._answers: dict[str, list[Answered]] = {}
        self.waiting = {job.part for job in self.jobs}

    @property
    def jobs(self) -> list[EvaluationJob]:
        return [job for jobs in self._jobs.values() for job in jobs]

    def take(self, done: Evaluated) -> None:
        """Raises SearchError where searches could not be done: they are no wrong answers. A problem that was given up
        counts as one."""
        failures = [answer.failed for answer in done.answers if answer.failed is not None and not answer.given_up]
        if failures:
            raise SearchError(f"{len(failures)} searches of the evaluation could not be done: {failures[0]}")
        self.waiting.remove(done.job.part)
        self._answers[done.job.part] = done.answers

    def scores(self) -> dict[str, Any]:
        """The columns of metrics.jsonl; none where nothing was evaluated. Raises SearchError where every held-out
        problem was given up."""
        if not self._answers:
            return {}
        scores = {name: [a for job in jobs for a in self._answers[job.part]] for name, jobs in self._jobs.items()}
        heldout, dev, samples = scores["heldout"], scores["dev"], scores.get("samples", [])
        if all(answer.given_up for answer in heldout):
            raise SearchError(f"every held-out problem had to be given up, the first one because {heldout[0].failed}")
        won = sum(a.won for a in heldout)
        low, high = wilson(won, len(heldout))
        row = {
            "heldout_pass1": won / len(heldout),
            "heldout_low": low,
            "heldout_high": high,
            "heldout_problems": len(heldout),
            "dev_pass1": sum(a.won for a in dev) / len(dev) if dev else None,
            "dev_problems": len(dev),
            "heldout_failed": len({a.problem_id for a in [*heldout, *samples] if a.given_up}),
            "dev_failed": sum(a.given_up for a in dev),
        }
        if k := self.samples:
            row[f"heldout_pass{k}"] = float(np.mean([pass_at_k(max(k, a.chains), a.chain_wins, k) for a in samples]))
            row["heldout_sampled_pass1"] = float(np.mean([a.chain_wins / max(1, a.chains) for a in samples]))
            row["distinct_steps"] = sum(a.distinct_steps for a in samples) / max(1, sum(a.steps for a in samples))
        return row


def chunks_of(problems: Sequence[Problem], size: int) -> list[Sequence[Problem]]:
    """Cut into chunks of nearly equal size, at most `size`, none empty."""
    parts = math.ceil(len(problems) / size)
    return [problems[len(problems) * i // parts : len(problems) * (i + 1) // parts] for i in range(parts)]
