"""Plays work units: problems -> searches -> one pending shard each. A Ray actor is a thin shell around it."""

from __future__ import annotations

import gc
import hashlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcts.search import Driver, Search
from mcts.strategies import build as build_strategy
from mcts.tasks import load_task
from mcts.types import Problem, SearchResult
from selfplay.config import Config, Part, SearchConfig
from selfplay.shards import shard_name, write_pending
from selfplay.store import Place, guard, on_this_node
from selfplay.summary import PlaySummary, summarise_shards
from selfplay.traces import TraceContext, to_row

if TYPE_CHECKING:
    from mcts.engines.server import ServerEngine
    from mcts.engines.torch_engine import TorchEngine
    from mcts.tasks.base import Task


@dataclass(frozen=True, slots=True)
class Unit:
    """A chunk of an iteration's problems: the unit of leasing, of commit and of repetition."""

    iteration: int
    part: int
    problems: tuple[Problem, ...]
    policy_version: int

    @property
    def name(self) -> str:
        return f"iteration={self.iteration:05d}-{shard_name(self.part)}"


@dataclass(frozen=True, slots=True)
class Played:
    """A finished unit: its pending shard waits for the driver's commit."""

    unit: Unit
    pending: str
    """Name of the shard within the run, for `Store.commit`."""
    seconds: float
    """From the first search's admission to the written file; units overlap."""
    summary: PlaySummary | None = None
    """Of its rows, so that the driver need not read them for it; None: it has to."""


@dataclass(frozen=True, slots=True)
class EvaluationJob:
    """Search `problems` without learning; nothing is written."""

    problems: tuple[Problem, ...]
    search: SearchConfig
    seed: int
    policy_version: int
    part: str = ""
    """Tells the jobs of one evaluation apart."""

    @property
    def name(self) -> str:
        return f"evaluation={self.policy_version:05d}-{self.part}"


@dataclass(frozen=True, slots=True)
class Answered:
    """What an evaluation keeps of one search."""

    problem_id: str
    won: bool
    """Verdict of the chosen answer."""
    status: str
    oracle: bool
    sampled: int
    chains: int
    """Finished chains (draws of terminal nodes)."""
    chain_wins: int
    """Those that a check or verifier called correct."""
    steps: int
    distinct_steps: int
    failed: str | None
    """Why the search gave no answer at all, None where it did its work."""
    seconds: float
    uncounted: int = 0
    """Tokens at most that a server drew and never told of (mcts.budget.Usage)."""
    given_up: bool = False
    """The problem ended every process that searched it alone: it counts as not solved."""


def stream_seed(*key: object) -> int:
    """An unsigned 64-bit seed that depends on every part of `key` and on nothing else."""
    text = "\x1f".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def free_memory(device: str) -> None:
    """Give back to the device what no longer has an owner."""
    gc.unfreeze()  # see `make_engine`
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


def make_engine(
    config: Config, policy_folder: Path, value_head: Path | None, version: int, task: Task
) -> TorchEngine | ServerEngine:
    """The engine that the config names, on the weights in a checkpoint."""
    if config.engine.kind == "server":
        from selfplay.served import make_server_engine

        return make_server_engine(config, policy_folder, value_head, version, task)
    from mcts.engines.model import load_policy
    from mcts.engines.torch_engine import TorchEngine

    dtype = config.engine.dtype or config.model.dtype
    policy = load_policy(policy_folder, head=value_head, device=config.model.device, dtype=dtype)
    engine = TorchEngine(
        policy,
        delimiter=task.delimiter,
        rows=config.engine.rows,
        kv_slots=config.engine.kv_slots,
        context=config.engine.max_context,
        threads=config.cluster.worker_threads,
        version=version,
        fuse=config.engine.compile,
    )
    # Searches make many objects and few cycles: the collector runs seldom, and not over half a million old objects.
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)
    return engine


def make_searches(
    problems: Sequence[Problem], settings: SearchConfig, seeds: Sequence[int], *, learning: bool
) -> Iterator[Search]:
    """One search per problem; they share one strategy, which keeps nothing of a search."""
    strategy = build_strategy(settings.strategy.name, **settings.strategy.settings)
    for problem, seed in zip(problems, seeds, strict=True):
        yield Search(
            problem=problem,
            strategy=strategy,
            budget=settings.budget,
            seed=seed,
            learning=learning,
            temperature=settings.temperature,
            top_p=settings.top_p,
            prior_rule=settings.prior_rule,
        )


