"""Where a run stands, from its folder alone: it also works while the driver is dead, and on any machine that sees it.

What the heartbeat does not say is None and shown as "-". Counts of the running iteration come from its shards, of
which only the small columns are read (unverified: that is `selfplay doctor`'s work); those of finished iterations from
metrics.jsonl.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import ipc

from selfplay import checkpoint as checkpoints
from selfplay.config import load_config
from selfplay.heartbeat import BEAT_SECONDS, FILE, parse
from selfplay.run_folder import RunError, read_metrics
from selfplay.shards import list_shards
from selfplay.store import local_copy, no_run

SILENT_SECONDS = 10 * BEAT_SECONDS
"""Ten beats missed is more than load and the caches of a shared disk explain."""
SKEW_SECONDS = 1.0
"""Clocks that differ by less are not worth a word."""
SHOWN_EVENTS = 5


@dataclass(frozen=True, slots=True)
class Status:
    """What `selfplay status` knows; None: not known."""

    run: str
    id: str
    epoch: int
    state: str
    """running, ended, interrupted, failed, dead (stopped beating), silent (alive on this host, not beating) or
    unknown (no heartbeat, or one from a clock ahead of ours)."""
    says: str
    """The state in words, with what to do."""
    as_of: float | None
    """When the driver last beat, by its own clock, in seconds since 1970."""
    age_seconds: float | None
    """By this machine's clock; negative where that one is behind the driver's."""
    host: str | None
    pid: int | None
    phase: str | None
    iteration: int | None
    iterations: int
    done: int | None
    """Steps of the phase (units while it plays)."""
    total: int | None
    units: int
    """Committed units of the iteration."""
    units_total: int
    wins: int
    """Of the iteration so far."""
    searches: int
    wins_before: int
    """Of all finished iterations."""
    searches_before: int
    sampled_tokens: int
    """Of the iteration so far."""
    tokens_per_second: float | None
    """Of the play that goes on where the heartbeat says it, else of the last finished iteration."""
    workers_alive: int | None
    workers_wanted: int | None
    restarts: int | None
    restarts_left: int | None
    leases_lost: int | None
    failed_problems: int | None
    """Recorded as failed because they killed their workers."""
    staleness: float | None
    played_version: int | None
    """Policy version of the iteration's newest shard."""
    checkpoint: int | None
    """The newest one."""
    packages: dict[str, str]
    heldout: dict[str, Any] | None
    """Last held-out figure: iteration, pass1, low, high."""
    failures: list[str] = field(default_factory=list)
    """What failed lately, oldest first."""

    def data(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        where = f"{self.host or '-'}, pid {_dash(self.pid)}"
        progress = f" {self.done}/{self.total}" if self.total else ""
        workers = f"{_dash(self.workers_alive)} alive of {_dash(self.workers_wanted)} wanted"
        speed = _dash(self.tokens_per_second, ".0f")
        facts = [
            ("run", f"{self.run}  (id {self.id}, driver number {self.epoch})"),
            ("state", self.says),
            ("as of", f"{clock(self.as_of)}{_ago(self.age_seconds)}  ({where})"),
            ("iteration", f"{_dash(self.iteration)} of {self.iterations}, {self.phase or '-'}{progress}"),
            ("units", f"{self.units} of {self.units_total} committed in this iteration"),
            ("wins", f"{self.wins} of {self.searches} searches so far, {self.wins_before} of {self.searches_before} "
                     "in the iterations before"),
            ("tokens", f"{self.sampled_tokens} sampled in this iteration, {speed} per second"),
            ("workers", f"{workers}, {_dash(self.restarts)} restarts ({_dash(self.restarts_left)} left), "
                        f"{_dash(self.leases_lost)} leases lost, {_dash(self.failed_problems)} problems given up"),
            ("versions", f"played {_dash(self.played_version)}, checkpoint {_dash(self.checkpoint)}, staleness "
                         f"{_dash(self.staleness)}; " + ", ".join(f"{n} {v}" for n, v in self.packages.items())),
            ("held-out", _heldout(self.heldout)),
        ]  # fmt: skip
        shown = [f"{name:<10} {text}" for name, text in facts]
        failures = self.failures[-SHOWN_EVENTS:]
        return shown + [f"{'failed' if i == 0 else '':<10} {text}" for i, text in enumerate(failures)]


def _dash(value: float | int | None, form: str = "") -> str:
    return "-" if value is None else format(value, form)


def clock(seconds: float | None) -> str:
    """A time in UTC, to the second."""
    if seconds is None:
        return "-"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _ago(age: float | None) -> str:
    if age is None:
        return ""
    if age < -SKEW_SECONDS:
        return f", {-age:.0f} s ahead of this machine's clock"
    return f", {max(0.0, age):.0f} s ago"


def _heldout(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "-"
    interval = f" [{figure['low']:.1%}, {figure['high']:.1%}]" if figure["low"] is not None else ""
    return f"pass@1 {figure['pass1']:.1%}{interval} after iteration {figure['iteration']}"


def read_status(url: str | Path, *, now: float | None = None) -> Status:
    """Where the run in a folder or in object storage stands. Writes nothing there. Raises RunError where there is no
    run, or where its own documents are damaged, ConfigError for a damaged config."""
    run = local_copy(url, FILE, "metrics.jsonl")
    facts = read_run(run)
    config = load_config(run / "config.yaml")
    beat = read_heartbeat(run)
    rows = read_metrics(run)
    last = max((int(row["iteration"]) for row in rows), default=-1)
    iteration = beat.get("iteration")
    if not isinstance(iteration, int):
        iteration = max(0, last) if rows else None
    if iteration is not None:
        local_copy(url, f"traces/iteration={iteration:05d}")
    played = _played(run, iteration)
    searched = [row for row in rows if row.get("problems") and row["iteration"] != iteration]
    scored = [row for row in rows if row.get("heldout_pass1") is not None]
    speeds = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second") is not None]
    given = beat.get("workers")
    workers: dict[str, Any] = given if isinstance(given, dict) else {}
    newest = checkpoints.latest(run / "checkpoints")
    newest = -1 if newest is None else newest  # of a mirror it may be an older one
    now = time.time() if now is None else now
    as_of = _number(beat.get("time"))
    state, says = _state(str(url), beat, None if as_of is None else now - as_of, finished=last >= config.iterations)
    return Status(
        run=str(url),
        id=str(facts["id"]),
        epoch=int(facts["epoch"]),
        state=state,
        says=says,
        as_of=as_of,
        age_seconds=None if as_of is None else now - as_of,
        host=beat.get("host"),
        pid=beat.get("pid"),
        phase=beat.get("phase"),
        iteration=iteration,
        iterations=config.iterations,
        done=beat.get("done"),
        total=beat.get("total"),
        units=played.units,
        units_total=math.ceil(config.play.problems / config.play.unit) if iteration else 0,
        wins=played.wins,
        searches=played.searches,
        wins_before=sum(round((row.get("solved") or 0.0) * row["problems"]) for row in searched),
        searches_before=sum(row["problems"] for row in searched),
        sampled_tokens=played.sampled,
        tokens_per_second=_number(beat.get("tokens_per_second")) or (speeds[-1] if speeds else None),
        workers_alive=workers.get("alive"),
        workers_wanted=workers.get("wanted"),
        restarts=beat.get("restarts"),
        restarts_left=beat.get("restarts_left"),
        leases_lost=beat.get("leases_lost"),
        failed_problems=beat.get("failed_problems"),
        staleness=beat.get("staleness", rows[-1].get("staleness") if rows else None),
        played_version=played.version,
        checkpoint=max(newest, last) if max(newest, last) >= 0 else None,
        packages=dict(facts.get("packages") or {}),
        heldout={
            "iteration": scored[-1]["iteration"],
            "pass1": scored[-1]["heldout_pass1"],
            "low": scored[-1].get("heldout_low"),
            "high": scored[-1].get("heldout_high"),
        }
        if scored
        else None,
        failures=[_event(event) for event in beat.get("events") or []] + played.unreadable,
    )


def read_run(run: Path) -> dict[str, Any]:
    """run.json. Raises RunError where there is none or it lacks what every run has."""
    try:
        facts: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
        if not isinstance(facts["id"], str) or not isinstance(facts["epoch"], int):
            raise TypeError("id or epoch is of the wrong kind")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise no_run(run) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{run / 'run.json'} is damaged; restore it from a copy") from error
    return facts


def read_heartbeat(run: Path) -> dict[str, Any]:
    """heartbeat.json; empty before the first beat, and where a power cut tore it: no promise hangs on it."""
    try:
        return parse((run / FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _state(run: str, beat: dict[str, Any], age: float | None, *, finished: bool) -> tuple[str, str]:
    """The state and its sentence."""
    go_on = f"go on with: selfplay resume {run}"
    said = beat.get("state")
    at = clock(_number(beat.get("time")))
    if said == "ended" or (said is None and finished):
        return "ended", f"ended at {at}: every iteration is done"
    if said in ("interrupted", "failed"):
        why = beat.get("error") or beat.get("why")
        return said, f"{said} at {at}{f' ({why})' if why else ''}; {go_on}"
    if age is None:
        return "unknown", f"no heartbeat that can be read; if no driver runs, {go_on}"
    if age < -SKEW_SECONDS:
        return "unknown", (
            f"the heartbeat is {-age:.0f} s ahead of this machine's clock, so its age says nothing; set the clocks, or "
            f"look twice: a driver that lives counts on (beat {_dash(beat.get('beat'))})"
        )
    alive = _alive_here(beat)
    if alive is False:
        return "dead", f"driver dead since {at}; {go_on}"
    if age <= SILENT_SECONDS:
        return "running", "running"
    if alive:
        return "silent", (
            f"driver silent since {at}, but process {beat['pid']} lives on this host: it hangs or is paused; look at "
            f"it, end it, and {go_on}"
        )
    return "dead", f"driver dead since {at}; {go_on}"


def _alive_here(beat: dict[str, Any]) -> bool | None:
    """Whether the driver's process exists, where it ran on this host; None elsewhere."""
    pid = beat.get("pid")
    if beat.get("host") != socket.gethostname() or not isinstance(pid, int):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # someone else's process
    return True


def _event(event: Any) -> str:
    """One entry of the heartbeat's log in words, whatever its keys."""
    if not isinstance(event, dict):
        return str(event)
    rest = [str(value) for key, value in event.items() if key != "time" and value is not None]
    at = _number(event.get("time"))
    return " ".join([*([clock(at)] if at is not None else []), *rest])


@dataclass(slots=True)
class _Played:
    """What the shards of one iteration hold."""

    units: int = 0
    searches: int = 0
    wins: int = 0
    sampled: int = 0
    version: int | None = None
    unreadable: list[str] = field(default_factory=list)


def _played(run: Path, iteration: int | None) -> _Played:
    found = _Played()
    if iteration is None or not (run / "traces").is_dir():
        return found
    for shard in list_shards(run, first=iteration, last=iteration):
        try:
            table = small_columns(shard, ("verdict", "usage", "policy_version"))
        except (pa.ArrowException, OSError) as error:
            found.unreadable.append(
                f"{shard} cannot be read ({str(error).splitlines()[0]}); look with `selfplay doctor`"
            )
            continue
        found.units += 1
        found.searches += table.num_rows
        found.wins += table["verdict"].to_pylist().count("correct")
        found.sampled += sum(usage["sampled"] for usage in table["usage"].to_pylist())
        if table.num_rows:
            found.version = max(found.version or 0, table["policy_version"][0].as_py())
    return found


def small_columns(shard: Path, names: tuple[str, ...]) -> pa.Table:
    """Some columns of a shard; the others are not even decompressed. Verifies nothing. Raises ArrowException or
    OSError for a file that is no shard."""
    with pa.memory_map(str(shard)) as source:
        schema = ipc.open_file(source).schema
        fields = [schema.get_field_index(name) for name in names]
        if min(fields) < 0:
            raise pa.ArrowInvalid(f"lacks {' or '.join(names)}")
        return ipc.open_file(source, options=ipc.IpcReadOptions(included_fields=sorted(fields))).read_all()
