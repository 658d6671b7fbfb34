"""What a driver costs: CPU seconds per unit and per trace, and how many cores 1,000 workers take.

    python scripts/bench_driver.py [--workers 1000] [--actors 40] [--seconds 60] [--json FILE]

Two measurements. `simulated`: the real loop, supervisor and store over make-believe workers in make-believe time, each
of which takes `--seconds` a unit; shards are real ones. Events come one at a time, which costs most. `actors`: the same
loop over Ray, with as many real actors as memory allows, which answer as much sooner as they are fewer: the driver
sees the units, the signs of life and the evaluations of 1,000 workers. CPU seconds of the driver's process, Ray's
threads in it included, so that other load matters little; the machine's load is printed beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bench_subject
from bench_processes import cpu_seconds, ray_processes
from bench_rows import Row
from bench_simulated import RayLearners, SimulatedExecutor, SimulatedFleet, SimulatedLearners, SimulatedWorker
from bench_subject import Subject
from bench_timers import Place, Stopwatch

from selfplay.cluster.executor import RayExecutor
from selfplay.cluster.nodes import Nodes
from selfplay.cluster.workers import RayFleet
from selfplay.config import Config
from selfplay.executor import Executor
from selfplay.loop import Event, Loop
from selfplay.run_folder import RunFolder
from selfplay.store import Place as RunPlace
from selfplay.store_disk import DiskStore
from selfplay.supervisor import Supervisor
from selfplay.worker import Played, Worker, units_of

ROOT = Path(__file__).resolve().parent.parent
UNIT = 32
SIMULATION = "simulation"
"""Part of the CPU time that a real driver does not spend."""
SILENCE_SECONDS = 30.0
IDLE_SECONDS = 10.0
PLACES: list[Place] = [
    *[(SimulatedFleet, name, SIMULATION) for name in ("events", "start", "send")],
    (SimulatedLearners, "write", SIMULATION),
    *[(Supervisor, name, "handing out") for name in ("_staff", "_hand_out", "submit")],
    (Supervisor, "_take", "events"),
    (Supervisor, "_look_at_the_clock", "looking at the clock"),
    (Supervisor, "poll", "polling"),
    *[(RayFleet, name, "calls to actors") for name in ("send", "_ask_for_results", "_ask_for_life")],
    (RayFleet, "events", "answers of actors"),
    (DiskStore, "commit", "verifying and committing"),
    (Loop, "_report", "heartbeat facts"),
    (Loop, "_summary", "summary of an iteration"),
    (Loop, "_submit", "drawing and cutting units"),
    (Loop, "go", "the rest of the loop"),
]


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU seconds of one driver."""

    units: int
    traces: int
    cpu: float
    parts: dict[str, float]
    seconds: float
    """That the units took: of make-believe time, or by the wall clock."""
    workers: int
    others: float = 0.0
    """CPU seconds of Ray's processes beside the driver: raylet and GCS."""
    idle: float | None = None
    """Cores busy while no unit is played: with signs of life alone."""

    @property
    def per_unit(self) -> float:
        return self.cpu / self.units

    def cores(self, workers: int, seconds: float) -> float:
        """Busy with so many workers, each of which takes `seconds` a unit."""
        return self.per_unit * workers / seconds

    def to_json(self) -> dict[str, Any]:
        return {
            "units": self.units,
            "cpu_ms_per_unit": 1e3 * self.per_unit,
            "cpu_us_per_trace": 1e6 * self.cpu / self.traces,
            "ms_per_unit_by_part": {
                part: 1e3 * spent / self.units for part, spent in sorted(self.parts.items(), key=lambda p: -p[1])
            },
            "units_per_second": self.units / self.seconds,
            "workers": self.workers,
            "idle_cores": self.idle,
            "ray_processes_cpu_ms_per_unit": 1e3 * self.others / self.units,
        }


def played(subject: Subject, folder: Path) -> Played:
    """A unit of real rows, played by the subject; its shard lies in `folder`."""
    run = RunFolder.create(folder, subject.config)
    worker = Worker(subject.config, run.place)
    worker.load(subject.checkpoint, 0)
    (unit,) = units_of(subject.problems(UNIT), size=UNIT, iteration=1, policy_version=0)
    worker.enqueue(unit)
    found = worker.finish()
    kept = folder.with_suffix(".arrow")
    (run.path / found.pending).rename(kept)
    run.close()
    return replace(found, pending=str(kept))


def config_of(subject: Subject, *, units: int, iterations: int, silence: float, workers: int) -> Config:
    """Play runs ahead by one version, so that workers are always busy."""
    play = subject.config.play.model_copy(update={"unit": UNIT, "problems": units * UNIT, "max_staleness": 1})
    cluster = subject.config.cluster.model_copy(
        update={"executor": "ray", "workers": workers, "worker_cpus": 0.001, "silence_seconds": silence}
    )
    evaluate = subject.config.evaluate.model_copy(update={"samples": 0})
    update = {"play": play, "cluster": cluster, "evaluate": evaluate, "iterations": iterations}
    return subject.config.model_copy(update=update)


