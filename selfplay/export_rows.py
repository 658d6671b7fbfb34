"""What a trace gives to another trainer: the rows of each export format, from one search tree.

Whatever the format, `prompt` + `completion` (or the completions in a row) is text that the policy saw and drew: where
the task puts something between two steps (a space for whole-word tokenizers), it stands in front of each step. Nodes
that were conditioned on more than their ancestors (revisions, hints), and all below them, are left out: without that
context their text teaches something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from mcts.tree import NO_PARENT, ROOT, Tree
from mcts.types import Float32, Kind
from selfplay.items import ValueRule, value_labels, winners
from selfplay.traces import CHAT, Trace

Row = dict[str, Any]
Prompt = str | list[dict[str, str]]

VALUES: Final = ("verified", "search")
"""Where a node's value comes from. verified: mean reward of the judged chains at or below it, each counted as often as
it was drawn; unknown where there is none. search: the mean value that the search backed up there."""


@dataclass(frozen=True, slots=True)
class RowSettings:
    """How a tree is read."""

    gap: float = 0.5
    """Least difference in value between a chosen and a rejected sibling, above 0 and up to 1."""
    value: str = "verified"
    """One of VALUES."""


COLUMNS: Final = ("problem_id", "task", "prompt", "reference", "meta", "settings", "nodes")
"""Columns of the store that rows are made of."""


class TraceText:
    """The texts of one tree, as the policy saw and drew them."""

    def __init__(self, trace: Trace, joiner: str, decode: Callable[[list[int]], str] | None = None) -> None:
        """`decode`: token ids to text, special tokens kept; None where no chat prompt is wanted as text."""
        self.tree: Tree = trace.tree
        self._decode = decode
        self.chat = bool(trace.settings.get(CHAT))
        prompt = trace.problem.prompt
        self.prompt: Prompt = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
        # the chat template already ends where the answer starts, so a chat's first step needs nothing before it
        self._first = "" if self.chat else joiner
        self._joiner = joiner
        tree = self.tree
        self.usable = [True] * len(tree)
        for node in range(1, len(tree)):
            plain = tree.kind[node] in (Kind.STEP, Kind.ROLLOUT) and tree.context[node] is None
            self.usable[node] = plain and self.usable[tree.parent[node]]

    def step(self, node: int) -> str:
        """A step's text with what stands before it."""
        step = self.tree.steps[node]
        assert step is not None
        return (self._first if self.tree.parent[node] == ROOT else self._joiner) + step.text

    def steps(self, node: int) -> list[str]:
        """Texts of the steps from the prompt to `node`."""
        return [self.step(n) for n in self.tree.path(node) if n != ROOT]

    def flat_prompt(self) -> str:
        """The prompt as plain text; of a chat, what the template made of it, special tokens included."""
        if isinstance(self.prompt, str):
            return self.prompt
        if self._decode is None:
            raise ValueError("a chat prompt becomes text through the tokenizer that sent it")
        return self._decode(self.tree.prompt_ids.tolist())

    def said(self, text: str) -> str | list[dict[str, str]]:
        """A completion: text, or the assistant's message in a chat."""
        return [{"role": "assistant", "content": text}] if self.chat else text


def sft_rows(text: TraceText, settings: RowSettings) -> Iterator[Row]:  # noqa: ARG001 (one signature for all)
    """Every finished path that a check or verifier called correct."""
    for node in winners(text.tree):
        if text.usable[node]:
            yield {"prompt": text.prompt, "completion": text.said("".join(text.steps(node)))}


