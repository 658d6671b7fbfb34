"""What a check reports: a finding, one line that names what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

RESTORE = "restore it from a copy"


@dataclass(frozen=True, slots=True)
class Finding:
    """One promise that the folder breaks."""

    check: str
    """Name of the check, such as `tokens` or `checkpoint`."""
    where: str
    """File or folder, relative to the run."""
    what: str
    cure: str

    @property
    def line(self) -> str:
        return f"{self.where}: {self.what}; {self.cure}"

    def data(self) -> dict[str, Any]:
        return asdict(self)


class Fault(NamedTuple):
    """Rows of a batch that break one promise."""

    check: str
    rows: list[int]
    """Their places in the batch, never empty."""
    what: str
    """Said of the first of them."""


class ShardFaults:
    """Faults of one shard's rows, gathered over its batches: per check how many rows, and what the first one says.
    So a shard that is wrong throughout gives one line per check."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, fault: Fault, trace_ids: list[str]) -> None:
        count, first = self._found.get(fault.check, (0, ""))
        self._found[fault.check] = (
            count + len(fault.rows),
            first or f"trace {trace_ids[fault.rows[0]][:12]} {fault.what}",
        )

    def findings(self, where: str, cure: str = f"do not train on it, {RESTORE}") -> Iterator[Finding]:
        for check, (count, first) in self._found.items():
            more = f" (and {count - 1} more rows)" if count > 1 else ""
            yield Finding(check, where, first + more, cure)
