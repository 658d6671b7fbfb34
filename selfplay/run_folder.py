"""The run folder (DESIGN.md, section 7): who may write to it, what it says of itself, its metrics."""

from __future__ import annotations

import importlib.metadata
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfplay.config import Config, ConfigError, parse_config
from selfplay.heartbeat import Heartbeat, State, refuse_living
from selfplay.retention import resume_points
from selfplay.shards import trace_ages
from selfplay.store import Home, Place, RunError, Store, checkpoint_numbers, open_home

__all__ = ["PACKAGES", "TIMING_COLUMNS", "RunError", "RunFolder", "read_metrics"]

TIMING_COLUMNS = (
    "wall_seconds",
    "play_seconds",
    "learn_seconds",
    "evaluate_seconds",
    "tokens_per_second",
    "broadcast_bytes",
    "broadcast_seconds",
)
"""Columns of metrics.jsonl that may differ between a run and its repetition."""

PACKAGES = ("mcts-selfplay", "torch", "transformers", "ray", "numpy", "pyarrow")


class RunFolder:
    """One run, held by this process as its driver. Open it with `create` or `open`; `close` frees it, and so does the
    end of the process: a killed run needs no cleaning up. Every write goes through `store`.
    """

    def __init__(self, home: Home, store: Store, config: Config, facts: dict[str, Any]) -> None:
        self._home = home
        self.store = store
        self.config = config
        self.facts = facts
        self.path = store.root
        self._rows = read_metrics(store.pull("metrics.jsonl").parent)
        """Nobody else writes them while this driver holds the run."""
        self._heartbeat = Heartbeat(store)

    @classmethod
    def create(cls, path: Path | str, config: Config) -> RunFolder:
        """A new run. Raises RunError where the folder already holds one or cannot be written."""
        home = open_home(str(path), create=True)
        try:
            facts = {
                "id": uuid.uuid4().hex,
                "epoch": 1,
                "seed": config.seed,
                "created": time.time(),
                "packages": _packages(),
            }
            store = home.create(facts, {"config.yaml": config.to_yaml()})
            return cls(home, store, config, facts)
        except BaseException:
            home.release()
            raise

    @classmethod
    def open(
        cls, path: Path | str, overrides: Sequence[str] = (), check: Callable[[Config], None] = lambda _: None
    ) -> RunFolder:
        """An existing run, to be continued. Overrides are kept as the run's new config; the old one stays beside
        it. `check` judges the new config before anything is written. Raises RunError where there is no run or another
        process holds it, ConfigError for a bad override."""
        home = open_home(str(path), create=False)
        try:
            facts = _read_facts(home)
            config = _read_config(home)
            refuse_living(home.read, home.url, locked=home.locked)
            changed = parse_config(config.to_yaml(), overrides, source="config") if overrides else config
            if overrides:
                _refuse(changed, config, home)
                check(changed)
            before = facts["epoch"]
            store = home.take_over(facts)
            _bring_here(store, changed)
            if changed != config:
                store.put(f"config.until-epoch-{before:03d}.yaml", config.to_yaml())
                store.put("config.yaml", changed.to_yaml())
            return cls(home, store, changed, facts)
        except BaseException:
            home.release()
            raise

    @property
    def place(self) -> Place:
        """What workers and the learner open their own stores from."""
        return self.store.place

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def close(self, state: State = "interrupted") -> None:
        """Say how it ended, and let go of the run. Workers that still write for it are fenced from here on."""
        self._heartbeat.stop(state)
        self.store.close()
        self._home.release()

    def heartbeat(self, **facts: Any) -> None:
        """Where the run stands; written with the next beat. None removes a fact. Raises Fenced where another driver
        has taken the run over."""
        self._heartbeat.note(**facts)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl (replaced as a whole, so no line is ever half-written)."""
        return list(self._rows)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add the row of one iteration. The file is replaced as a whole: it has one short line per iteration."""
        rows = [*(r for r in self._rows if r["iteration"] < row["iteration"]), dict(row)]
        self.store.put("metrics.jsonl", "\n".join(json.dumps(r) for r in rows) + "\n")
        self._rows = rows


def _read_facts(home: Home) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(home.read("run.json") or "")
        if not isinstance(facts["epoch"], int) or not isinstance(facts["id"], str):
            raise TypeError("epoch or id is of the wrong kind")
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{home.url}/run.json is damaged; restore it from a copy") from error
    return facts


def _bring_here(store: Store, config: Config) -> None:
    """What a driver on this node reads: documents, checkpoints, and the traces from the first that a learning phase
    may need."""
    for name in ("run.json", "config.yaml", "metrics.jsonl", "checkpoints"):
        store.pull(name)
    points = resume_points(checkpoint_numbers(store.listing("checkpoints")), config.play.max_staleness)
    first = (points[0] if points else 0) + 2 - config.learn.window
    for iteration in trace_ages(store.listing("traces")):
        if iteration >= first:
            store.pull(f"traces/iteration={iteration:05d}")


def _read_config(home: Home) -> Config:
    text = home.read("config.yaml")
    if text is None:
        raise RunError(f"{home.url} has lost its config.yaml; restore it from a copy")
    return parse_config(text, source=f"{home.url}/config.yaml")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, oldest first; empty where there are none yet. Raises RunError."""
    file = path / "metrics.jsonl"
    if not file.exists():
        return []
    try:
        rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(row, dict) and isinstance(row.get("iteration"), int) for row in rows):
            raise ValueError("a line is no row of an iteration")
        return rows
    except ValueError as error:  # it is replaced as a whole, so this is no run that was killed
        raise RunError(f"{file} is damaged ({error}); restore it from a copy") from error


def _refuse(changed: Config, config: Config, home: Home) -> None:
    """Raise ConfigError for a change that a run cannot take, or cannot take now."""
    same = [("task", changed.task == config.task), ("seed", changed.seed == config.seed)]
    same += [("model.path", changed.model.path == config.model.path)]
    same += [("model.fresh", changed.model.fresh == config.model.fresh)]
    same += [("model.lora", changed.model.lora == config.model.lora)]
    same += [("model.freeze_trunk", changed.model.freeze_trunk == config.model.freeze_trunk)]
    same += [("learn.optimizer.name", changed.learn.optimizer.name == config.learn.optimizer.name)]
    for name, equal in same:
        if not equal:
            raise ConfigError(f"{name} is part of what a run is; launch a new run to change it")
    done = max(checkpoint_numbers(home.listing("checkpoints")), default=-1)
    played = done + 1 in trace_ages(home.listing("traces"))
    if played and (changed.play, changed.engine) != (config.play, config.engine):
        raise ConfigError(
            f"iteration {done + 1} is partly played, so play and engine cannot change now; resume without those "
            "overrides, and with them after it"
        )


def _packages() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}
