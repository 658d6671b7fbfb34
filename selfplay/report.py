"""What a run shows while it works and when it ends: progress, the table, the curve."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from selfplay.loop import Event

PLAIN_SECONDS = 10.0
"""Between two plain progress lines of one phase, where there is no terminal."""


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def headline(row: dict[str, Any]) -> str:
    """One iteration in one line."""
    parts = [f"iteration {row['iteration']:>2}"]
    if row.get("heldout_pass1") is not None:
        parts.append(
            f"held-out pass@1 {share(row['heldout_pass1'])} [{share(row['heldout_low'])}, {share(row['heldout_high'])}]"
        )
    parts += [f"pass@{k.removeprefix('heldout_pass')} {share(v)}" for k, v in row.items() if is_pass_k(k)]
    if row.get("solved") is not None:
        parts.append(f"solved {share(row['solved'])}")
    if row.get("tokens_per_win") is not None:
        parts.append(f"{row['tokens_per_win']:.0f} tokens/win")
    return " · ".join(parts)


def is_pass_k(column: str) -> bool:
    return column.startswith("heldout_pass") and column != "heldout_pass1"


class Watch:
    """Shows events of the loop: bars on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=not sys.stdout.isatty())
        self._bars: Progress | None = None
        self._task: Any = None
        self._phase: tuple[str, int] | None = None
        self._spoke = 0.0

    def __enter__(self) -> Watch:
        if self.console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description:<24}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
                transient=True,
            )
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, event: Event) -> None:
        if event.phase == "iteration":
            assert event.facts is not None
            self.console.print(headline(event.facts), highlight=False)
            return
        note = " ".join(f"{k} {v:.3f}" for k, v in (event.facts or {}).items() if isinstance(v, float))
        what = f"iteration {event.iteration} {event.phase}"
        new = self._phase != (event.phase, event.iteration)
        self._phase = (event.phase, event.iteration)
        if self._bars is not None:
            if new:
                if self._task is not None:
                    self._bars.remove_task(self._task)
                self._task = self._bars.add_task(what, total=event.total or None, note=note)
            self._bars.update(self._task, completed=event.done, total=event.total or None, note=note)
        elif new or time.monotonic() - self._spoke > PLAIN_SECONDS:
            self._spoke = time.monotonic()
            count = f" {event.done}/{event.total}" if event.total else ""
            self.console.print(f"{what}{count} {note}".rstrip(), highlight=False)


class Line:
    """One line on stderr that says what goes on: overwritten on a terminal, printed now and then elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._spoke = time.monotonic()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, text: str) -> None:
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._spoke > PLAIN_SECONDS:
            self._spoke = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def final_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The table that a run ends with."""
    table = Table(title="held-out greedy pass@1, no search", title_justify="left")
    pass_k = next((k for row in rows for k in row if is_pass_k(k)), None)
    columns = ["iteration", "pass@1", "95% interval"]
    columns += [f"pass@{pass_k.removeprefix('heldout_pass')}"] if pass_k else []
    for column in [*columns, "solved", "tokens/win", "seconds"]:
        table.add_column(column, justify="right")
    for row in rows:
        interval = (
            f"{share(row['heldout_low'])} - {share(row['heldout_high'])}" if row.get("heldout_low") is not None else "-"
        )
        cells = [str(row["iteration"]), share(row.get("heldout_pass1")), interval]
        cells += [share(row.get(pass_k))] if pass_k else []
        per_win = row.get("tokens_per_win")
        cells += [share(row.get("solved")), "-" if per_win is None else f"{per_win:.0f}", f"{row['wall_seconds']:.0f}"]
        table.add_row(*cells)
    return table


def draw_curve(rows: Sequence[dict[str, Any]]) -> bytes:
    """The held-out curve as a PNG: pass@1 with its interval, pass@k beside it; empty where nothing was evaluated."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scored = [row for row in rows if row.get("heldout_pass1") is not None]
    x = [row["iteration"] for row in scored]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    axes.fill_between(x, [r["heldout_low"] for r in scored], [r["heldout_high"] for r in scored], alpha=0.2)
    axes.plot(x, [r["heldout_pass1"] for r in scored], marker="o", label="greedy pass@1 (95% Wilson)")
    for column in sorted({k for row in scored for k in row if is_pass_k(k)}):
        k = column.removeprefix("heldout_pass")
        axes.plot(x, [row.get(column) for row in scored], marker=".", linestyle="--", label=f"pass@{k}, temperature 1")
    axes.set(xlabel="iteration (0 = after warm-up)", ylabel="share of held-out problems", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    pyplot.close(figure)
    return image.getvalue()


class TensorBoard:
    """Writes each iteration's numbers to RUN/tensorboard."""

    def __init__(self, folder: Path, purge_from: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_from)

    def __call__(self, event: Event) -> None:
        if event.phase != "iteration" or event.facts is None:
            return
        for name, value in event.facts.items():
            if isinstance(value, int | float) and name != "iteration":
                self._writer.add_scalar(name, value, event.iteration)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
