"""One run: warm up, then play, learn, checkpoint, evaluate, and round again; resumable at every point.

What a phase does is a function of the config, the last checkpoint and the committed shards, so a killed run goes on
by doing the interrupted phase again: committed units are kept, everything else of that phase is repeated.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mcts.tasks import load_task
from mcts.types import Problem, SearchError
from selfplay import checkpoint as checkpoints
from selfplay.config import Config
from selfplay.errors import NonFiniteLoss
from selfplay.executor import Executor
from selfplay.problems import SolveRates, draw_problems
from selfplay.run_folder import RunFolder
from selfplay.shards import ReplayWindow, commit, list_shards, shard_path
from selfplay.stats import pass_at_k, wilson
from selfplay.summary import PlaySummary, summarise_shards
from selfplay.worker import Answered, EvaluationJob, chain_search, stream_seed, units_of

log = logging.getLogger(__name__)

COLLAPSE = 0.5
"""A dev score below this share of the best one so far, with intervals apart, is a collapse."""


@dataclass(frozen=True, slots=True)
class Event:
    """What the loop tells whoever watches: a phase's progress, or the metrics of a finished iteration."""

    phase: str
    iteration: int
    done: int = 0
    total: int = 0
    facts: dict[str, Any] | None = None


Watcher = Callable[[Event], None]


