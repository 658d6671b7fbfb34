"""AlphaZero's objective against imitation of wins alone, and against sampling instead of search.

    python scripts/bench_objectives.py [--config configs/countdown3.yaml] [--seeds 0 1 2] [--tokens 150000]

All variants of a seed start from one warm-up checkpoint, make equally many optimiser steps of equally many items and
draw equally many tokens: before each iteration the number of problems is set so that the sum of what was drawn so far
and what the last iteration's cost per problem predicts meets the plan. What each really drew stands in the table. The
learning rate falls as in one run of all iterations.

AlphaZero's objective is the cross-entropy with the search's targets, plus the imitation of wins with weight 1. Its
weight is the one of `--policy` that ends best on the dev set with the first seed; held-out problems are only reported.

Runs are kept in `--work` and are not repeated where they are complete. Seconds compare on a machine of one's own only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_subject
import yaml
from bench_peers import Point, score_at
from rich.console import Console
from rich.table import Table

from selfplay.cli import app
from selfplay.config import Config, load_config
from selfplay.errors import UserError, known_errors
from selfplay.run_folder import read_metrics

Rows = list[dict[str, Any]]

ROOT = Path(__file__).resolve().parent.parent
ALONE = (*bench_subject.ONE_THREAD, "cluster.executor=inline", "cluster.workers=1")
SAMPLER = {"name": "best_of_n", "n": 0, "until_win": True}
FIRST_GUESS = 50.0
"""Tokens per problem, for the size of the first iteration; the second corrects it."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A way of playing and learning, as overrides of the config."""

    name: str
    key: str
    """Name of its run folders."""
    overrides: tuple[str, ...] = ()


def override(key: str, value: object) -> str:
    """`key=value` with the value in YAML of one line."""
    return f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix('...' + chr(10)).strip()}"


def imitation(config: Config) -> dict[str, Any]:
    """The config's own settings of the objective `sft`. Raises UserError where it has another."""
    part = config.learn.objective
    if part.name != "sft":
        raise UserError(f"the config must have the objective sft, whose settings all variants share, not {part.name}")
    return dict(part.settings)


def alphazero(config: Config, policy: float, nll: float) -> Variant:
    """The cross-entropy with this weight, everything else as the imitation has it."""
    objective = {"name": "alphazero", "policy": policy, "nll": nll, **imitation(config)}
    return Variant(
        f"AlphaZero, cross-entropy {policy:g} + imitation {nll:g}",
        f"alphazero-{policy:g}-{nll:g}",
        (override("learn.objective", objective),),
    )


def others() -> tuple[Variant, Variant]:
    """Imitation of wins: of the config's search, and of sampled chains that stop at their first win."""
    sampled = (override("play.search.strategy", SAMPLER),)
    return Variant("imitation of searched wins", "searched"), Variant("imitation of sampled wins", "sampled", sampled)


def problems_for(rows: Sequence[Mapping[str, Any]], tokens: int, most: int) -> int:
    """How many problems the next iteration plays, so that all iterations together draw `tokens` each.

    rows: metrics of the iterations so far, the warm-up's first.
    """
    played = [row for row in rows if row["iteration"] > 0]
    due = tokens * (len(played) + 1) - sum(row["sampled_tokens"] for row in played)
    each = played[-1]["sampled_tokens"] / played[-1]["problems"] if played else FIRST_GUESS
    return max(1, min(most, round(due / each)))


def command(*words: str) -> None:
    """One selfplay command to its end, in this process (imports would cost more than an iteration of a small run); what
    it prints is dropped. Raises what the command raises, and UserError where it was interrupted."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        code = app(list(words), standalone_mode=False)
    if code:
        raise UserError(f"`selfplay {' '.join(words[:2])} ...` ended with exit code {code}; run this again to go on")


class Bench:
    """Runs of all variants from shared warm-ups."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.file: Path = arguments.config
        self.work: Path = arguments.work.absolute()
        self.iterations: int = arguments.iterations
        self.tokens: int = arguments.tokens
        self.common = (*ALONE, *arguments.set, "evaluate.samples=0")
        self.config = load_config(self.file, self.common)
        self.most = len(bench_subject.load_task(self.config.task.name, **self.config.task.settings).problems("train"))

    def warm(self, seed: int) -> Path:
        """The checkpoint that all variants of a seed start from; made where it is missing."""
        folder = self.work / f"warm-{seed}"
        ready = folder / "checkpoints" / "00000"
        if not (ready / "state.json").exists():
            own = f"warmup.lr_warmup_steps={self.config.warmup.lr_warmup_steps}"
            steps = self.config.warmup.steps
            ready = bench_subject.fresh(self.file, folder, steps, (*self.common, own, f"seed={seed}")).checkpoint
        return ready

    def run(self, variant: Variant, seed: int, samples: int) -> Rows:
        """The metrics of a variant's whole run, the warm-up's first. pass@`samples` is measured at its end."""
        folder = self.work / f"{variant.key}-{seed}"
        rows = read_metrics(folder) if (folder / "run.json").exists() else []
        start = (f"model.path={self.warm(seed)}", "warmup.steps=0", f"seed={seed}")
        while len(rows) <= self.iterations:
            number = max(1, len(rows))
            peak = self.config.learn.lr_scale
            end = peak + (self.config.learn.final_lr_scale - peak) * number / self.iterations
            changes = [
                f"iterations={number}",
                f"learn.final_lr_scale={end!r}",
                f"play.problems={problems_for(rows, self.tokens, self.most)}",
            ]
            if number == self.iterations:
                changes.append(f"evaluate.samples={samples}")
            if (folder / "run.json").exists():
                command("resume", str(folder), *changes)
            else:
                every = (*self.common, *start, *variant.overrides, *changes)
                command("launch", str(self.file), "--run-dir", str(folder), *every)
            rows = read_metrics(folder)
            last = rows[-1]
            print(
                f"{variant.key}, seed {seed}, iteration {last['iteration']}: held-out {last['heldout_pass1']:.3f}, "
                f"dev {last['dev_pass1']:.3f}, {last['problems']} problems, {last['sampled_tokens']:,} tokens",
                flush=True,
            )
        return rows


