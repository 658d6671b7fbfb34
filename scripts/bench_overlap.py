"""What playing ahead brings on two cores: idle core-seconds and wins per second against alternation.

    nice -n -10 python scripts/bench_overlap.py [--iterations 10] [--problems 1024] [--steps 80] [--json FILE]

The same job from the same warmed-up checkpoint, on a Ray of its own, one way after the other: play and learning by
turns with one process each; by turns with both cores in each phase (two workers, two learner threads), the best that
alternation does; ahead by one and by two versions with one process each; ahead by one with two learner threads, and
with two workers as well. Measured from the third checkpoint to the third last, while nothing begins or runs out, and
beside it over the whole run. Idle core-seconds are 2 x wall less the CPU seconds of workers and learner, and less what
others took away: the time that our threads were ready to run and did not (`taken`: near 0 on a machine of one's own),
on both cores where one thread is at work at a time. `taken` cannot tell others from each other, so nothing is taken off
where more than two threads are at work. That is an estimate, and wins per second are by the wall clock: both want a
quiet machine, whose load is printed beside the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench_processes import cpu_seconds, descendants, title, waiting_seconds
from bench_rows import Row

from mcts.tasks import load_task
from selfplay import checkpoint as checkpoints
from selfplay.config import Config, load_config
from selfplay.problems import SolveRates
from selfplay.run_folder import RunFolder, read_metrics
from selfplay.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
CORES = 2
ACTORS = ("ray::WorkerActor", "ray::LearnerActor")
LOOK_SECONDS = 0.05
EDGE = 2
"""Checkpoints at either end that are left out."""


@dataclass(frozen=True, slots=True)
class Way:
    staleness: int
    workers: int
    threads: int
    """Of the learner."""

    @property
    def overrides(self) -> list[str]:
        return [
            f"play.max_staleness={self.staleness}",
            f"cluster={{executor: ray, workers: {self.workers}, learner_threads: {self.threads}}}",
        ]

    @property
    def others(self) -> float:
        """Core-seconds of the wall clock that go to others with each second that one of our threads waits for a core;
        0 where it may be one of our own that it waits for."""
        at_once = self.workers + self.threads if self.staleness else max(self.workers, self.threads)
        return CORES / at_once if at_once <= CORES else 0.0


ALTERNATION = "by turns, 2 workers, learner x 2 threads"
WAYS = {
    "by turns, 1 worker, learner x 1 thread": Way(0, 1, 1),
    ALTERNATION: Way(0, 2, 2),
    "1 ahead, 1 worker, learner x 1 thread": Way(1, 1, 1),
    "2 ahead, 1 worker, learner x 1 thread": Way(2, 1, 1),
    "1 ahead, 1 worker, learner x 2 threads": Way(1, 1, 2),
    "1 ahead, 2 workers, learner x 2 threads": Way(1, 2, 2),
}


@dataclass(frozen=True, slots=True)
class Point:
    """What workers and learner had used when a checkpoint appeared."""

    wall: float
    cpu: float
    taken: float


def config_of(path: Path, *, problems: int, steps: int, warmup: int, iterations: int) -> Config:
    """The job, shrunken: measured are its two phases, so it is evaluated at the ends alone."""
    return load_config(
        path,
        [
            f"iterations={iterations}",
            f"warmup.steps={warmup}",
            f"play.problems={problems}",
            f"play.unit={max(8, problems // 16)}",
            f"learn.steps={steps}",
            "evaluate={samples: 0, every: 1000}",
            f"keep.checkpoints={iterations + 1}",
            "cluster={executor: inline, learner_threads: 1}",
        ],
    )


def warmed_up(config: Config, folder: Path) -> None:
    """A run with its first checkpoint."""
    run = RunFolder.create(folder, config)
    try:
        trainer = Trainer(config, run.place)
        metrics = trainer.warm_up(lambda *_: None)
        problems = load_task(config.task.name, **config.task.settings).problems("train")
        rates = SolveRates.empty(len(problems)).to_state()
        state = {"iteration": 0, "policy_version": 0, "rates": rates, "metrics": metrics, "seconds": {}}
        trainer.save(0, state)
    finally:
        run.close()


def run_way(base: Path, folder: Path, way: Way, iterations: int) -> dict[str, Any]:
    """Continue a copy of `base` to its end; its figures."""
    shutil.copytree(base, folder)
    command = [sys.executable, "-m", "selfplay", "resume", str(folder), *way.overrides]
    load = os.getloadavg()[0]
    points: dict[int, Point] = {}
    with open(folder.with_suffix(".log"), "w", encoding="utf-8") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            actors: list[int] = []
            while len(points) < iterations + 1 and child.poll() is None:
                if len(actors) < way.workers + 1:
                    actors = [pid for pid in descendants(child.pid) if title(pid).startswith(ACTORS)]
                    time.sleep(0.5)
                elif not points:
                    points[0] = _point(actors)
                elif len(points) in checkpoints.existing(folder / "checkpoints"):
                    points[len(points)] = _point(actors)
                time.sleep(LOOK_SECONDS)
            code = child.wait()
        finally:
            child.kill()
    if code != 0:
        raise RuntimeError(f"{way} failed:\n{folder.with_suffix('.log').read_text(encoding='utf-8')}")
    rows = read_metrics(folder)
    steady = _between(rows, points, way, EDGE, iterations - EDGE)
    return steady | {"whole": _between(rows, points, way, 0, iterations), "load": [load, os.getloadavg()[0]]}


def _point(actors: list[int]) -> Point:
    return Point(time.perf_counter(), cpu_seconds(actors), waiting_seconds(actors))


def _between(rows: list[dict[str, Any]], points: dict[int, Point], way: Way, first: int, last: int) -> dict[str, Any]:
    """Figures from checkpoint `first` to checkpoint `last`."""
    a, b = points[first], points[last]
    wall, cpu, taken = b.wall - a.wall, b.cpu - a.cpu, b.taken - a.taken
    between = [row for row in rows if first < row["iteration"] <= last]
    wins = sum(row["solved"] * row["problems"] for row in between)
    idle = CORES * wall - cpu - way.others * taken
    return {
        "wall": wall,
        "cpu": cpu,
        "taken": taken,
        "idle": max(0.0, idle),
        "wins": wins,
        "wins_per_second": wins / wall,
        "play_seconds": sum(row["play_seconds"] for row in between),
        "learn_seconds": sum(row["learn_seconds"] for row in between),
    }


def measure(
    folder: Path,
    config_file: Path,
    *,
    iterations: int = 10,
    problems: int = 1024,
    steps: int = 80,
    warmup: int = 160,
    ways: Sequence[str] = tuple(WAYS),
) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """Idle core-seconds and wins per second of each way that plays ahead, against the best alternation."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(config_file, problems=problems, steps=steps, warmup=warmup, iterations=iterations)
    warmed_up(config, folder / "base")
    found = {name: run_way(folder / "base", folder / f"way-{i}", WAYS[name], iterations) for i, name in enumerate(ways)}
    rows = []
    for name in (name for name in ways if WAYS[name].staleness and ALTERNATION in found):
        ours, theirs = found[name], found[ALTERNATION]
        facts = {"ours": ours, "alternation": theirs}
        rates = (ours["wins_per_second"], theirs["wins_per_second"])
        rows += [
            Row(f"idle, {name}", ours["idle"], theirs["idle"], "core-s", "by turns", at_most=0.2, details=facts),
            Row(f"wins, {name}", *rates, "wins/s", "by turns", at_least=1.0),
        ]
    return rows, found


