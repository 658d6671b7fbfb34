"""Tables and panels of traces for a terminal. Model text goes through `visible`, never through markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from rich import box
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from selfplay.render_tree import STYLES, figure, node_label, visible, visible_lines

SHORT_ID: Final = 10
"""Characters of a trace id in a table; any unique prefix finds the trace."""
VALUE_FIGURES: Final = ("valued nodes", "Brier", "ECE", "AUC")


def _table(title: str, numbers: Iterable[str], texts: Iterable[str] = ()) -> Table:
    """A table with columns of numbers, never shortened, then columns of text, which give way on a narrow terminal."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, collapse_padding=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in texts:
        table.add_column(heading, overflow="ellipsis")
    return table


def _share(part: float | None) -> str:
    return "-" if part is None else f"{100 * part:.1f}%"


def play_table(summary: Sequence[dict[str, Any]]) -> Table:
    """What was played and won, per iteration. Where calls to a server never said what they drew, `uncounted` is the
    most that it can have been; it comes on top of `tokens`."""
    names = ["iter", "policy", "searches", "problems", "solved", "wins", "tokens", "tokens/win"]
    uncounted = any(row["uncounted_calls"] for row in summary)
    table = _table("Play", [*names, "uncounted"] if uncounted else names)
    for row in summary:
        table.add_row(
            str(row["iteration"]),
            ",".join(map(str, row["policy_versions"])),
            str(row["searches"]),
            str(row["problems"]),
            str(row["solved"]),
            str(row["wins"]),
            str(row["sampled_tokens"]),
            figure(row["tokens_per_win"], 0),
            *([f"≤ {row['uncounted_tokens']}"] if uncounted else []),
        )
    return table


def tree_table(summary: Sequence[dict[str, Any]]) -> Table:
    """The shape of the trees and what became of the searches, per iteration. Nodes and depth are means per tree,
    branching is children per node that has any, repeats the share of draws that found a known step."""
    table = _table("Trees", ["iter", "nodes", "depth", "branching", "repeats"], ["verdicts"])
    for row in summary:
        table.add_row(
            str(row["iteration"]),
            figure(row["nodes"], 1),
            figure(row["depth"], 1),
            figure(row["branching"]),
            _share(row["repeat_draws"]),
            ", ".join(f"{name} {count}" for name, count in row["verdicts"].items()),
        )
    return table


def value_table(summary: Sequence[dict[str, Any]]) -> Table:
    """How well the value foretold the outcome below a node, per iteration."""
    table = _table("Value", ["iter", *VALUE_FIGURES], ["AUC by depth"])
    for row in summary:
        table.add_row(str(row["iteration"]), *_value_cells(row["value"]))
    return table


def newer_table(summary: Sequence[dict[str, Any]]) -> Table:
    """The same for the values that newer weights give the stored trees, of iterations that were scored again."""
    table = _table("Value by newer weights", ["iter", "policy", "searches", *VALUE_FIGURES], ["AUC by depth"])
    for row in summary:
        if (newer := row["newer"]) is not None:
            versions = ",".join(map(str, newer["versions"]))
            table.add_row(str(row["iteration"]), versions, str(newer["searches"]), *_value_cells(newer["value"]))
    return table


def _value_cells(value: dict[str, Any]) -> list[str]:
    depths = ((depth, auc) for depth, auc in value["auc_by_depth"].items() if auc is not None)
    return [
        str(value["nodes"]),
        *(figure(value[name], 3) for name in ("brier", "ece", "auc")),
        ", ".join(f"{depth}: {figure(auc)}" for depth, auc in depths) or "-",
    ]


def trace_table(traces: Sequence[dict[str, Any]], total: int) -> Table:
    """The list of traces; `total` is how many there are to list."""
    table = _table(
        f"Traces, {len(traces)} of {total}",
        ["trace", "iter", "sampled", "nodes", "depth", "verdict"],
        ["answer", "problem", "prompt"],
    )
    for row in traces:
        table.add_row(
            row["trace_id"][:SHORT_ID],
            str(row["iteration"]),
            str(row["sampled"]),
            str(row["nodes"]),
            str(row["depth"]),
            _verdict(row["verdict"]),
            _cell(row["answer"] if row["answer"] is not None else "-"),
            _cell(row["problem_id"]),
            _cell(row["prompt"]),
        )
    return table


def _cell(text: str) -> Text:
    """Model text on one line; the table shortens it."""
    return Text(visible(text, 60), no_wrap=True, overflow="ellipsis")


def _verdict(status: str | None) -> Text:
    return Text("-") if status is None else Text(status, style=STYLES.get(status, ""))


def _facts(trace: dict[str, Any]) -> Table:
    """What a trace says of itself, one fact per line."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    usage = ", ".join(f"{name} {count}" for name, count in trace["usage"].items() if count is not None)
    lines = [
        ("prompt", visible_lines(trace["prompt"])),
        ("reference", trace["reference"]),
        ("answer", trace["answer"]),
        ("problem", f"{trace['problem_id']} ({trace['task']}, {trace['split']})"),
        ("played", f"iteration {trace['iteration']}, attempt {trace['attempt']}, policy {trace['policy_version']}"),
        ("strategy", trace["strategy"]),
        ("settings", ", ".join(f"{name} {value}" for name, value in trace["settings"].items())),
        ("ended", trace["ended"]),
        ("error", trace["error"]),
        ("tokens", usage),
        ("seed", str(trace["seed"])),
    ]
    for name, value in lines:
        if value is not None:
            facts.add_row(name, Text(visible_lines(value)))
    facts.add_row("verdict", _verdict(trace["verdict"]))
    return facts


def trace_panel(trace: dict[str, Any]) -> Panel:
    """Everything of a trace but its tree; `trace` is what `inspect.readable` gives."""
    return Panel(_facts(trace), title=f"trace {trace['trace_id']}", title_align="left")


def sample_panel(trace: dict[str, Any]) -> Panel:
    """A trace with each step of its path in full, one below the other."""
    path = [trace["nodes"][node] for node in trace["path"]]
    steps = [node_label(node, chosen=False, width=None) for node in path if node["parent"] >= 0]
    body = Group(_facts(trace), Text(), *steps)
    return Panel(body, title=f"trace {trace['trace_id']}", title_align="left")