def curve(rows: Rows) -> list[Point]:
    """Held-out score after so many seconds of play and learning."""
    points, seconds = [], 0.0
    for row in rows:
        seconds += row["play_seconds"] + row["learn_seconds"] if row["iteration"] else 0.0
        points.append(Point(seconds, row["heldout_pass1"]))
    return points


def summary(variant: Variant, runs: Mapping[int, Rows], seconds: Mapping[int, float], samples: int) -> dict[str, Any]:
    """A variant's figures over all seeds. `seconds`: what every variant of a seed has reached."""
    found = list(runs.values())
    at_equal = [score_at(curve(rows), seconds[seed]) for seed, rows in runs.items()]
    return {
        "name": variant.name,
        "overrides": list(variant.overrides),
        "heldout": [[row["heldout_pass1"] for row in rows] for rows in found],
        "dev": [[row["dev_pass1"] for row in rows] for rows in found],
        "tokens": [[row["sampled_tokens"] for row in rows[1:]] for rows in found],
        "problems": [[row["problems"] for row in rows[1:]] for rows in found],
        "solved": [[row["solved"] for row in rows[1:]] for rows in found],
        "tokens_per_win": [[row["tokens_per_win"] for row in rows[1:]] for rows in found],
        "entropy": [[row["entropy"] for row in rows[1:]] for rows in found],
        "seconds": [curve(rows)[-1].seconds for rows in found],
        "heldout_at_equal_seconds": at_equal,
        f"pass{samples}": [rows[-1].get(f"heldout_pass{samples}") for rows in found],
    }


def spread(values: Sequence[float]) -> str:
    """Mean and range."""
    mean = sum(values) / len(values)
    return f"{mean:.3f}" + (f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else "")


def show(console: Console, report: Mapping[str, Any]) -> None:
    """The curves as a table: mean over seeds, and range."""
    samples, seeds = report["samples"], report["seeds"]
    table = Table(title=f"Held-out greedy after each iteration, mean (range) of seeds {', '.join(map(str, seeds))}")
    heads = ["variant", "warm-up", *map(str, range(1, report["iterations"] + 1)), f"pass@{samples}", "1,000 tokens"]
    for head in (*heads, "seconds", "at equal seconds"):
        table.add_column(head)
    for row in report["variants"]:
        columns = [spread(values) for values in zip(*row["heldout"], strict=True)]
        drawn = [sum(tokens) / 1000 for tokens in row["tokens"]]
        table.add_row(
            row["name"],
            *columns,
            spread(row[f"pass{samples}"]),
            f"{sum(drawn) / len(drawn):.0f}",
            f"{sum(row['seconds']) / len(seeds):.0f}",
            spread(row["heldout_at_equal_seconds"]),
        )
    console.print(table)


def bench(arguments: argparse.Namespace) -> None:
    console = Console() if Console().is_terminal else Console(width=190)
    runner = Bench(arguments)
    first = arguments.seeds[0]
    tried: dict[float, list[float]] = {}
    for weight in arguments.policy:
        rows = runner.run(alphazero(runner.config, weight, arguments.nll), first, arguments.samples)
        tried[weight] = [row["dev_pass1"] for row in rows]
    best = max(tried, key=lambda weight: tried[weight][-1])
    line = ", ".join(f"{weight:g}: {curve[-1]:.3f}" for weight, curve in tried.items())
    console.print(f"dev at the end, by the weight of the cross-entropy: {line}", highlight=False)
    variants = [alphazero(runner.config, best, arguments.nll), *others()]
    if arguments.alone:
        variants.append(alphazero(runner.config, 1.0, 0.0))
    runs: dict[str, dict[int, Rows]] = {v.key: {} for v in variants}
    for seed in arguments.seeds:  # a seed is complete before the next begins: a part of the seeds is a result too
        for variant in variants:
            runs[variant.key][seed] = runner.run(variant, seed, arguments.samples)
    ends = {seed: min(curve(runs[v.key][seed])[-1].seconds for v in variants) for seed in arguments.seeds}
    report = {
        "config": str(arguments.config),
        "set": arguments.set,
        "seeds": arguments.seeds,
        "iterations": arguments.iterations,
        "samples": arguments.samples,
        "tokens_per_iteration": arguments.tokens,
        "steps_per_iteration": runner.config.learn.steps,
        "dev_by_weight": {f"{weight:g}": curve for weight, curve in tried.items()},
        "variants": [summary(v, runs[v.key], ends, arguments.samples) for v in variants],
    }
    show(console, report)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "countdown3.yaml")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides that all variants share")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=150_000, help="drawn per iteration")
    parser.add_argument("--policy", type=float, nargs="+", default=[0.1, 0.3, 1.0], help="weights of the cross-entropy")
    parser.add_argument("--nll", type=float, default=1.0, help="weight of the imitation of wins beside it")
    parser.add_argument("--alone", action="store_true", help="also the cross-entropy without imitation")
    parser.add_argument("--samples", type=int, default=16, help="k of the pass@k after the last iteration")
    parser.add_argument("--work", type=Path, default=Path("runs/objectives"), help="folder for the runs")
    parser.add_argument("--out", type=Path, default=Path("bench/objectives.json"))
    try:
        bench(parser.parse_args())
    except known_errors() as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
