"""A run of seconds that wins some of its searches, for tests that need wins; `damaged` copies of it are what the doctor
is tested with."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfplay.shards import iter_rows, read_metadata, shard_path, write_pending
from tests.selfplay.test_resume import ENVIRONMENT, ROOT

CONFIG = """
seed: 3
iterations: 2
task:
  {name: countdown, numbers: 3, low: 1, high: 9, heldout_sets: 20, dev_sets: 10, target_low: 10, target_high: 30,
   max_value: 60, heldout_problems: 24, dev_problems: 16}
model: {fresh: {width: 48, layers: 2, heads: 2}}
warmup: {steps: 150, examples_per_step: 128, lr_warmup_steps: 2}
engine: {rows: 32, kv_slots: 8192, max_context: 64}
play:
  problems: 20
  unit: 8
  open_searches: 16
  search: {strategy: {name: mcts, commit: visits}, budget: 150}
learn: {steps: 2, items_per_step: 16, optimizer: {name: muon, lr: 0.005}}
evaluate: {samples: 2}
cluster: {executor: inline, learner_threads: 1}
"""
UNITS = 3


def build(run: Path) -> Path:
    """Launch it in a process of its own and see it to its end."""
    import subprocess
    import sys

    config = run.parent / "winning.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    command = [sys.executable, "-m", "selfplay", "launch", str(config), "--run-dir", str(run)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return run


def rewrite(run: Path, change: Callable[[list[dict[str, Any]]], Any], iteration: int = 1, part: int = 0) -> None:
    """Write one shard again with `change` made to its rows in place: whole, with checksums that fit, and wrong."""
    shard = shard_path(run, iteration, part)
    rows = list(iter_rows(shard))
    metadata = {name: text for name, text in read_metadata(shard).items() if name in ("run_id", "config_hash")}
    change(rows)
    new = run.parent / "rewritten.arrow"
    write_pending(new, rows, metadata)
    os.replace(new, shard)


def won(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The first row that is a win."""
    return next(row for row in rows if row["verdict"] == "correct")
