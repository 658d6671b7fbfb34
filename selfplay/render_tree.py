"""A search tree drawn for a terminal. Text of a model is hostile: control characters are shown, never sent."""

from __future__ import annotations

import unicodedata
from typing import Any, Final

from rich.text import Text
from rich.tree import Tree as Drawing

from mcts.tree import ROOT
from mcts.types import Status

STYLES: Final = {
    Status.CORRECT.value: "bold green",
    Status.WRONG.value: "red",
    Status.UNPARSABLE.value: "magenta",
    Status.TIMEOUT.value: "yellow",
    Status.ERROR.value: "yellow",
}
CHOSEN: Final = "*"
"""Marks the nodes of the chosen path, also where a terminal has no colours."""


def visible(text: str, width: int | None = None) -> str:
    """`text` on one line with every control, format and surrogate character written as an escape; cut to `width`
    characters where given."""
    shown = "".join(_escape(c) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)
    if width is not None and len(shown) > width:
        return shown[: width - 1] + "…"
    return shown


def visible_lines(text: str) -> str:
    """`visible`, but line breaks stay."""
    return "\n".join(visible(line) for line in text.split("\n"))


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def figure(value: float | None, digits: int = 2) -> str:
    """A number for a table; a dash where it was never computed."""
    return "-" if value is None else f"{value:.{digits}f}"


def node_q(node: dict[str, Any]) -> float | None:
    """Mean backed-up value; None before the first visit."""
    return node["value_sum"] / node["visits"] if node["visits"] else None


def node_label(node: dict[str, Any], *, chosen: bool, width: int | None = 80) -> Text:
    """One node: its text, then visits, prior, value of the head (raw) and of the search (q), draws, target and
    verdict as far as there are any."""
    label = Text()
    label.append(f"{CHOSEN} " if chosen else "  ", style="bold cyan")
    label.append(visible(node["text"].strip(), width) or "(empty)", style="bold" if chosen else "")
    figures = [f"visits {node['visits']}"]
    if node["parent"] >= 0:
        figures.append(f"prior {figure(node['prior'])}")
    figures += [f"raw {figure(node['raw_value'])}", f"q {figure(node_q(node))}"]
    if node["draws"] > 1:
        figures.append(f"draws {node['draws']}")
    if node["target"] is not None:
        figures.append(f"target {figure(node['target'])}")
    if node["kind"] not in ("prompt", "step"):
        figures.append(node["kind"])
    if node["stop"] == "length":
        figures.append("cut at length")
    label.append("  " + " · ".join(figures), style="dim")
    if node["verdict"] is not None:
        label.append(f"  {node['verdict']}", style=STYLES.get(node["verdict"], ""))
        if node["answer"] is not None:
            label.append(f" ({visible(node['answer'], 40)})", style="dim")
    elif node["terminal"]:
        label.append("  terminal", style="dim")
    return label


def draw_tree(nodes: list[dict[str, Any]], path: list[int], *, width: int | None = 80) -> Drawing:
    """The tree of a row's `nodes` with the nodes of `path` marked; step texts are cut to `width` characters."""
    chosen = set(path)
    drawings: list[Drawing] = []
    for number, node in enumerate(nodes):
        label = node_label(node, chosen=number in chosen, width=width)
        if number == ROOT:
            drawings.append(Drawing(label, guide_style="dim"))
        else:
            drawings.append(drawings[node["parent"]].add(label))
    return drawings[ROOT]