def enough_problems(loop: Loop, needed: int) -> None:
    """The task's own problems under several names, where there are too few of them."""
    own = list(loop.problems)
    copies = -(-needed // len(own))
    loop.problems = [replace(p, id=f"{p.id}#{k}") if k else p for k in range(copies) for p in own]
    loop.index = {p.id: i for i, p in enumerate(loop.problems)}


def drive(run: RunFolder, executor: Executor) -> Loop:
    loop = Loop(run, executor, _ignore)
    enough_problems(loop, run.config.play.problems)
    return loop


def _ignore(event: Event) -> None:
    del event


def simulated(subject: Subject, sample: Played, folder: Path, *, workers: int, seconds: float, rounds: int) -> Cost:
    """A whole run of two iterations, with so many units of each for each worker."""
    iterations, per_iteration = 2, workers * rounds
    config = config_of(subject, units=per_iteration, iterations=iterations, silence=SILENCE_SECONDS, workers=workers)
    run = RunFolder.create(folder, config)
    try:
        fleet = SimulatedFleet(workers, seconds, run.store, sample, SILENCE_SECONDS)
        loop = drive(run, SimulatedExecutor(fleet, run.store, config, subject.checkpoint))
        watch = Stopwatch(time.process_time)
        began = time.process_time()
        with watch.watching(PLACES):
            loop.go()
        spent = time.process_time() - began - watch.seconds.pop(SIMULATION)
    finally:
        run.close()
    units = iterations * per_iteration
    return Cost(units, units * UNIT, spent, dict(watch.seconds), fleet.now, workers)


class QuickFleet(RayFleet):
    """Asks its few workers for signs of life as often as many are asked."""

    faster: float

    def __init__(self, config: Config, place: RunPlace, nodes: Nodes) -> None:
        quick = {"silence_seconds": config.cluster.silence_seconds * self.faster}
        super().__init__(config.model_copy(update={"cluster": config.cluster.model_copy(update=quick)}), place, nodes)


def actors(
    subject: Subject, sample: Played, folder: Path, *, count: int, workers: int, seconds: float, rounds: int
) -> Cost:
    """The same over Ray: `count` actors answer like `workers`."""
    faster = count / workers
    units = count * max(1, rounds)
    iterations = 2
    config = config_of(subject, units=units, iterations=iterations, silence=SILENCE_SECONDS, workers=count)
    run = RunFolder.create(folder, config)
    worker = type("Worker", (SimulatedWorker,), {"seconds": seconds * faster, "sample": sample})
    fleet = type("Fleet", (QuickFleet,), {"actor": worker, "faster": faster})
    try:
        executor = RayExecutor(
            config, run.place, fleet=fleet, learners=lambda *_: RayLearners(run.store, subject.checkpoint)
        )
        try:
            loop = drive(run, executor)
            while executor.facts()["workers"]["alive"] < count:
                executor.poll(0.5)
            idle = _idle_cores(executor)
            ray_ids = ray_processes()
            watch = Stopwatch(time.thread_time)
            others, began, began_wall = cpu_seconds(ray_ids), time.process_time(), time.perf_counter()
            began_thread = time.thread_time()
            with watch.watching(PLACES):
                loop.go()
            simulation = watch.seconds.pop(SIMULATION)
            spent = time.process_time() - began
            watch.seconds["Ray's threads"] = spent - (time.thread_time() - began_thread)
            wall = time.perf_counter() - began_wall
            others = cpu_seconds(ray_ids) - others
        finally:
            executor.close()
    finally:
        run.close()
    total = iterations * units
    return Cost(total, total * UNIT, spent - simulation, dict(watch.seconds), wall, count, others, idle)


def _idle_cores(executor: RayExecutor) -> float:
    began, began_wall = time.process_time(), time.perf_counter()
    while time.perf_counter() - began_wall < IDLE_SECONDS:
        executor.poll(0.5)
    return (time.process_time() - began) / (time.perf_counter() - began_wall)


def measure(
    subject: Subject, folder: Path, *, workers: int = 1000, count: int = 40, seconds: float = 60.0, rounds: int = 3
) -> list[Row]:
    """CPU seconds of a driver in a second of the life of so many workers; goal: at most one."""
    sample = played(subject, folder / "sample")
    small = {"workers": workers, "seconds": seconds, "rounds": rounds}
    costs = {f"driver, {workers:,} simulated workers": simulated(subject, sample, folder / "simulated", **small)}
    if count:
        costs[f"driver, {count} actors as {workers:,}"] = actors(
            subject, sample, folder / "actors", count=count, **small
        )
    shard = Path(sample.pending).stat().st_size
    facts = {"unit_seconds": seconds, "unit": UNIT, "shard_bytes": shard, "load": os.getloadavg()[0]}
    return [
        Row(name, c.cores(workers, seconds), 1.0, "cores", "one core", at_most=1.0, details={**c.to_json(), **facts})
        for name, c in costs.items()
    ]


def show(rows: Sequence[Row]) -> None:
    for row in rows:
        facts = row.details
        print(
            f"{row.name}: {facts['cpu_ms_per_unit']:.2f} ms of CPU a unit, {facts['cpu_us_per_trace']:.0f} us a trace; "
            f"{row.figure:.3f} cores at {facts['unit_seconds']:g} s a unit (load {facts['load']:.1f})"
        )
        if facts["idle_cores"] is not None:
            beside = facts["ray_processes_cpu_ms_per_unit"]
            print(f"  {facts['idle_cores']:.3f} cores with no unit under way; raylet and GCS {beside:.2f} ms a unit")
        for part, spent in facts["ms_per_unit_by_part"].items():
            print(f"  {part:<28}{spent:8.3f} ms a unit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "countdown3.yaml")
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--actors", type=int, default=40, help="0: leave Ray out")
    parser.add_argument("--seconds", type=float, default=60.0, help="that a worker takes for a unit of 32 problems")
    parser.add_argument("--rounds", type=int, default=3, help="units of each worker in an iteration")
    parser.add_argument("--warmup", type=int, default=20, help="optimiser steps of the model whose rows are committed")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        subject = bench_subject.fresh(arguments.config, folder / "model", arguments.warmup)
        rows = measure(
            subject, folder, workers=arguments.workers, count=arguments.actors, seconds=arguments.seconds,
            rounds=arguments.rounds,
        )  # fmt: skip
    show(rows)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([row.to_json() for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
