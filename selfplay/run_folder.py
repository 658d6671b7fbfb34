"""The run folder on disk (DESIGN.md, section 7): who may write to it, what it says of itself, its metrics."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from selfplay.config import Config, ConfigError, load_config, parse_config

TIMING_COLUMNS = ("wall_seconds", "play_seconds", "learn_seconds", "evaluate_seconds", "tokens_per_second")
"""Columns of metrics.jsonl that may differ between a run and its repetition."""

PACKAGES = ("mcts-selfplay", "torch", "transformers", "ray", "numpy", "pyarrow")


class RunError(RuntimeError):
    """A run folder that cannot be used; the message is one sentence that says what to do."""


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` such that a reader sees the old or the new content, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class RunFolder:
    """One run on disk. Open it with `create` or `open`; `close` (or the end of the process) frees it.

    A lock held by the operating system keeps two drivers apart on one host; it dies with its process, so a killed
    run needs no cleaning up. `epoch` counts the drivers that have held the run.
    """

    def __init__(self, path: Path, config: Config, lock: IO[str], facts: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self._lock = lock
        self.facts = facts
        self._clean_pending()

    @classmethod
    def create(cls, path: Path, config: Config) -> RunFolder:
        """A new run. Raises RunError where the folder already holds one or cannot be written."""
        path = path.absolute()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot create run folder {path}: {error.strerror}; choose another --run-dir") from error
        lock = cls._hold(path)
        try:
            if (path / "run.json").exists():
                raise RunError(
                    f"{path} already holds a run; continue it with `selfplay resume {path}` or choose another --run-dir"
                )
            if any(entry.name != "lock" for entry in path.iterdir()):
                raise RunError(f"{path} is not empty and holds no run; choose another --run-dir")
            for name in ("checkpoints", "traces", "pending", "tensorboard"):
                (path / name).mkdir()
            write_atomically(path / "config.yaml", config.to_yaml())
            facts = {
                "id": uuid.uuid4().hex,
                "epoch": 1,
                "seed": config.seed,
                "created": time.time(),
                "packages": _packages(),
            }
            write_atomically(path / "run.json", json.dumps(facts, indent=1))
            return cls(path, config, lock, facts)
        except BaseException:
            lock.close()
            raise

    @classmethod
    def open(
        cls, path: Path, overrides: Sequence[str] = (), check: Callable[[Config], None] = lambda _: None
    ) -> RunFolder:
        """An existing run, to be continued. Overrides are kept as the run's new config; the old one stays beside
        it. `check` judges the new config before anything is written. Raises RunError where there is no run or another
        process holds it, ConfigError for a bad override."""
        path = path.absolute()
        if not (path / "run.json").exists():
            raise RunError(f"{path} holds no run (no run.json); give the folder that `selfplay launch` named")
        lock = cls._hold(path)
        try:
            try:
                facts = json.loads((path / "run.json").read_text(encoding="utf-8"))
                facts["epoch"] += 0
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(f"{path / 'run.json'} is damaged; restore it from a copy") from error
            config = load_config(path / "config.yaml")
            if overrides:
                changed = parse_config(config.to_yaml(), overrides, source="config")
                _refuse(changed, config, path)
                check(changed)
                if changed != config:
                    write_atomically(path / f"config.until-epoch-{facts['epoch']:03d}.yaml", config.to_yaml())
                    write_atomically(path / "config.yaml", changed.to_yaml())
                    config = changed
            facts["epoch"] += 1
            write_atomically(path / "run.json", json.dumps(facts, indent=1))
            return cls(path, config, lock, facts)
        except BaseException:
            lock.close()
            raise

    @staticmethod
    def _hold(path: Path) -> IO[str]:
        try:
            lock = open(path / "lock", "a", encoding="utf-8")  # noqa: SIM115 - held for the life of the run
        except OSError as error:
            raise RunError(f"cannot write to run folder {path}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise RunError(f"{path} is in use by another process; stop that one first") from error
        return lock

    def close(self) -> None:
        self._lock.close()

    def _clean_pending(self) -> None:
        """What an earlier driver's workers left unfinished or uncommitted is played again."""
        for leftover in (self.path / "pending").iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def heartbeat(self, **facts: Any) -> None:
        """Where the run stands, as of now."""
        write_atomically(self.path / "heartbeat.json", json.dumps({"time": time.time(), **facts}))

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl (replaced as a whole, so no line is ever half-written)."""
        return read_metrics(self.path)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add the row of one iteration. The file is replaced as a whole: it has one short line per iteration."""
        rows = [r for r in self.metrics() if r["iteration"] < row["iteration"]]
        lines = [json.dumps(r) for r in [*rows, row]]
        write_atomically(self.path / "metrics.jsonl", "\n".join(lines) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, oldest first; empty where there are none yet. Raises RunError."""
    file = path / "metrics.jsonl"
    if not file.exists():
        return []
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:  # it is replaced as a whole, so this is no run that was killed
        raise RunError(f"{file} is damaged ({error}); restore it from a copy") from error


def _refuse(changed: Config, config: Config, path: Path) -> None:
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
    done = max((int(p.name) for p in (path / "checkpoints").iterdir() if p.name.isdigit()), default=-1)
    played = any((path / "traces" / f"iteration={done + 1:05d}").glob("*.arrow"))
    if played and (changed.play, changed.engine) != (config.play, config.engine):
        raise ConfigError(
            f"iteration {done + 1} is partly played, so play and engine cannot change now; resume without those "
            "overrides, and with them after it"
        )


def _packages() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}
