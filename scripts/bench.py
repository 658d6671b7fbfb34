"""All speed benchmarks on the model of a config; prints one table and writes JSON.

    python scripts/bench.py --out bench/results.json [--run RUN] [--quick]

The model is built anew and warmed up for some steps, so that it writes steps of the usual length, or is the last
checkpoint of a run. Each ratio's baseline is measured beside it. One thread per process throughout.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import bench_broadcast
import bench_decode
import bench_driver
import bench_memory
import bench_overlap
import bench_play
import bench_subject
import bench_train
import torch
from bench_rows import Row, shown, table
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
FIVE = ("task.numbers=5", "task.train_sets=16")
"""Few sets: every play of each is enumerated to find its problems, which takes a tenth of a second and more."""
WIDER = (384, 768)
WIDER_WARMUP = 20
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results.json"), help="JSON file to write")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "countdown3.yaml")
    parser.add_argument("--run", type=Path, help="measure a run's last checkpoint instead of a fresh model")
    parser.add_argument("--run5", type=Path, help="the same for the model of 5 numbers whose trees are trained on")
    parser.add_argument(
        "--warmup",
        type=int,
        help="optimiser steps of a fresh model (default 300, quick: 20); with fewer, most steps are illegal and trees "
        "are stars of one step",
    )
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for a core shared with others")
    parser.add_argument("--quick", action="store_true", help="a smoke test of about a minute; figures are rough")
    arguments = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    quick, clock = arguments.quick, CLOCKS[arguments.clock]
    torch.set_num_threads(1)
    warmup = arguments.warmup if arguments.warmup is not None else 20 if quick else 300
    began = time.perf_counter()
    rows: list[Row] = []

    def say(text: str) -> None:
        console.print(f"[{time.perf_counter() - began:5.0f} s] {text}", markup=False, highlight=False)

    with TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        say("preparing the model")
        if arguments.run is not None:
            subject = bench_subject.of_run(arguments.run)
        else:
            subject = bench_subject.fresh(arguments.config, folder / "model", warmup)
        say("engine against a bare decode loop")
        rows.append(bench_decode.measure(subject, clock, searches=256 if quick else 1024, rounds=2 if quick else 7))
        say("time outside the model during search")
        found, rate = bench_play.measure(subject, clock, problems=192 if quick else 2048)
        rows += found
        for width in () if quick else WIDER:
            say(f"the same with a model {width} wide")
            overrides = (f"model.fresh.width={width}", f"model.fresh.intermediate={3 * width}")
            wider = bench_subject.fresh(arguments.config, folder / f"wide-{width}", WIDER_WARMUP, overrides)
            rows.append(bench_play.measure_wider(wider, clock, problems=256))
            rows.append(bench_train.measure_shape("gsm8k", wider, clock, trees=8, rounds=3))
        say("training on trees and on their paths")
        searches, rounds = (16, 2) if quick else (64, 9)
        rows.extend(bench_train.measure("3 numbers", subject, clock, searches=searches, rounds=rounds))
        if arguments.run5 is not None:
            five = bench_subject.of_run(arguments.run5)
        else:
            five = bench_subject.fresh(arguments.config, folder / "five", warmup, FIVE)
        rows.extend(bench_train.measure("5 numbers", five, clock, searches=searches, rounds=rounds))
        rows.append(bench_train.measure_shape("gsm8k", subject, clock, trees=searches, rounds=rounds))
        say("traces per second with one and two workers")
        units, unit = (4, 32) if quick else (16, subject.config.play.unit)
        rows += bench_play.measure_workers(subject, folder, rate, units=units, unit=unit)
        say("what a driver of 1,000 workers costs")
        count, turns = (4, 1) if quick else (40, 3)
        rows += bench_driver.measure(subject, folder, count=count, rounds=turns)
        say("weights to one node and to two")
        sizes, repetitions = ((1,), 1) if quick else (bench_broadcast.SIZES, 3)
        rows += bench_broadcast.measure(folder, sizes=sizes, repetitions=repetitions)
        say("memory over a run")
        rows += bench_memory.measure(arguments.config, folder / "memory", iterations=6 if quick else 40)
        say("playing ahead against playing and learning by turns")
        job = {"iterations": 5, "problems": 64, "steps": 4, "warmup": 20} if quick else {}
        rows += bench_overlap.measure(folder / "overlap", arguments.config, **job)[0]
    say("done")
    console.print(table(rows))
    for row in rows:
        if "tokens_saved" in row.details:
            saved, size = row.details["tokens_saved"], row.details["tokens_per_tree"]
            text = f"{row.name}: trees of {size:.0f} tokens; their paths hold {saved:.2f} times as many"
            console.print(text, markup=False, highlight=False)
        if "shares_outside_model" in row.details:
            parts = ", ".join(f"{part} {share:.1%}" for part, share in row.details["shares_outside_model"].items())
            rate_text = shown(row.details["tokens_per_second"])
            console.print(f"{row.name}: {rate_text} tokens/s; {parts}", markup=False, highlight=False)
    report = {
        "quick": quick,
        "clock": arguments.clock,
        "model": str(arguments.run or f"{arguments.config.name}, {warmup} warm-up steps"),
        "machine": {"processor": platform.machine(), "cores": len(os.sched_getaffinity(0))},
        "packages": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "ray", "numpy")},
        "seconds": time.perf_counter() - began,
        "rows": [row.to_json() for row in rows],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
