"""Whether an iteration's units are all there, once each: a pure function of a listing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from selfplay.config import Config
from selfplay.doctor.findings import RESTORE, Finding
from selfplay.shards import shard_key, shard_path

REPLAY = f"{RESTORE}, or delete it: resume plays that unit again"


@dataclass(frozen=True, slots=True)
class Expected:
    """The units of one iteration."""

    searches: int
    unit: int

    @property
    def parts(self) -> int:
        return -(-self.searches // self.unit)

    def rows(self, part: int) -> int:
        """Of one part; the last one may be shorter."""
        return min(self.unit, self.searches - part * self.unit)


def expected_units(config: Config, pool: int | None) -> Expected:
    """`pool`: problems of the training split; None where unknown, then it is taken to be large enough."""
    wanted = config.play.problems
    return Expected(wanted if pool is None else min(wanted, pool), config.play.unit)


MOST_NAMED = 8
"""Iterations without shards that are named one by one."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is, and what it may have deleted."""

    finished: int
    """Last iteration that is done (has a checkpoint or a row of metrics)."""
    ahead: int
    """Iterations that play may have begun beyond it."""
    needed: int
    """First iteration whose traces a learning phase may still read (selfplay/retention.py)."""
    deletes: bool
    """Whether old traces are deleted at all (config `keep`)."""

    def may_lack(self, iteration: int) -> bool:
        """Whether retention may have deleted (part of) this iteration's traces."""
        return self.deletes and iteration < self.needed


def unit_faults(
    iterations: Mapping[int, list[Path]], expected: Mapping[int, Expected], progress: Progress
) -> Iterator[Finding]:
    """Missing shards, and those that cannot be. `iterations` lists the shards of each iteration."""
    kept = min((i for i in iterations if i > 0), default=0)
    lost = [
        iteration
        for iteration in range(1, progress.finished + 1)
        if iteration not in iterations and not (progress.may_lack(iteration) and iteration < max(kept, 1))
    ]
    if len(lost) > MOST_NAMED:
        yield Finding("units", "traces", f"has no shards of the finished iterations {_ranges(lost)}", RESTORE)
    for iteration in lost if len(lost) <= MOST_NAMED else ():
        yield Finding("units", folder_of(iteration), "has no shards although the iteration is finished", RESTORE)
    for iteration, shards in sorted(iterations.items()):
        folder = folder_of(iteration)
        if iteration > progress.finished + progress.ahead or iteration < 1:
            what = f"holds traces that the run cannot have played yet: it has finished iteration {progress.finished}"
            yield Finding("units", folder, what, "restore the checkpoints and metrics.jsonl that belong to it")
            continue
        parts = {shard_key(path)[1] for path in shards}
        count = expected[iteration].parts
        beyond = sorted(part for part in parts if part >= count)
        if beyond:
            what = f"has part {_ranges(beyond)}, and the config cuts an iteration into {count} units"
            yield Finding(
                "units", folder, what, "move it out of the run, or restore the config that it was played with"
            )
        missing = sorted(set(range(count)) - parts)
        if missing and iteration <= progress.finished and not progress.may_lack(iteration):
            what = f"lacks part {_ranges(missing)} of {count} although the iteration is finished"
            cure = f"{RESTORE}, or resume, which plays it again" if iteration >= progress.needed else RESTORE
            yield Finding("units", folder, what, cure)


def by_iteration(shards: Iterable[Path], run: Path) -> tuple[dict[int, list[Path]], list[Finding]]:
    """The shards of each iteration; what lies among them and is no unit by its name is a finding instead, whatever it
    holds."""
    iterations: dict[int, list[Path]] = {}
    others = []
    for path in shards:
        iteration, part = shard_key(path)
        if path == shard_path(run, iteration, part):
            iterations.setdefault(iteration, []).append(path)
        else:
            where = path.relative_to(run).as_posix()
            others.append(Finding("units", where, "is no name of a unit's shard", "move it out of the run"))
    return iterations, others


def folder_of(iteration: int) -> str:
    return f"traces/iteration={iteration:05d}"


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 -> "1-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
