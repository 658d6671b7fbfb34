"""Whether memory stays flat while a run goes on: driver, workers and learner, by iteration.

    python scripts/bench_memory.py [--iterations 40] [--json FILE]

A small job on a Ray of its own, with short iterations so that there are many of them. Prints resident megabytes over
the run, and the slope after its first quarter in MB per hour and per iteration, with its standard error. What is
mapped from Ray's object store is shared and counts where it is mapped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from bench_processes import descendants, resident_bytes, title
from bench_rows import Row

from selfplay.config import load_config
from selfplay.run_folder import read_metrics

ROOT = Path(__file__).resolve().parent.parent
LOOK_SECONDS = 0.5
ACTORS = {"ray::WorkerActor": "worker", "ray::LearnerActor": "learner"}
MB = 1e6
COLUMNS = 8
"""Points of the run that the table shows."""


def sample(config_file: Path, folder: Path, iterations: int) -> list[dict[str, float]]:
    """Run the job; resident bytes by process, with `seconds` and the newest `iteration`, twice a second."""
    overrides = [
        f"iterations={iterations}", "warmup.steps=20", "play.problems=64", "play.unit=16", "play.max_staleness=1",
        "learn.steps=3", "evaluate={samples: 0, every: 4}", "task.heldout_problems=32", "task.dev_problems=32",
        "cluster={executor: ray, workers: 2, learner_threads: 1}",
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(load_config(config_file, overrides).to_yaml(), encoding="utf-8")
    run = folder / "run"
    command = [sys.executable, "-m", "selfplay", "launch", str(config), "--run-dir", str(run)]
    found: list[dict[str, float]] = []
    names: dict[int, str] = {}
    began = time.perf_counter()
    with open(folder / "log", "w+", encoding="utf-8") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            while child.poll() is None:
                if len(names) < 4:
                    names = processes(child.pid)
                rows = read_metrics(run)
                if len(names) == 4 and rows:
                    sizes = {name: float(resident_bytes(pid)) for pid, name in names.items()}
                    now = {"seconds": time.perf_counter() - began, "iteration": float(rows[-1]["iteration"])}
                    found += [now | sizes] if all(sizes.values()) else []
                time.sleep(LOOK_SECONDS)
        finally:
            child.kill()
        if child.returncode != 0:
            log.seek(0)
            raise RuntimeError(f"the run whose memory is measured failed:\n{log.read()}")
    return found


def processes(driver: int) -> dict[int, str]:
    """Process ids of the driver and its actors, with a name for each."""
    names = {driver: "driver"}
    for pid in descendants(driver):
        for start, name in ACTORS.items():
            if title(pid).startswith(start):
                taken = sum(known.startswith(name) for known in names.values())
                names[pid] = f"{name} {taken + 1}" if name == "worker" else name
    return names


def figures(found: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Of each process: megabytes over time, slopes after the first quarter."""
    x = {axis: np.array([one[axis] for one in found]) for axis in ("seconds", "iteration")}
    settled = x["iteration"] >= x["iteration"].max() / 4
    result = {}
    for name in sorted(found[0].keys() - x.keys()):
        y = np.array([one[name] for one in found]) / MB
        picks = np.linspace(0, len(y) - 1, COLUMNS).round().astype(int)
        per_second, error = slope(x["seconds"][settled], y[settled])
        per_iteration, _ = slope(x["iteration"][settled], y[settled])
        halves = np.array_split(y[settled], 2)
        result[name] = {
            "megabytes": [round(float(value), 1) for value in y[picks]],
            "iterations": [int(value) for value in x["iteration"][picks]],
            "mb_per_hour": 3600 * per_second,
            "mb_per_hour_error": 3600 * error,
            "mb_per_iteration": per_iteration,
            "before": float(halves[0].mean()),
            "after": float(halves[1].mean()),
        }
    return result


def slope(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Of the least-squares line, with its standard error."""
    away = x - x.mean()
    spread = float(away @ away)
    if not spread or len(x) < 3:
        return math.nan, math.nan
    found = float(away @ y) / spread
    rest = y - y.mean() - found * away
    return found, math.sqrt(float(rest @ rest) / (len(x) - 2) / spread)


def measure(config_file: Path, folder: Path, *, iterations: int = 40) -> list[Row]:
    """Mean resident memory of the second half after settling, against the first."""
    found = figures(sample(config_file, folder, iterations))
    rows = []
    for name, facts in found.items():
        details = facts | {"iterations_run": iterations, "load": os.getloadavg()[0]}
        row = Row(f"memory, {name}", facts["after"], facts["before"], "MB", "before", at_most=1.05, details=details)
        rows.append(row)
    return rows


def show(rows: list[Row]) -> None:
    print("resident MB at iteration " + " ".join(f"{i:>7}" for i in rows[0].details["iterations"]))
    for row in rows:
        facts = row.details
        each = " ".join(f"{value:7.1f}" for value in facts["megabytes"])
        print(
            f"{row.name:<25}{each}   {facts['mb_per_hour']:+.1f} +- {facts['mb_per_hour_error']:.1f} MB/hour, "
            f"{facts['mb_per_iteration']:+.3f} MB/iteration"
        )
    print(f"load of the machine: {rows[0].details['load']:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "countdown3.yaml")
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="bench-") as name:
        rows = measure(arguments.config, Path(name), iterations=arguments.iterations)
    show(rows)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([row.to_json() for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