def preference_rows(text: TraceText, settings: RowSettings) -> Iterator[Row]:
    """At every node with two children of known value, the best against the worst, if `gap` or more lies between them.

    Text: the prompt runs up to the node, chosen and rejected are the two steps. Chat: the prompt is the messages, and
    chosen and rejected are the assistant's message up to and with the step, so that they share a beginning. Among
    equals the earlier child is taken.
    """
    tree = text.tree
    values = node_values(tree, settings.value)
    for node, children in enumerate(tree.children):
        known = [c for c in children if text.usable[c] and not math.isnan(values[c])]
        if len(known) < 2:
            continue
        best = max(known, key=lambda c: values[c])
        worst = min(known, key=lambda c: values[c])
        if float(values[best]) - float(values[worst]) < settings.gap or text.step(best) == text.step(worst):
            continue
        before = "".join(text.steps(node))
        if text.chat:
            pair = (text.said(before + text.step(best)), text.said(before + text.step(worst)))
            yield {"prompt": text.prompt, "chosen": pair[0], "rejected": pair[1]}
        else:
            assert isinstance(text.prompt, str)
            yield {"prompt": text.prompt + before, "chosen": text.step(best), "rejected": text.step(worst)}


def stepwise_rows(text: TraceText, settings: RowSettings) -> Iterator[Row]:  # noqa: ARG001
    """Every longest path whose steps can all be judged, a label per step: does a verified win lie at or below it?

    A step below which nothing finished with a verdict (timeouts and errors are none) cannot be judged and ends the
    path. Steps are stripped of white space at their ends: TRL puts its own separator between them.
    """
    tree = text.tree
    known = ~np.isnan(value_labels(tree, ValueRule.MAX))
    won = np.zeros(len(tree), dtype=np.bool_)
    for node in winners(tree):
        won[tree.path(node)] = True
    for path in _paths(text, known):
        steps = [text.step(n).strip() for n in path]
        yield {"prompt": text.flat_prompt(), "completions": steps, "labels": [bool(won[n]) for n in path]}


def prm_rows(text: TraceText, settings: RowSettings) -> Iterator[Row]:
    """Every longest path whose steps all have a value, with those soft values, float in [0, 1]."""
    values = node_values(text.tree, settings.value)
    for path in _paths(text, ~np.isnan(values)):
        yield {
            "prompt": text.flat_prompt(),
            "completions": [text.step(n) for n in path],
            "values": [float(values[n]) for n in path],
        }


def _paths(text: TraceText, known: Any) -> Iterator[list[int]]:
    """Paths without node 0, from the prompt down to where no child is both usable and known; the empty one left out."""
    tree = text.tree
    inside = [False] * len(tree)
    inside[ROOT] = True
    for node in range(1, len(tree)):
        inside[node] = bool(known[node]) and text.usable[node] and inside[tree.parent[node]]
    for node in range(1, len(tree)):
        if inside[node] and not any(inside[c] for c in tree.children[node]):
            yield tree.path(node)[1:]


def node_values(tree: Tree, rule: str) -> Float32:
    """Value of each node, float32 [N] in [0, 1], NaN where unknown; `rule` is one of VALUES."""
    if rule == "verified":
        return value_labels(tree, ValueRule.MEAN)
    return np.array([tree.q(n) if tree.visits[n] else math.nan for n in range(len(tree))], dtype=np.float32)


ROWS: Final[dict[str, Callable[[TraceText, RowSettings], Iterator[Row]]]] = {
    "sft": sft_rows,
    "preference": preference_rows,
    "stepwise": stepwise_rows,
    "prm": prm_rows,
}


def read_joiner(trace: Trace) -> str | None:
    """What the task puts between two steps, read off a won trace: its solution is the steps' texts so joined. None
    where the trace does not tell (not won, or won in one step)."""
    if trace.solution is None:
        return None
    texts = [node["text"] for n in trace.path if (node := trace.nodes[n])["parent"] != NO_PARENT]
    if len(texts) < 2:
        return None
    size, rest = divmod(len(trace.solution) - sum(map(len, texts)), len(texts) - 1)
    joiner = trace.solution[len(texts[0]) : len(texts[0]) + size]
    return joiner if not rest and joiner.join(texts) == trace.solution else None
