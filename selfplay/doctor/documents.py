"""The run's own documents: run.json, every version of the config, metrics.jsonl, what is pending."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfplay import checkpoint as checkpoints
from selfplay import heartbeat
from selfplay.config import Config, ConfigError, load_config
from selfplay.doctor.findings import RESTORE, Finding
from selfplay.loop import last_good
from selfplay.run_folder import RunError
from selfplay.status import read_run
from selfplay.store import no_run

_OWNED = re.compile(r"(epoch|building)-(\d{5,})")
NEEDED = ("iteration", "policy_version", "wall_seconds")
"""Columns of every row of metrics.jsonl."""
PLAYED = ("problems", "solved", "sampled_tokens", "staleness")
"""Columns of every row but that of iteration 0."""


@dataclass(slots=True)
class Documents:
    """What could be read of them; what could not is None or left out, and is a finding."""

    run: Path
    facts: dict[str, Any] | None = None
    config: Config | None = None
    configs: list[Config] = field(default_factory=list)
    """The config and all earlier versions of it."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """Rows that are whole, in the order of the file."""
    ended: bool = False
    """Whether the last driver said that it came to the end."""

    @property
    def pool(self) -> int | None:
        """Problems of the training split, by the newest checkpoint that can be read; None where there is none."""
        folder = self.run / "checkpoints"
        for number in reversed(checkpoints.existing(folder)):
            try:
                return int(checkpoints.read_state(checkpoints.path_of(folder, number))["rates"]["n"])
            except (checkpoints.CheckpointError, KeyError, TypeError, ValueError):
                continue  # said where the checkpoints are looked at
        return None

    @property
    def id(self) -> str | None:
        return None if self.facts is None else str(self.facts["id"])

    @property
    def finished(self) -> int:
        """Last iteration with a checkpoint or a row of metrics; -1 before the warm-up is done."""
        newest = checkpoints.latest(self.run / "checkpoints")
        return max([-1 if newest is None else newest, *(int(row["iteration"]) for row in self.metrics)])

    def rolled_back(self, iteration: int) -> bool:
        """Whether the weights went back before or in `iteration`, as metrics.jsonl says or its scores demand."""
        said = any(row["iteration"] == iteration and row.get("rolled_back") for row in self.metrics)
        return said or self.good(iteration) != iteration - 1

    def good(self, iteration: int) -> int:
        """The checkpoint that `iteration` goes on from, by all scores before it."""
        before = [row for row in self.metrics if row["iteration"] < iteration]
        return last_good(before, default=iteration - 1)


def read_documents(run: Path) -> tuple[Documents, list[Finding]]:
    """The documents and what is wrong with them. Raises RunError where `run` is no folder of a run at all."""
    documents = Documents(run)
    findings: list[Finding] = []
    if not any((run / name).exists() for name in ("run.json", "config.yaml", "metrics.jsonl", "traces", "checkpoints")):
        raise no_run(run)
    try:
        documents.facts = read_run(run)
    except RunError as error:
        findings.append(Finding("run.json", "run.json", _what(error), RESTORE))
    for path in sorted({run / "config.yaml", *run.glob("config*.yaml")}):
        try:
            version = load_config(path)
        except ConfigError as error:
            findings.append(Finding("config", path.name, _what(error), RESTORE))
            continue
        documents.configs.append(version)
        if path.name == "config.yaml":
            documents.config = version
    facts, config = documents.facts, documents.config
    if facts is not None and config is not None and facts.get("seed") not in (None, config.seed):
        what = f"says seed {config.seed}, and run.json {facts['seed']}"
        findings.append(Finding("config", "config.yaml", what, RESTORE))
    documents.ended = _has_ended(run)  # before the rows: a driver writes them all, and then says so
    findings += list(_read_metrics(documents)) or missing_rows(documents)
    findings += pending_faults(run, None if facts is None else facts["epoch"])
    return documents, findings


def _what(error: Exception) -> str:
    """The error's text without its last clause, the cure."""
    return " ".join(str(error).rpartition("; ")[0].split()) or " ".join(str(error).split())


def _read_metrics(documents: Documents) -> Iterator[Finding]:
    """Fill `documents.metrics`; yield what is wrong line by line."""
    file = documents.run / "metrics.jsonl"
    if not file.exists():
        return
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        yield Finding("metrics", file.name, f"cannot be read ({error})", RESTORE)
        return
    if text and not text.endswith("\n"):
        yield Finding("metrics", file.name, "ends in the middle of a line", RESTORE)
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{file.name} line {number}"
        try:
            row = json.loads(line)
            iteration = row["iteration"]
            if not isinstance(iteration, int):
                raise TypeError("its iteration is no whole number")
        except (ValueError, TypeError, KeyError) as error:
            yield Finding("metrics", where, f"is no row of metrics ({error})", RESTORE)
            continue
        missing = [name for name in (*NEEDED, *(PLAYED if iteration else ())) if name not in row]
        if missing:
            yield Finding("metrics", where, f"lacks {', '.join(missing)}", RESTORE)
        before = documents.metrics[-1]["iteration"] if documents.metrics else -1
        if iteration != before + 1:
            yield Finding("metrics", where, f"is of iteration {iteration} and follows that of {before}", RESTORE)
        if row.get("policy_version", iteration) != iteration:
            what = f"says version {row['policy_version']} came out of iteration {iteration}"
            yield Finding("metrics", where, what, RESTORE)
        documents.metrics.append(row)


def missing_rows(documents: Documents) -> Iterator[Finding]:
    """Rows that are missing at the end: of checkpoints whose evaluation no driver can still owe."""
    there = checkpoints.existing(documents.run / "checkpoints")
    last = documents.metrics[-1]["iteration"] if documents.metrics else -1
    owed = 0 if documents.ended else 1 + max((known.play.max_staleness for known in documents.configs), default=0)
    if not there or there[-1] - last <= owed:
        return
    what = "has no row" if last < 0 else f"ends at iteration {last}"
    again = set(range(last + 1, there[-1])) <= set(there)  # resume evaluates every checkpoint without a row
    cure = f"{RESTORE}, or resume, which evaluates what is missing again" if again else RESTORE
    yield Finding("metrics", "metrics.jsonl", f"{what} although there is checkpoint {there[-1]}", cure)


def _has_ended(run: Path) -> bool:
    try:
        return heartbeat.parse((run / heartbeat.FILE).read_text(encoding="utf-8")).get("state") == "ended"
    except (OSError, UnicodeDecodeError):
        return False


def pending_faults(run: Path, epoch: int | None) -> Iterator[Finding]:
    """Leftovers of drivers that no longer hold the run. What the current one has under way is no fault: the next
    driver plays it again."""
    if epoch is None or not (run / "pending").is_dir():
        return
    for entry in sorted((run / "pending").iterdir()):
        owned = _OWNED.fullmatch(entry.name)
        if owned is not None and int(owned[2]) != epoch:
            what = f"is left by a driver that lost the run (epoch {int(owned[2])}, now {epoch})"
            yield Finding("pending", f"pending/{entry.name}", what, "delete it, nothing in it was committed")