class Worker:
    """Holds an engine and plays units or evaluations on it.

    `enqueue` hands over a unit, `finish` works until some unit is done. Searches of the next unit start while the
    last ones of a unit finish, so the batch stays full.
    """

    def __init__(self, config: Config, place: Place) -> None:
        self.config = config
        self.store = place.open()
        self.task = load_task(config.task.name, **config.task.settings)
        self._engine: TorchEngine | ServerEngine | None = None
        self._driver: Driver | None = None
        self._complete: deque[Unit] = deque()
        self._results: dict[str, dict[int, SearchResult]] = {}
        self._where: dict[int, tuple[Unit, int]] = {}  # search seed -> its unit and place there
        self._began: dict[str, float] = {}

    def load(self, checkpoint: Path, version: int) -> None:
        """Weights of a checkpoint folder (a relative path is one within the run); a no-op where they are loaded
        already."""
        if self._engine is not None and self._engine.version == version:
            return
        checkpoint = on_this_node(self.store, checkpoint)
        if self._engine is None:
            self._engine = make_engine(
                self.config, checkpoint / "policy", checkpoint / "value_head.safetensors", version, self.task
            )
        else:
            self._engine.load(str(checkpoint), version)

    def rest(self) -> None:
        """Free the device's memory until the next `load`. No unit may be under way."""
        if self._results:
            raise RuntimeError("a unit is under way")
        self._engine = self._driver = None
        free_memory(self.config.model.device)

    @property
    def engine(self) -> TorchEngine | ServerEngine:
        if self._engine is None:
            raise RuntimeError("load a checkpoint before playing")
        return self._engine

    def enqueue(self, unit: Unit) -> None:
        if unit.policy_version != self.engine.version:
            raise RuntimeError(f"unit wants policy {unit.policy_version}, loaded is {self.engine.version}")
        driver = self._drive()
        self._results[unit.name] = {}
        self._began[unit.name] = time.perf_counter()
        for position, search in enumerate(self._searches(unit)):
            self._where[search.seed] = (unit, position)
            driver.submit(search)

    def _drive(self) -> Driver:
        if self._driver is None:
            self._driver = Driver(self.engine, self.task, max_open=self.config.play.open_searches)
        return self._driver

    def _searches(self, unit: Unit) -> Iterator[Search]:
        seeds = [stream_seed(self.config.seed, unit.iteration, problem.id, 0) for problem in unit.problems]
        return make_searches(unit.problems, self.config.play.search, seeds, learning=True)

    def record(self, work: Unit | EvaluationJob, reason: str) -> Played | list[Answered]:
        """The rows or answers that say that the problems could not be searched, without searching them."""
        driver = self._drive()
        if isinstance(work, EvaluationJob):
            failed = [driver.fail(search, reason) for search in evaluation_searches(work)]
            return [replace(summarise(result), given_up=True) for result in failed]
        self._began[work.name] = time.perf_counter()
        self._results[work.name] = {i: driver.fail(search, reason) for i, search in enumerate(self._searches(work))}
        return self._write(work)

    def finish(self) -> Played:
        """Work until one unit is finished; write its pending shard."""
        if self._driver is None or not self._results:
            raise RuntimeError("enqueue a unit before finishing one")
        while True:
            if self._complete:
                return self._write(self._complete.popleft())
            for result in self._driver.poll():
                unit, position = self._where.pop(result.seed)
                results = self._results[unit.name]
                results[position] = result
                if len(results) == len(unit.problems):
                    self._complete.append(unit)

    def _write(self, unit: Unit) -> Played:
        results = self._results.pop(unit.name)
        config = self.config
        context = TraceContext(
            config_hash=config.hash(),
            task=config.task.name,
            split="train",
            iteration=unit.iteration,
            joiner=self.task.joiner,
        )
        rows = [to_row(results[i], context) for i in range(len(results))]
        scratch = self.store.scratch(unit.name)  # another worker may play the same unit at the same time
        with guard(self.store):
            metadata = {"run_id": self.store.place.run_id, "config_hash": config.hash()}
            write_pending(scratch, rows, metadata, make_folder=False)
            summary = summarise_shards([scratch])
        pending = self.store.offer(scratch)
        return Played(unit, pending, time.perf_counter() - self._began.pop(unit.name), summary)

    def evaluate(self, job: EvaluationJob) -> list[Answered]:
        """One search per problem, in the order of the problems."""
        if job.policy_version != self.engine.version:
            raise RuntimeError(f"job wants policy {job.policy_version}, loaded is {self.engine.version}")
        return evaluate_problems(self.engine, self.task, job, max_open=self.config.play.open_searches)


def evaluation_searches(job: EvaluationJob) -> list[Search]:
    """One per problem; what each does depends on its problem alone, not on the others of the job."""
    seeds = [stream_seed(job.seed, "evaluate", problem.id) for problem in job.problems]
    return list(make_searches(job.problems, job.search, seeds, learning=False))


def evaluate_problems(engine: Any, task: Task, job: EvaluationJob, *, max_open: int) -> list[Answered]:
    searches = evaluation_searches(job)
    driver = Driver(engine, task, max_open=max_open)
    answered = {result.seed: summarise(result) for result in driver.run(searches)}
    return [answered[search.seed] for search in searches]


def summarise(result: SearchResult) -> Answered:
    tree = result.tree
    ends = [n for n in range(len(tree)) if tree.terminal[n]]
    chains = sum(tree.draws[n] for n in ends)
    wins = sum(tree.draws[n] for n in ends if (v := tree.verdict[n]) is not None and v.won)
    drawn = sum(tree.draws[1:])
    return Answered(
        problem_id=result.problem.id,
        won=result.verdict is not None and result.verdict.won,
        status=result.verdict.status.value if result.verdict is not None else "none",
        oracle=result.oracle,
        sampled=result.usage.sampled,
        chains=chains,
        chain_wins=wins,
        steps=drawn,
        distinct_steps=len(tree) - 1,
        failed=result.error,
        seconds=result.seconds,
        uncounted=result.usage.uncounted_tokens,
    )


def units_of(problems: Sequence[Problem], *, size: int, iteration: int, policy_version: int) -> Iterator[Unit]:
    """Cut an iteration's problems into units of `size`, the last one possibly shorter."""
    for part, start in enumerate(range(0, len(problems), size)):
        yield Unit(iteration, part, tuple(problems[start : start + size]), policy_version)


def chain_search(task: Task, n: int, temperature: float) -> SearchConfig:
    """`n` plain chains per problem with a budget that never binds."""
    tokens = n * (task.max_steps * task.max_step_tokens)
    part = Part.model_validate({"name": "best_of_n", "n": n})
    return SearchConfig(strategy=part, budget=tokens, temperature=temperature)
