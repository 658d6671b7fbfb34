"""What a benchmark says: figures, each beside the baseline that was measured in the same run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `ratio` is figure / baseline."""

    name: str
    figure: float
    baseline: float
    unit: str
    against: str
    """What the baseline is."""
    at_least: float | None = None
    """Goal for the ratio."""
    at_most: float | None = None
    """Goal for the ratio, where less is better."""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.figure / self.baseline if self.baseline else math.nan

    @property
    def goal(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return f"<= {self.at_most:g}" if self.at_most is not None else ""

    @property
    def met(self) -> bool | None:
        """Whether the ratio reaches its goal; None where there is none."""
        if self.at_least is not None:
            return self.ratio >= self.at_least
        return self.ratio <= self.at_most if self.at_most is not None else None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "figure": self.figure,
            "baseline": self.baseline,
            "unit": self.unit,
            "against": self.against,
            "ratio": self.ratio,
            "goal": self.goal,
            "met": self.met,
            "details": self.details,
        }


def shown(value: float) -> str:
    """A figure for people: no more digits than it is worth."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def table(rows: Sequence[Row]) -> Table:
    """All rows as one table."""
    out = Table(title="Benchmarks")
    for heading in ("", "figure", "baseline", "ratio", "goal", "met?"):
        out.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for row in rows:
        met = {None: "", True: "yes", False: "NO"}[row.met]
        baseline = f"{shown(row.baseline)} ({row.against})"
        out.add_row(row.name, f"{shown(row.figure)} {row.unit}", baseline, f"{row.ratio:.3f}", row.goal, met)
    return out