def show(found: dict[str, dict[str, Any]]) -> None:
    print(f"{'':<42}{'wall s':>8}{'CPU s':>8}{'taken':>7}{'idle':>7}{'wins/s':>8}   load; whole run: wall, idle")
    for name, f in found.items():
        before, after = f["load"]
        print(
            f"{name:<42}{f['wall']:8.1f}{f['cpu']:8.1f}{f['taken']:7.1f}{f['idle']:7.1f}{f['wins_per_second']:8.1f}   "
            f"{before:.1f}-{after:.1f}; {f['whole']['wall']:.1f}, {f['whole']['idle']:.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "countdown3.yaml")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--problems", type=int, default=1024, help="played in an iteration")
    parser.add_argument("--steps", type=int, default=80, help="optimiser steps of an iteration")
    parser.add_argument("--warmup", type=int, default=160, help="optimiser steps before all")
    parser.add_argument("--ways", type=int, nargs="+", default=list(range(len(WAYS))), help="by number, from 0")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.iterations <= 2 * EDGE:
        parser.error(f"--iterations must be more than {2 * EDGE}: so many are left out at the ends")
    with TemporaryDirectory(prefix="bench-") as name:
        rows, found = measure(
            Path(name), arguments.config, iterations=arguments.iterations, problems=arguments.problems,
            steps=arguments.steps, warmup=arguments.warmup, ways=[list(WAYS)[i] for i in arguments.ways],
        )  # fmt: skip
    show(found)
    for row in rows:
        print(f"{row.name}: {row.figure:.2f} against {row.baseline:.2f} {row.unit}, ratio {row.ratio:.2f} ({row.goal})")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
