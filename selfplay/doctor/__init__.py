"""Whether a run folder keeps every promise that a folder can show (DESIGN.md, section 6).

Reads everything, changes nothing; one record batch, a shard's ids and counts, or one checkpoint in memory at a time.
What a run deleted by its own config is no finding, nor is what a live or a dead driver has under way: `selfplay resume`
does that again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from selfplay.doctor.documents import read_documents
from selfplay.doctor.findings import Finding
from selfplay.doctor.sides import side_faults
from selfplay.doctor.traces import trace_faults
from selfplay.doctor.weights import checkpoint_faults

__all__ = ["Finding", "examine"]


def examine(run: Path, note: Callable[[str], None] = lambda _: None) -> Iterator[Finding]:
    """All findings, as they come up; `note` is told what is being looked at. Raises RunError where there is no run."""
    documents, found = read_documents(run)
    yield from found
    yield from trace_faults(documents, note)
    yield from side_faults(documents, note)
    yield from checkpoint_faults(documents, note)
