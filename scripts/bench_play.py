"""What a search costs beside the model, what it forwards, and traces per second from search to committed shard."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from bench_rows import Row
from bench_subject import Subject
from bench_timers import MODEL, Place, Stopwatch, all_places, model_places

from mcts.engines.counters import Counters
from mcts.engines.torch_engine import TorchEngine
from mcts.search import Driver
from mcts.types import Problem, SearchResult
from selfplay.cluster.executor import RayExecutor
from selfplay.config import Config, Part, SearchConfig
from selfplay.executor import Learned
from selfplay.fleet import Evaluated
from selfplay.run_folder import RunFolder
from selfplay.shards import shard_path
from selfplay.worker import Unit, make_searches, stream_seed, units_of

Clock = Callable[[], float]


def mcts_search(config: Config) -> SearchConfig:
    """MCTS from the root until the first verified win, with the config's budget."""
    part = Part.model_validate({"name": "mcts", "commit": "never", "simulations": 0})
    return config.play.search.model_copy(update={"strategy": part})


def episodes(config: Config) -> SearchConfig:
    """MCTS move by move, not stopped by a win."""
    part = Part.model_validate({"name": "mcts", "commit": "visits"})
    return config.play.search.model_copy(update={"strategy": part})


def sampler(config: Config) -> SearchConfig:
    """One chain after the other until the first verified win."""
    part = Part.model_validate({"name": "best_of_n", "n": 0, "until_win": True})
    return config.play.search.model_copy(update={"strategy": part})


def run_searches(
    subject: Subject, engine: TorchEngine, search: SearchConfig, problems: Sequence[Problem]
) -> list[SearchResult]:
    """One search per problem, as a worker runs them."""
    driver = Driver(engine, subject.task, max_open=subject.config.play.open_searches)
    seeds = [stream_seed(subject.config.seed, "bench", problem.id) for problem in problems]
    return list(driver.run(make_searches(problems, search, seeds, learning=True)))


@dataclass(frozen=True, slots=True)
class Played:
    results: list[SearchResult]
    seconds: float
    parts: dict[str, float]
    counters: Counters
    wall: float
    """Seconds by the wall clock, whatever `seconds` were measured with."""

    @property
    def drawn(self) -> int:
        return sum(result.usage.sampled for result in self.results)

    @property
    def prompts(self) -> int:
        return sum(len(result.tree.prompt_ids) for result in self.results)


def timed(
    subject: Subject,
    engine: TorchEngine,
    search: SearchConfig,
    problems: Sequence[Problem],
    clock: Clock,
    places: Sequence[Place],
) -> Played:
    """Run the searches with a stopwatch on `places`; the engine's counters are those of this run."""
    before = replace(engine.counters)
    watch = Stopwatch(clock)
    with watch.watching(places):
        began, began_wall = clock(), time.perf_counter()
        results = run_searches(subject, engine, search, problems)
        seconds, wall = clock() - began, time.perf_counter() - began_wall
    gained = {f.name: getattr(engine.counters, f.name) - getattr(before, f.name) for f in fields(before)}
    return Played(results, seconds, dict(watch.seconds), Counters(**gained), wall)


