"""What a second learner process brings, against a second thread in one.

    python scripts/bench_learners.py [--config configs/countdown3.yaml] [--steps 20] [--repetitions 3] [--json FILE]

Learns the same items with 1 process of 1 thread, 1 process of 2 threads and 2 processes of 1 thread each, which take
turns; prints useful tokens per second of wall-clock time (median and every repetition), and the data-parallel
efficiency: what 2 processes do over twice what 1 does, and the same by CPU seconds, which other work on the machine
disturbs less and which leaves out waiting. `examples`: worked examples of the config's task, drawn and
encoded on every rank, as in warm-up. `trees`: search trees of the shape of Countdown's, prepared on every rank. All
wait while one learns; the machine must have two free cores, so its load is printed beside the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from bench_learner import SHAPES, tree_of

from mcts.tree import Tree
from selfplay.config import Config, load_config
from selfplay.group import Alone, Group, TorchGroup, open_door
from selfplay.learner import Budget
from selfplay.store import Place
from selfplay.store_disk import epoch_folder
from selfplay.trainer import Trainer

HOST = "127.0.0.1"
WAYS = {"1 process x 1 thread": (1, 1), "1 process x 2 threads": (1, 2), "2 processes x 1 thread": (2, 1)}
KINDS = ("examples", "trees")
TREES = 256


@dataclass(frozen=True)
class Trace:
    """What objectives read of one."""

    tree: Tree
    problem_id: str
    iteration: int = 1
    policy_version: int = 0
    path: list[int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def config_of(path: Path, learners: int, threads: int, steps: int) -> Config:
    cluster = f"cluster={{executor: ray, learners: {learners}, learner_threads: {threads}}}"
    objective = "learn.objective={name: alphazero}"
    return load_config(path, [cluster, objective, "warmup.steps=2", f"learn.steps={steps}", "learn.replay=0.5"])


def learn(trainer: Trainer, kind: str, steps: int, traces: list[Trace]) -> float:
    """Useful tokens that were learned from."""
    if kind == "examples":
        return float(trainer.learn(1, [], lambda *_: None)["tokens"])
    return trainer.learner.learn(1, traces, Budget(steps=steps))["tokens"]


def rank(number: int, path: Path, learners: int, threads: int, steps: int, run: Path, pipe: Connection) -> None:
    """One process: meet the others, warm up, then learn whenever told to; answers (tokens, seconds, CPU seconds)."""
    torch.set_num_threads(1)
    group: Group = Alone()
    if learners > 1:
        door, where = open_door(HOST) if number == 0 else (None, None)
        if door is not None:
            pipe.send(where)
        group = TorchGroup(number, learners, pipe.recv(), host=HOST, door=door, timeout=600.0, patience=600.0)
    trainer = Trainer(config_of(path, learners, threads, steps), Place(str(run), "bench", 1), group)
    trainer.warm_up(lambda *_: None)
    rng = np.random.default_rng(0)
    words = int(trainer.learner.policy.model.config.vocab_size)
    traces = [Trace(tree_of(rng, **SHAPES["countdown3"], words=words), str(i)) for i in range(TREES)]
    for kind in KINDS:
        learn(trainer, kind, 1, traces[:32])  # whatever is made once
    pipe.send("ready")
    while (kind := pipe.recv()) is not None:
        began, busy = time.perf_counter(), time.process_time()
        tokens = learn(trainer, kind, steps, traces)
        pipe.send((tokens, time.perf_counter() - began, time.process_time() - busy))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).parents[1] / "configs" / "countdown3.yaml")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    context = get_context("spawn")
    load = os.getloadavg()[0]
    rates: dict[str, dict[str, list[float]]] = {kind: {way: [] for way in WAYS} for kind in KINDS}
    costs: dict[str, dict[str, list[float]]] = {kind: {way: [] for way in WAYS} for kind in KINDS}
    with TemporaryDirectory() as folder:
        run = Path(folder)
        epoch_folder(run, 1).mkdir(parents=True)
        (run / "checkpoints").mkdir()
        pipes: dict[str, list[Connection]] = {}
        processes = []
        for way, (learners, threads) in WAYS.items():
            pairs = [context.Pipe() for _ in range(learners)]
            pipes[way] = [ours for ours, _ in pairs]
            for number, (_, theirs) in enumerate(pairs):
                given = (number, arguments.config, learners, threads, arguments.steps, run, theirs)
                processes.append(context.Process(target=rank, args=given))
                processes[-1].start()
                theirs.close()  # so that a process that dies is noticed
            if learners > 1:
                where = pipes[way][0].recv()
                for pipe in pipes[way]:
                    pipe.send(where)
            assert [pipe.recv() for pipe in pipes[way]] == ["ready"] * learners
        for _ in range(arguments.repetitions):
            for kind in KINDS:
                for way, ours in pipes.items():
                    for pipe in ours:
                        pipe.send(kind)
                    answers = [pipe.recv() for pipe in ours]
                    rates[kind][way].append(answers[0][0] / max(seconds for _, seconds, _ in answers))
                    costs[kind][way].append(max(busy for _, _, busy in answers) / answers[0][0])
        for pipe in (pipe for ours in pipes.values() for pipe in ours):
            pipe.send(None)
        for process in processes:
            process.join()
    result: dict[str, Any] = {
        "bench": "learners",
        "cores": os.cpu_count(),
        "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2),
    }
    for kind in KINDS:
        middle = {way: statistics.median(found) for way, found in rates[kind].items()}
        one, threaded, two = middle.values()
        busy = [statistics.median(found) for found in costs[kind].values()]
        cpu = busy[0] / (2 * busy[2])
        result[kind] = {
            "tokens_per_second": {way: [round(each) for each in found] for way, found in rates[kind].items()},
            "median": {way: round(value) for way, value in middle.items()},
            "threads_gain": round(threaded / one, 2),
            "processes_gain": round(two / one, 2),
            "efficiency": round(two / (2 * one), 2),
            "cpu_efficiency": round(cpu, 2),
        }
        print(f"{kind}: useful tokens/s, median of {arguments.repetitions} (all)")
        for way, value in middle.items():
            each = " ".join(f"{found:,.0f}" for found in rates[kind][way])
            print(f"  {way:<24}{value:>9,.0f}   {value / one:.2f} x   ({each})")
        print(f"  efficiency of 2 processes: {two / (2 * one):.2f}; by CPU seconds of the busier one: {cpu:.2f}")
    print(f"load of the machine: {result['load_before']} before, {result['load_after']} after; {os.cpu_count()} cores")
    print(json.dumps(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
