"""What a row promises beside its tree: who it is, what it may spend, and that a win is one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pyarrow as pa

from mcts.types import Ended, Status
from selfplay.columns import project
from selfplay.doctor.findings import Fault
from selfplay.traces import signed, trace_id, unsigned
from selfplay.worker import stream_seed

COLUMNS = (
    "trace_id", "problem_id", "iteration", "attempt", "policy_version", "seed", "settings", "ended", "answer",
    "verdict", "reward", "error", "solution", "path", "usage", "nodes.parent", "nodes.verdict", "nodes.answer",
    "nodes.terminal",
)  # fmt: skip

JUDGED = (Status.CORRECT.value, Status.WRONG.value, Status.UNPARSABLE.value)


@dataclass(slots=True)
class Iteration:
    """What is known of the iteration whose rows are checked, and what its rows add up to."""

    number: int
    versions: Collection[int]
    """Policy versions that may have played it."""
    rows: int = 0
    won: int = 0
    sampled: int = 0
    newest: int = -1
    """Newest policy version among them."""
    ids: set[bytes] = field(default_factory=set)
    """Of its traces. An id holds its iteration (see `row_faults`), so one iteration's ids are enough to find a trace
    that is there twice, and memory does not grow with the run."""


@lru_cache(maxsize=64)
def _settings(text: str) -> dict[str, Any] | None:
    try:
        settings = json.loads(text)
    except ValueError:
        return None
    return settings if isinstance(settings, dict) else None


def row_faults(batch: pa.RecordBatch, at: Iteration, config_hash: str, seed: int | None) -> Iterator[Fault]:
    """Faults of the rows of a batch, which is counted into `at`.

    `seed` is the run's; None where the run's own config is unknown.
    """
    found: dict[str, list[int]] = {}
    said: dict[str, str] = {}
    for place, row in enumerate(project(batch, COLUMNS).to_pylist()):
        at.rows += 1
        at.won += row["verdict"] == Status.CORRECT.value
        at.sampled += row["usage"]["sampled"]
        at.newest = max(at.newest, row["policy_version"])
        for check, what in _row(row, at, config_hash, seed):
            found.setdefault(check, []).append(place)
            said.setdefault(check, what)
    for check, rows in found.items():
        yield Fault(check, sorted(set(rows)), said[check])


def _row(row: dict[str, Any], at: Iteration, config_hash: str, seed: int | None) -> Iterator[tuple[str, str]]:
    yield from _identity(row, at, config_hash, seed)
    usage, settings = row["usage"], _settings(row["settings"])
    if settings is None:
        yield "settings", "has settings that are no JSON object"
        settings = {}
    if min(count for count in usage.values() if count is not None) < 0 or usage["discarded"] > usage["sampled"]:
        yield "tokens", "counts fewer tokens than none, or discarded more than it sampled"
    budget = settings.get("budget")
    if isinstance(budget, int) and usage["sampled"] > budget:
        yield "budget", f"sampled {usage['sampled']} tokens of a budget of {budget}"
    if row["ended"] not in list(Ended):
        yield "ended", f"ended in an unknown way, {row['ended']!r}"
    if (row["ended"] == Ended.FAILED.value) != (row["error"] is not None):
        yield "ended", "failed without a reason, or has one without having failed"
    yield from _win(row, learning=bool(settings.get("learning", True)))


def _identity(row: dict[str, Any], at: Iteration, config_hash: str, seed: int | None) -> Iterator[tuple[str, str]]:
    if row["iteration"] != at.number:
        yield "iteration", f"says iteration {row['iteration']} and lies with those of {at.number}"
    if row["policy_version"] not in at.versions:
        allowed = " or ".join(map(str, sorted(at.versions)))
        yield "versions", f"was played by version {row['policy_version']}, and iteration {at.number} may by {allowed}"
    own = unsigned(row["seed"])
    if row["trace_id"] != trace_id(config_hash, own, row["iteration"], row["problem_id"], row["attempt"]):
        yield "trace id", "has an id that does not follow from its settings, seed, iteration and problem"
    if seed is not None:
        expected = stream_seed(seed, row["iteration"], row["problem_id"], row["attempt"])
        if signed(expected) != row["seed"]:
            yield "seed", f"was drawn with seed {own}, and the run's seed gives {expected}"
    key = row["trace_id"].encode()
    if key in at.ids:
        yield "twice", "is there twice"
    at.ids.add(key)


def _win(row: dict[str, Any], *, learning: bool) -> Iterator[tuple[str, str]]:
    """Only a check or a verifier awards a win, and the path leads to it."""
    verdict, reward, path, nodes = row["verdict"], row["reward"], row["path"], row["nodes"]
    won = verdict == Status.CORRECT.value
    if verdict is not None and verdict not in list(Status):
        yield "verdicts", f"has the unknown verdict {verdict!r}"
    if reward is not None and not 0.0 <= reward <= 1.0:
        yield "values", f"has the reward {reward}, outside [0, 1]"
    if (verdict is None and reward is not None) or (verdict in JUDGED and reward is None):
        yield "verdicts", "has a reward that no verdict gave, or the reverse"
    elif reward is not None and verdict in JUDGED and (reward <= 0.0 if won else reward >= 1.0):
        yield "verdicts", f"has verdict {verdict} and reward {reward}"
    if won != (row["solution"] is not None):
        yield "verdicts", "has a solution without a win, or the reverse"
    steps = itertools.pairwise(path)
    if path and (path[0] != 0 or not all(0 < b < len(nodes) and nodes[b]["parent"] == a for a, b in steps)):
        yield "path", "has a path that does not lead from the prompt down its tree"
        return
    end = nodes[path[-1]] if path and nodes else None
    if row["answer"] is not None and (end is None or not end["terminal"] or end["answer"] != row["answer"]):
        yield "path", "has a path that does not lead to its answer"
    if won and learning and (end is None or end["verdict"] != Status.CORRECT.value):
        yield "verdicts", "counts as won although no check or verifier called the end of its path correct"
    correct = any(node["verdict"] == Status.CORRECT.value for node in nodes)
    if row["ended"] == Ended.SOLVED.value and learning and not correct:
        yield "verdicts", "ended as solved although no check or verifier called any of its answers correct"
