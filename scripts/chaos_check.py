"""What a disturbed run must still keep: every unit exactly once, nothing for `selfplay doctor` to find, and the same
content, weights and figures as the undisturbed run. Each check is a list of sentences, empty where all is well."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfplay.config import Config
from selfplay.run_folder import TIMING_COLUMNS, read_metrics
from selfplay.shards import content_digest, list_shards, read_shard, shard_key
from tests.cluster_net import ENVIRONMENT, ROOT, selfplay

UNDISTURBED_SECONDS_PER_ITERATION = 180.0
"""Deadline of the undisturbed run, on a machine that others use too."""


def units_once(run: Path, config: Config, iterations: int) -> list[str]:
    """Of iterations 1 to `iterations`: every unit is there, no other, each row in its place and only once."""
    found, traces = [], Counter[str]()
    parts = math.ceil(config.play.problems / config.play.unit)
    for iteration in range(1, iterations + 1):
        shards = list_shards(run, first=iteration, last=iteration)
        numbers = [shard_key(shard)[1] for shard in shards]
        if numbers != list(range(parts)):
            found.append(f"iteration {iteration} has the units {numbers}, not 0 to {parts - 1}")
        rows = 0
        for shard in shards:
            table = read_shard(shard, ["trace_id"])
            rows += len(table)
            traces.update(table.column("trace_id").to_pylist())
        if rows != config.play.problems:
            found.append(f"iteration {iteration} has {rows} rows, not {config.play.problems}")
    doubled = [trace for trace, count in traces.items() if count > 1]
    if doubled:
        found.append(f"{len(doubled)} traces are there more than once: {doubled[0]}")
    return found


def doctor(run: Path) -> list[str]:
    """What `selfplay doctor` finds."""
    environment = {**os.environ, **ENVIRONMENT}
    command = selfplay("doctor", run)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    return [] if done.returncode == 0 else (done.stdout + done.stderr).strip().splitlines()


def finished_iterations(run: Path) -> int:
    """The last iteration whose row is in metrics.jsonl; -1 where there is none."""
    return max((row["iteration"] for row in read_metrics(run)), default=-1)


def undisturbed(folder: Path, source: Path, overrides: Sequence[str], iterations: int) -> None:
    """Play the same run inline, undisturbed, until `iterations` are done; goes on with what is there already."""
    environment = {**os.environ, **ENVIRONMENT}
    with open(folder.with_name("undisturbed.log"), "a", encoding="utf-8") as log:
        while finished_iterations(folder) < iterations:
            if (folder / "run.json").exists():
                command = selfplay("resume", folder)
            else:
                command = selfplay("launch", source, "--run-dir", folder, *overrides, "cluster.executor=inline")
            deadline = time.monotonic() + UNDISTURBED_SECONDS_PER_ITERATION * (iterations + 2)
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
            try:
                while process.poll() is None and finished_iterations(folder) < iterations:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"the undisturbed run takes too long; see {log.name}")
                    time.sleep(1)
            finally:
                process.kill()
                code = process.wait()
            if code > 0:
                raise RuntimeError(f"the undisturbed run ended with exit code {code}; see {log.name}")


def same_as(run: Path, other: Path, iterations: int) -> list[str]:
    """How `run` differs from the undisturbed `other` up to `iterations`."""
    found = []
    for iteration in range(1, iterations + 1):
        name = f"traces/iteration={iteration:05d}"
        if content_digest(run / name) != content_digest(other / name):
            found.append(f"iteration {iteration} has other content")
    mine, theirs = (_weights(folder, iterations) for folder in (run, other))
    if mine != theirs or not mine:
        found.append(f"checkpoint {iterations} has other weights: {sorted(mine)} against {sorted(theirs)}")
    for row, expected in zip(_rows(run, iterations), _rows(other, iterations), strict=True):
        if row != expected:
            columns = [c for c in {**row, **expected} if row.get(c) != expected.get(c)]
            found.append(f"metrics of iteration {row['iteration']} differ in {', '.join(columns)}")
    return found


def _weights(run: Path, iteration: int) -> dict[str, str]:
    folder = run / "checkpoints" / f"{iteration:05d}"
    files = sorted(path for path in folder.rglob("*") if path.suffix == ".safetensors")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _rows(run: Path, iterations: int) -> list[dict[str, Any]]:
    rows = [row for row in read_metrics(run) if row["iteration"] <= iterations]
    return [json.loads(json.dumps({k: v for k, v in row.items() if k not in TIMING_COLUMNS})) for row in rows]


def curve(run: Path) -> list[dict[str, float]]:
    """The held-out curve."""
    names = ("iteration", "heldout_pass1", "heldout_low", "heldout_high")
    return [{n: row[n] for n in names} for row in read_metrics(run) if row.get("heldout_pass1") is not None]


def rises(points: Sequence[dict[str, float]]) -> bool:
    """Whether the last score's interval lies above the first one's."""
    return len(points) > 1 and points[-1]["heldout_low"] > points[0]["heldout_high"]


if __name__ == "__main__":
    sys.exit("this is a part of chaos.py")
