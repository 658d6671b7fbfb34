"""The search tree as columns, one entry per node, in order of creation (parent < child).

Columns are plain Python lists while a search runs: a search touches single entries, where lists are several
times faster than numpy scalars. `Tree.arrays()` gives the typed arrays of the public format.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mcts.types import Int32, Kind, Status, Step, Verdict

ROOT = 0
NO_PARENT = -1
UNDECIDED = (Status.TIMEOUT, Status.ERROR)
"""Verdicts that say nothing about the answer."""

COLUMNS: dict[str, type[np.generic]] = {
    "parent": np.int32,
    "depth": np.int32,
    "prior": np.float32,
    "draws": np.int32,
    "visits": np.int32,
    "value_sum": np.float64,
    "raw_value": np.float32,
    "in_flight": np.int32,
    "reward": np.float32,
    "terminal": np.bool_,
    "target": np.float32,
}


class Tree:
    """N nodes; node 0 is the prompt. Values and rewards lie in [0, 1].

    A node's `visits` are its own evaluations plus its children's visits, and `value_sum` the sum of what those
    backed up. `prior`, `raw_value`, `reward` and `target` are NaN until known.
    """

    def __init__(self, prompt_ids: Int32, prompt_text: str = "") -> None:
        self.prompt_ids: Int32 = np.asarray(prompt_ids, dtype=np.int32)  # [P]
        self.prompt_text = prompt_text
        self.parent: list[int] = []  # [N] int32, NO_PARENT at the root
        self.depth: list[int] = []  # [N] int32, steps from the root
        self.prior: list[float] = []  # [N] float32, without noise
        self.draws: list[int] = []  # [N] int32, how often this step was drawn
        self.visits: list[int] = []  # [N] int32
        self.value_sum: list[float] = []  # [N] float64
        self.raw_value: list[float] = []  # [N] float32, value head at the step's last token
        self.in_flight: list[int] = []  # [N] int32, virtual loss: simulations under way below
        self.reward: list[float] = []  # [N] float32, of terminal nodes
        self.terminal: list[bool] = []  # [N]
        self.target: list[float] = []  # [N] float32, improved-policy probability among siblings
        self.kind: list[Kind] = []  # [N]
        self.verdict: list[Verdict | None] = []  # [N]
        self.answer: list[str | None] = []  # [N]
        self.context: list[tuple[int, ...] | None] = []  # [N] other nodes that a node was conditioned on
        self.steps: list[Step | None] = []  # [N], None at the root
        self.children: list[list[int]] = []  # [N] children in order of creation
        self.played: list[int] = []
        """Nodes committed move by move, root first; empty where nothing was committed."""
        self._append(NO_PARENT, 0, None, Kind.PROMPT, prior=1.0, draws=1)

    def __len__(self) -> int:
        return len(self.parent)

    def _append(self, parent: int, depth: int, step: Step | None, kind: Kind, *, prior: float, draws: int) -> int:
        node = len(self.parent)
        self.parent.append(parent)
        self.depth.append(depth)
        self.prior.append(prior)
        self.draws.append(draws)
        self.visits.append(0)
        self.value_sum.append(0.0)
        self.raw_value.append(step.value if step is not None else math.nan)
        self.in_flight.append(0)
        self.reward.append(math.nan)
        self.terminal.append(False)
        self.target.append(math.nan)
        self.kind.append(kind)
        self.verdict.append(None)
        self.answer.append(None)
        self.context.append(None)
        self.steps.append(step)
        self.children.append([])
        return node

    def add(self, parent: int, step: Step, *, prior: float = math.nan, kind: Kind = Kind.STEP, draws: int = 1) -> int:
        """A new child of `parent`; returns its index. Merging of repeated steps is the caller's affair."""
        if self.terminal[parent]:
            raise ValueError(f"node {parent} is terminal and cannot have children")
        node = self._append(parent, self.depth[parent] + 1, step, kind, prior=prior, draws=draws)
        self.children[parent].append(node)
        return node

    def close(self, node: int, verdict: Verdict | None, answer: str | None = None) -> None:
        """Make `node` terminal with its verdict. The reward is the verdict's; it stays NaN without a verdict
        and after a timeout or an error, which say nothing about the answer."""
        if self.children[node]:
            raise ValueError(f"node {node} has children and cannot become terminal")
        self.terminal[node] = True
        self.verdict[node] = verdict
        self.answer[node] = answer
        self.reward[node] = math.nan if verdict is None or verdict.status in UNDECIDED else verdict.reward

    def backup(self, node: int, value: float) -> None:
        """Count one evaluation of `node` and add `value` to it and to every ancestor, the root included."""
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"a value must lie in [0, 1], not {value}")
        while node != NO_PARENT:
            self.visits[node] += 1
            self.value_sum[node] += value
            node = self.parent[node]

    def fly(self, node: int, change: int) -> None:
        """Add `change` to `in_flight` of `node` and every ancestor (virtual loss)."""
        while node != NO_PARENT:
            self.in_flight[node] += change
            node = self.parent[node]

    def q(self, node: int) -> float:
        """Mean backed-up value, NaN before the first visit."""
        visits = self.visits[node]
        return self.value_sum[node] / visits if visits else math.nan

    def path(self, node: int) -> list[int]:
        """Nodes from the root to `node`, both included."""
        nodes = []
        while node != NO_PARENT:
            nodes.append(node)
            node = self.parent[node]
        return nodes[::-1]

    def prefix(self, node: int) -> Int32:
        """Token ids from the first prompt token to the last of `node`, int32 [P]."""
        parts = [step.token_ids for n in self.path(node) if (step := self.steps[n]) is not None]
        return np.concatenate([self.prompt_ids, *parts], dtype=np.int32) if parts else self.prompt_ids

    def text(self, node: int, separator: str = " ") -> str:
        """The texts of the steps from the root to `node`, prompt left out."""
        return separator.join(step.text for n in self.path(node) if (step := self.steps[n]) is not None)

    @property
    def tokens(self) -> int:
        """Tokens of all steps in the tree, each once."""
        return sum(len(step.token_ids) for step in self.steps if step is not None)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The columns of `COLUMNS` as numpy arrays [N]."""
        return {name: np.asarray(getattr(self, name), dtype=dtype) for name, dtype in COLUMNS.items()}

    def check(self) -> None:
        """Raise ValueError naming the first broken invariant."""
        for node in range(len(self)):
            parent = self.parent[node]
            if node == ROOT:
                ok = parent == NO_PARENT and self.depth[node] == 0 and self.steps[node] is None
            else:
                ok = 0 <= parent < node and self.depth[node] == self.depth[parent] + 1
                ok = ok and node in self.children[parent] and self.steps[node] is not None
            if not ok:
                raise ValueError(f"node {node}: parent, depth or step is wrong")
            below = self.children[node]
            if self.terminal[node] and below:
                raise ValueError(f"node {node} is terminal and has children")
            if self.visits[node] < sum(self.visits[c] for c in below):
                raise ValueError(f"node {node} has fewer visits than its children together")
            if self.value_sum[node] < -1e-9 or self.value_sum[node] > self.visits[node] + 1e-9:
                raise ValueError(f"node {node}: mean value outside [0, 1]")
            if self.in_flight[node] != 0:
                raise ValueError(f"node {node} still has {self.in_flight[node]} simulations in flight")
            if node != ROOT and self.draws[node] < 1:
                raise ValueError(f"node {node} was never drawn")