class Loop:
    """Drives one run to its last iteration. `run` is open, `executor` ready; both are closed by the caller."""

    def __init__(self, run: RunFolder, executor: Executor, watch: Watcher) -> None:
        self.run = run
        self.config: Config = run.config
        self.executor = executor
        self.watch = watch
        task = load_task(self.config.task.name, **self.config.task.settings)
        self.task = task
        self.problems: Sequence[Problem] = task.problems("train")
        self.index = {p.id: i for i, p in enumerate(self.problems)}
        before = run.metrics()
        self.began = time.perf_counter() - (before[-1]["wall_seconds"] if before else 0.0)
        self.learner_at: int | None = None
        """Checkpoint whose weights and optimiser state the learner holds."""

    def go(self) -> list[dict[str, Any]]:
        """Run what is missing; the rows of metrics.jsonl."""
        last = checkpoints.latest(self.run.checkpoints)
        if last is None:
            self._warm_up()
            last = 0
        else:
            checkpoints.verify(checkpoints.path_of(self.run.checkpoints, last))
        if not any(row["iteration"] == last for row in self.run.metrics()):
            self._evaluate(last)
        for iteration in range(last + 1, self.config.iterations + 1):
            self._iterate(iteration)
        return self.run.metrics()

    def _phase(self, phase: str, iteration: int) -> Callable[[int, int, dict[str, Any]], None]:
        """A progress callback for one phase; also the heartbeat."""

        def progress(done: int, total: int, facts: dict[str, Any]) -> None:
            self.run.heartbeat(phase=phase, iteration=iteration, done=done, total=total)
            self.watch(Event(phase, iteration, done, total, facts))

        progress(0, 0, {})
        return progress

    def _warm_up(self) -> None:
        began = time.perf_counter()
        metrics = self.executor.warm_up(self._phase("warm-up", 0))
        state = {
            "iteration": 0,
            "policy_version": 0,
            "rates": SolveRates.empty(len(self.problems)).to_state(),
            "metrics": metrics,
            "seconds": {"learn_seconds": time.perf_counter() - began},
        }
        self.executor.save(0, state)
        self.learner_at = 0

    def _iterate(self, iteration: int) -> None:
        base = self._base(iteration)
        base_path = checkpoints.path_of(self.run.checkpoints, base)
        previous = checkpoints.read_state(checkpoints.path_of(self.run.checkpoints, iteration - 1))
        rates = SolveRates.from_state(previous["rates"])
        # the newest weights play and are learned on; after a rollback they are those of the last good checkpoint
        began = time.perf_counter()
        summary = self._play(iteration, base, base_path, rates)
        played = time.perf_counter()
        rates.update(*summary.rates(self.index))
        metrics = self._learn(iteration, base, base_path)
        diverged = metrics is None
        if diverged:
            log.warning("iteration %d: the loss was not finite; the weights of checkpoint %d are kept", iteration, base)
            self.executor.restore(base_path)
        state = {
            "iteration": iteration,
            "policy_version": iteration,
            "base": base,
            "rates": rates.to_state(),
            "metrics": {
                **summary.metrics(),
                "staleness": 0.0,
                **(metrics or {}),
                "rolled_back": diverged or base != iteration - 1,
            },
            "seconds": {
                "play_seconds": played - began,
                "learn_seconds": time.perf_counter() - played,
                "tokens_per_second": summary.sampled / (played - began),
            },
        }
        self.executor.save(iteration, state)
        self.learner_at = iteration
        self._evaluate(iteration)

    def _base(self, iteration: int) -> int:
        """The checkpoint that `iteration` starts from: the one before it, or the best on dev if that one collapsed."""
        rows = [row for row in self.run.metrics() if row["iteration"] < iteration]
        return last_good(rows, default=iteration - 1)

    def _play(self, iteration: int, base: int, base_path: Path, rates: SolveRates) -> PlaySummary:
        config = self.config.play
        self.executor.load(base_path, base)
        if config.weighting == "uniform":
            weights = np.ones(len(self.problems))
        else:
            weights = rates.weights(config.weight_floor)
        picks = draw_problems(weights, config.problems, seed=self.config.seed, iteration=iteration)
        problems = [
            self.task.vary(p, stream_seed(self.config.seed, iteration, p.id))
            for p in map(self.problems.__getitem__, picks)
        ]
        units = list(units_of(problems, size=config.unit, iteration=iteration, policy_version=base))
        missing = [u for u in units if not shard_path(self.run.path, iteration, u.part).exists()]
        progress = self._phase("play", iteration)
        done = len(units) - len(missing)
        progress(done, len(units), {})
        for played in self.executor.play(missing):
            commit(played.pending, shard_path(self.run.path, iteration, played.unit.part))
            done += 1
            progress(done, len(units), {})
        summary = summarise_shards(list_shards(self.run.path, first=iteration, last=iteration))
        if summary.failed == len(problems):
            raise SearchError(f"every search of iteration {iteration} failed: {summary.failure}")
        if summary.failed:
            log.warning("iteration %d: %d searches failed: %s", iteration, summary.failed, summary.failure)
        return summary

    def _learn(self, iteration: int, base: int, base_path: Path) -> dict[str, Any] | None:
        """The metrics of a learning phase; None where its loss was not finite."""
        if self.learner_at != base:
            self.executor.restore(base_path)
        shards = ReplayWindow(self.run.path, self.config.learn.window).shards(last=iteration)
        try:
            return self.executor.learn(iteration, shards, self._phase("learn", iteration))
        except NonFiniteLoss:
            return None

    def _evaluate(self, iteration: int) -> None:
        """Greedy pass@1 on dev and held-out, pass@k beside it; then the iteration's row of metrics.jsonl."""
        config = self.config
        path = checkpoints.path_of(self.run.checkpoints, iteration)
        state = checkpoints.read_state(path)
        began = time.perf_counter()
        row: dict[str, Any] = {"iteration": iteration, "policy_version": iteration, **state["metrics"]}
        if iteration % config.evaluate.every == 0 or iteration == config.iterations:
            self._phase("evaluate", iteration)
            self.executor.load(path, iteration)
            row |= self._scores(iteration)
        row |= state["seconds"]
        row["evaluate_seconds"] = time.perf_counter() - began
        row["wall_seconds"] = time.perf_counter() - self.began
        self.run.append_metrics(row)
        self.watch(Event("iteration", iteration, facts=row))
        self._retain(iteration)

    def _scores(self, iteration: int) -> dict[str, Any]:
        heldout, dev = self.task.problems("heldout"), self.task.problems("dev")
        greedy = chain_search(self.task, 1, 0.0)
        jobs: dict[str, list[EvaluationJob]] = {}
        for name, problems, search in (
            ("heldout", heldout, greedy),
            ("dev", dev, greedy),
            *((("samples", heldout, chain_search(self.task, k, 1.0)),) if (k := self.config.evaluate.samples) else ()),
        ):
            jobs[name] = [
                EvaluationJob(tuple(chunk), search, self.config.seed, iteration)
                for chunk in chunks_of(problems, self.config.play.unit)
            ]
        answers = self.executor.evaluate([job for chunks in jobs.values() for job in chunks])
        scores: dict[str, list[Answered]] = {}
        for name, chunks in jobs.items():
            scores[name] = [a for _ in chunks for a in answers.pop(0)]
        failures = [a.failed for answers in scores.values() for a in answers if a.failed is not None]
        if failures:
            raise SearchError(f"{len(failures)} searches of the evaluation could not be done: {failures[0]}")
        won = sum(a.won for a in scores["heldout"])
        low, high = wilson(won, len(heldout))
        row = {
            "heldout_pass1": won / len(heldout),
            "heldout_low": low,
            "heldout_high": high,
            "heldout_problems": len(heldout),
            "dev_pass1": sum(a.won for a in scores["dev"]) / len(dev) if dev else None,
            "dev_problems": len(dev),
        }
        if k := self.config.evaluate.samples:
            samples = scores["samples"]
            row[f"heldout_pass{k}"] = float(np.mean([pass_at_k(max(k, a.chains), a.chain_wins, k) for a in samples]))
            row["heldout_sampled_pass1"] = float(np.mean([a.chain_wins / max(1, a.chains) for a in samples]))
            row["distinct_steps"] = sum(a.distinct_steps for a in samples) / max(1, sum(a.steps for a in samples))
        return row

    def _retain(self, iteration: int) -> None:
        rows = self.run.metrics()
        needed = {0, iteration, last_good(rows, default=iteration)}
        scored = [row for row in rows if row.get("dev_pass1") is not None]
        if scored:
            needed.add(max(scored, key=lambda row: row["dev_pass1"])["iteration"])
        checkpoints.retain(self.run.checkpoints, keep=self.config.keep.checkpoints, needed=needed)


def last_good(rows: Sequence[dict[str, Any]], *, default: int) -> int:
    """The newest checkpoint, unless its dev score collapsed: then the best one on dev so far.

    A collapse is a score below COLLAPSE times the best with Wilson intervals that do not touch.
    """
    scored = [row for row in rows if row.get("dev_pass1") is not None]
    if not scored:
        return default
    best = max(scored, key=lambda row: row["dev_pass1"])
    newest = scored[-1]
    if any(row.get("rolled_back") for row in rows if row["iteration"] > newest["iteration"]):
        return default  # it was answered already, and what came after is not scored yet
    if newest["dev_pass1"] >= COLLAPSE * best["dev_pass1"]:
        return default
    _, high = wilson(round(newest["dev_pass1"] * newest["dev_problems"]), newest["dev_problems"])
    low, _ = wilson(round(best["dev_pass1"] * best["dev_problems"]), best["dev_problems"])
    return int(best["iteration"]) if high < low else default


def chunks_of(problems: Sequence[Problem], size: int) -> list[Sequence[Problem]]:
    """Cut into chunks of nearly equal size, at most `size`, none empty."""
    parts = math.ceil(len(problems) / size)
    return [problems[len(problems) * i // parts : len(problems) * (i + 1) // parts] for i in range(parts)]
