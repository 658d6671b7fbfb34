"""Tokens per win: tree searches against the early-stopped sampler, on a trained run's held-out problems.

    python scripts/bench_search.py RUN [--numbers 4] [--budget 2048] [--problems 200] [--out bench/search.json]

All methods see the same problems with the same cap on drawn tokens and stop at the first verified win. The sampler's
temperature and each search's main settings are tuned on the dev split; held-out problems are only measured, with
several search seeds and a paired bootstrap over problems. Beside it the AUC of the value, per depth, against exact
solvability of the states that each method visits: a search goes where the value is high, so it asks more of the value
than the sampler does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from search_curves import Outcomes, compare

from mcts.engines.torch_engine import TorchEngine
from mcts.search import Driver
from mcts.tasks.arithmetic import ArithmeticTask
from mcts.tasks.base import Task
from mcts.types import Problem
from selfplay.config import Part, SearchConfig
from selfplay.source import Source, find_source
from selfplay.stats import auc
from selfplay.worker import EvaluationJob, evaluate_problems, make_searches, stream_seed

SAMPLER = "sampler"
TEMPERATURES = (0.35, 0.5, 0.65, 0.8, 1.0, 1.25, 1.5)
GRIDS: dict[str, tuple[dict[str, Any], dict[str, Sequence[Any]]]] = {
    SAMPLER: ({"name": "best_of_n", "n": 0, "until_win": True}, {"temperature": TEMPERATURES}),
    "mcts": (
        {"name": "mcts", "commit": "never", "simulations": 0, "expand": 1, "fpu_reduction": 0.0},
        {"c_init": (0.005, 0.02, 0.05, 0.1, 0.3), "temperature": (0.65, 1.0)},
    ),
    "gumbel": (
        {"name": "gumbel", "commit": "never", "expand": 1},
        {"m": (1, 2, 4, 8), "simulations": (1, 4, 16)},
    ),
    "index": ({"name": "index"}, {"trust": (0.9, 0.99), "temperature": (0.65, 1.0)}),
    "redraw": ({"name": "redraw"}, {"ratio": (0.5, 1.0, 2.0), "temperature": (0.65, 1.0)}),
}
"""Per method: its fixed settings, and the settings that are tuned (temperature is the search's)."""


class Bench:
    """A trained run with an engine that can hold many searches of the given budget."""

    def __init__(self, run: str, numbers: int | None, budget: int, open_searches: int) -> None:
        source = find_source(run)
        config = source.config
        if numbers is not None:
            task_part = Part.model_validate({**config.task.model_dump(), "numbers": numbers})
            config = config.model_copy(update={"task": task_part})
        slots = max(config.engine.kv_slots, open_searches * (budget + 64))
        cluster = config.cluster.model_copy(update={"worker_threads": 1})
        engine = config.engine.model_copy(update={"kv_slots": slots})
        config = config.model_copy(update={"engine": engine, "cluster": cluster})
        self.source: Source = replace(source, config=config)
        task: Task = self.source.load_task()
        self.task: Task = task
        if not isinstance(task, ArithmeticTask):
            raise SystemExit(f"{run} is not a run on Countdown or Game of 24: the value's labels need their oracle")
        self.oracle: ArithmeticTask = task
        self.engine: TorchEngine = self.source.load_engine(task)
        self.budget = budget
        self.open_searches = open_searches

    def search(self, method: str, tuned: Mapping[str, Any]) -> SearchConfig:
        """A method with its settings."""
        rest = dict(tuned)
        temperature = rest.pop("temperature", 1.0)
        part = Part.model_validate({**GRIDS[method][0], **rest})
        return SearchConfig(strategy=part, budget=self.budget, temperature=temperature)

    def run(self, search: SearchConfig, problems: Sequence[Problem], seeds: Sequence[int]) -> Outcomes:
        """Every problem once per seed."""
        tokens, won = [], []
        for seed in seeds:
            job = EvaluationJob(tuple(problems), search, seed, self.source.version)
            answers = evaluate_problems(self.engine, self.task, job, max_open=self.open_searches)
            failed = [answer.failed for answer in answers if answer.failed is not None]
            if failed:
                raise SystemExit(f"{len(failed)} searches failed, the first because: {failed[0]}")
            tokens.append([answer.sampled for answer in answers])
            won.append([answer.won for answer in answers])
        return Outcomes(np.asarray(tokens, dtype=np.float64), np.asarray(won, dtype=np.float64))

    def tune(self, method: str, problems: Sequence[Problem], seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The settings with the fewest tokens per win on `problems`, and what every setting reached."""
        grid = GRIDS[method][1]
        tried = []
        for values in itertools.product(*grid.values()):
            settings = dict(zip(grid, values, strict=True))
            found = self.run(self.search(method, settings), problems, [seed])
            tried.append({**settings, "tokens_per_win": found.tokens_per_win, "wins": float(found.won.mean())})
        best = min(tried, key=lambda row: row["tokens_per_win"])
        return {name: best[name] for name in grid}, tried

    def value_auc(
        self, search: SearchConfig, problems: Sequence[Problem], seed: int, most: int
    ) -> list[dict[str, Any]]:
        """Per depth: AUC of the value head over the distinct unfinished states that a method visits, the label being
        whether a win is still possible from there (all are legal so far). At most `most` states a depth, those of the
        first problems by a fixed random order."""
        driver = Driver(self.engine, self.task, max_open=self.open_searches)
        seeds = [stream_seed(seed, "auc", p.id) for p in problems]
        searches = make_searches(problems, search, seeds, learning=False)
        scores: dict[int, list[float]] = {}
        labels: dict[int, list[bool]] = {}
        owners: dict[int, list[str]] = {}
        for result in sorted(driver.run(searches), key=lambda found: found.seed):
            tree = result.tree
            for node in range(1, len(tree)):
                depth, step = tree.depth[node], tree.steps[node]
                if step is None or tree.terminal[node] or len(scores.setdefault(depth, [])) >= most:
                    continue
                texts = [found.text for i in tree.path(node)[1:] if (found := tree.steps[i]) is not None]
                scores[depth].append(step.value)
                labels.setdefault(depth, []).append(self.oracle.winning_share(result.problem, texts) > 0.0)
                owners.setdefault(depth, []).append(result.problem.id)
        return [
            {
                "depth": depth,
                "states": len(scores[depth]),
                "solvable": float(np.mean(labels[depth])),
                "auc": auc(scores[depth], labels[depth]),
                "auc_within_problem": within(scores[depth], labels[depth], owners[depth]),
            }
            for depth in sorted(depth for depth in scores if scores[depth])
        ]


def within(scores: Sequence[float], labels: Sequence[bool], owners: Sequence[str]) -> float:
    """Mean AUC over the problems that have states of both kinds: what a search within one problem feels."""
    groups: dict[str, tuple[list[float], list[bool]]] = {}
    for score, label, owner in zip(scores, labels, owners, strict=True):
        group = groups.setdefault(owner, ([], []))
        group[0].append(score)
        group[1].append(label)
    found = [auc(s, y) for s, y in groups.values() if any(y) and not all(y)]
    return float(np.mean(found)) if found else math.nan


def show(console: Console, report: Mapping[str, Any]) -> None:
    """The report as two tables."""
    out = Table(title=f"Tokens per win, {report['problems']} held-out problems, cap {report['budget']} tokens")
    for heading in ("method", "settings", "wins", "tokens per win", "ratio (95%)", "wins at equal tokens"):
        out.add_column(heading)
    out.add_column("tokens at equal wins")
    for name, row in report["methods"].items():
        settings = ", ".join(f"{key}={value:g}" for key, value in row["settings"].items())
        figures = [f"{row['wins']:.3f}", f"{row['tokens_per_win']:.0f}"]
        if name != SAMPLER:
            figures.append(f"{row['ratio']:.2f} ({row['low']:.2f}-{row['high']:.2f})")
            ours, theirs = row["wins_at_equal_tokens"], row["sampler_wins_at_equal_tokens"]
            figures.append(f"{ours:.3f} : {theirs:.3f} = {row['wins_ratio']:.2f}")
            ours, theirs = row["tokens_at_equal_wins"], row["sampler_tokens_at_equal_wins"]
            figures.append(f"{ours:.0f} : {theirs:.0f} = 1 / {row['tokens_ratio']:.2f}")
        out.add_row(name, settings, *figures)
    console.print(out)
    value = Table(title="Value against exact solvability of the states that a method visits")
    for heading in ("visited by", "after step", "states", "solvable", "AUC", "AUC within a problem"):
        value.add_column(heading)
    for method, rows in report["value"].items():
        for row in rows:
            shares = [f"{row[name]:.3f}" for name in ("solvable", "auc", "auc_within_problem")]
            value.add_row(method, str(row["depth"]), str(row["states"]), *shares)
    console.print(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder or checkpoint")
    parser.add_argument("--numbers", type=int, help="numbers per problem, if not the run's own")
    parser.add_argument("--budget", type=int, default=2048, help="cap on drawn tokens per search")
    parser.add_argument("--problems", type=int, help="held-out problems (default: all)")
    parser.add_argument("--dev", type=int, help="dev problems to tune on (default: all)")
    parser.add_argument("--methods", nargs="+", choices=[m for m in GRIDS if m != SAMPLER], help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="search seeds")
    parser.add_argument("--open", type=int, default=512, help="searches under way at once")
    parser.add_argument("--states", type=int, default=2000, help="states per depth for the value's AUC")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    torch.set_num_threads(1)
    began = time.perf_counter()
    bench = Bench(arguments.run, arguments.numbers, arguments.budget, arguments.open)
    dev = bench.task.problems("dev")[: arguments.dev]
    heldout = bench.task.problems("heldout")[: arguments.problems]
    seeds = range(1, 1 + arguments.seeds)
    methods: dict[str, Any] = {}
    sampler: Outcomes | None = None
    for name in (SAMPLER, *(arguments.methods or [m for m in GRIDS if m != SAMPLER])):
        settings, tried = bench.tune(name, dev, 0)
        started = time.perf_counter()
        found = bench.run(bench.search(name, settings), heldout, seeds)
        seconds = time.perf_counter() - started
        if sampler is None:
            sampler = found
        methods[name] = {
            "settings": settings,
            **compare(found, sampler, arguments.budget, 0),
            "tokens_per_second": float(found.tokens.sum()) / seconds,
            "tuning": tried,
        }
        spent = time.perf_counter() - began
        line = f"[{spent:5.0f} s] {name}: {methods[name]['tokens_per_win']:.0f} tokens per win with {settings}"
        console.print(line, markup=False, highlight=False)
    report = {
        "run": arguments.run,
        "version": bench.source.version,
        "numbers": arguments.numbers,
        "budget": arguments.budget,
        "problems": len(heldout),
        "dev": len(dev),
        "seeds": len(seeds),
        "methods": methods,
        "value": {
            name: bench.value_auc(bench.search(name, row["settings"]), heldout, 0, arguments.states)
            for name, row in methods.items()
        },
        "seconds": time.perf_counter() - began,
    }
    show(console, report)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