def measure(subject: Subject, clock: Clock, *, problems: int) -> tuple[list[Row], float]:
    """Time outside the model and tokens forwarded, for MCTS and the until-win sampler; MCTS searches per second of
    wall time."""
    engine = subject.engine(clock)
    chosen = subject.problems(problems)
    rows: list[Row] = []
    rate = 0.0
    kinds = {"MCTS": mcts_search(subject.config), "until-win sampler": sampler(subject.config)}
    for name, search in kinds.items():
        run_searches(subject, engine, search, chosen[: max(16, problems // 8)])
        plain = timed(subject, engine, search, chosen, clock, model_places(engine))
        counters = plain.counters
        parted = timed(subject, engine, search, chosen, clock, all_places(engine, subject.task))
        outside = plain.seconds - plain.parts[MODEL]
        parts = {part: spent / parted.seconds for part, spent in parted.parts.items() if part != MODEL}
        parts = dict(sorted(parts.items(), key=lambda pair: -pair[1]))
        details: dict[str, Any] = {
            "tokens_per_second": plain.drawn / plain.seconds,
            "seconds": plain.seconds,
            "outside_by_engine_counter": 1.0 - counters.forward_seconds / plain.seconds,
            "outside_poll": 1.0 - counters.poll_seconds / plain.seconds,
            "shares_outside_model": parts,
            "largest": next(iter(parts)),
            "rows_per_forward": counters.forwarded / counters.forwards,
            "padding": counters.padded / (counters.padded + counters.forwarded),
            "searches": len(plain.results),
            "solved": sum(result.ended == "solved" for result in plain.results),
        }
        rows.append(
            Row(f"time outside model, {name}", outside, plain.seconds, "s", "whole", at_most=0.1, details=details)
        )
        rows.append(
            Row(
                f"tokens forwarded, {name}",
                counters.forwarded,
                plain.prompts + plain.drawn,
                "tokens",
                "prompts + drawn",
                at_most=1.05,
                details={"prompts": plain.prompts, "drawn": plain.drawn, "copied": counters.copied},
            )
        )
        if name == "MCTS":
            rate = len(plain.results) / plain.wall
    return rows, rate


def measure_wider(subject: Subject, clock: Clock, *, problems: int) -> Row:
    """Time outside a wider model, during MCTS: what is outside hardly depends on the model, what is inside does."""
    engine = subject.engine(clock)
    chosen = subject.problems(problems)
    search = mcts_search(subject.config)
    run_searches(subject, engine, search, chosen[: max(16, problems // 8)])
    played = timed(subject, engine, search, chosen, clock, model_places(engine))
    parameters = subject.parameters
    return Row(
        f"time outside model, MCTS, {parameters / 1e6:.1f}M parameters",
        played.seconds - played.parts[MODEL],
        played.seconds,
        "s",
        "whole",
        at_most=0.1,
        details={"parameters": parameters, "tokens_per_second": played.drawn / played.seconds},
    )


def traces_per_second(subject: Subject, folder: Path, workers: int, units: int, unit: int) -> float:
    """Traces per second of wall time through Ray, from the first enqueued search to the last committed shard."""
    cluster = subject.config.cluster.model_copy(update={"executor": "ray", "workers": workers})
    play = subject.config.play.model_copy(update={"search": mcts_search(subject.config), "unit": unit})
    config = subject.config.model_copy(update={"cluster": cluster, "play": play})
    run = RunFolder.create(folder, config)
    try:
        executor = RayExecutor(config, run.place)
        try:
            executor.publish(subject.checkpoint, 0, play=True)
            play_all(
                run, executor, list(units_of(subject.problems(16 * workers), size=16, iteration=1, policy_version=0))
            )
            chosen = subject.problems(units * unit)
            began = time.perf_counter()
            play_all(run, executor, list(units_of(chosen, size=unit, iteration=2, policy_version=0)))
            return len(chosen) / (time.perf_counter() - began)
        finally:
            executor.close()
    finally:
        run.close()


def play_all(run: RunFolder, executor: RayExecutor, units: list[Unit]) -> None:
    """Play and commit `units`."""
    for unit in units:
        executor.submit(unit)
    committed = 0
    while committed < len(units):
        for done in executor.poll(1.0):
            assert not isinstance(done, Evaluated | Learned)
            run.store.commit(done.pending, shard_path(Path(), done.unit.iteration, done.unit.part).as_posix())
            committed += 1


def measure_workers(subject: Subject, folder: Path, in_process: float, *, units: int, unit: int) -> list[Row]:
    """One worker against bare searches in this process, and two workers against one."""
    one = traces_per_second(subject, folder / "one-worker", 1, units, unit)
    two = traces_per_second(subject, folder / "two-workers", 2, units, unit)
    facts = {"traces": units * unit, "unit": unit}
    return [
        Row("traces committed, 1 worker", one, in_process, "traces/s", "searches in process", details=facts),
        Row("traces committed, 2 workers", two, one, "traces/s", "1 worker", details=facts),
    ]
