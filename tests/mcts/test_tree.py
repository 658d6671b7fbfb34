"""Promises of the tree: what it stores, what it refuses, and that `check` finds what is broken."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mcts.tree import COLUMNS, ROOT, Tree
from mcts.types import Kind, Status, Step, Stop, Verdict


def step(text: str = "a ;", *tokens: int, value: float = 0.5) -> Step:
    ids = np.array(tokens or (1, 2), dtype=np.int32)
    return Step(text, ids, np.full(len(ids), -0.5, dtype=np.float32), Stop.DELIMITER, value)


@pytest.fixture
def tree() -> Tree:
    """Root - a - b, root - c."""
    tree = Tree(np.array([7, 8], dtype=np.int32), "q :")
    a = tree.add(ROOT, step("a ;", 1, 2), prior=0.5)
    tree.add(a, step("b ;", 3), prior=0.25)
    tree.add(ROOT, step("c ;", 4, 5), prior=0.5)
    return tree


def test_backup_counts_on_the_whole_path_and_nowhere_else(tree: Tree) -> None:
    tree.backup(2, 0.75)
    tree.backup(3, 0.25)
    assert tree.visits == [2, 1, 1, 1]
    assert tree.value_sum == [1.0, 0.75, 0.75, 0.25]
    assert tree.q(ROOT) == 0.5
    tree.check()


def test_mean_value_of_an_unvisited_node_is_unknown(tree: Tree) -> None:
    assert math.isnan(tree.q(1))


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_backup_refuses_values_outside_zero_and_one(tree: Tree, value: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        tree.backup(1, value)


def test_path_prefix_and_text_run_from_the_root(tree: Tree) -> None:
    assert tree.path(2) == [0, 1, 2]
    assert tree.prefix(2).tolist() == [7, 8, 1, 2, 3]
    assert tree.prefix(ROOT).tolist() == [7, 8]
    assert tree.text(2) == "a ; b ;"
    assert tree.tokens == 5


def test_terminal_nodes_have_no_children(tree: Tree) -> None:
    tree.close(2, Verdict(Status.CORRECT, 1.0), "yes")
    assert tree.reward[2] == 1.0
    assert tree.answer[2] == "yes"
    with pytest.raises(ValueError, match="terminal"):
        tree.add(2, step())
    with pytest.raises(ValueError, match="children"):
        tree.close(1, None)


@pytest.mark.parametrize("status", [Status.TIMEOUT, Status.ERROR])
def test_an_undecided_verdict_is_no_reward_of_zero(tree: Tree, status: Status) -> None:
    tree.close(2, Verdict(status, 0.0))
    assert math.isnan(tree.reward[2])


def test_flying_marks_the_path_and_is_undone(tree: Tree) -> None:
    tree.fly(2, 1)
    assert tree.in_flight == [1, 1, 1, 0]
    with pytest.raises(ValueError, match="in flight"):
        tree.check()
    tree.fly(2, -1)
    tree.check()


def test_columns_have_the_types_of_the_public_format(tree: Tree) -> None:
    arrays = tree.arrays()
    assert {name: array.dtype for name, array in arrays.items()} == {n: np.dtype(t) for n, t in COLUMNS.items()}
    assert arrays["parent"].tolist() == [-1, 0, 1, 0]
    assert tree.kind == [Kind.PROMPT, Kind.STEP, Kind.STEP, Kind.STEP]


@pytest.mark.parametrize(
    ("column", "node", "value", "message"),
    [
        ("parent", 2, 3, "parent, depth or step"),
        ("depth", 2, 5, "parent, depth or step"),
        ("visits", 2, 9, "fewer visits"),
        ("value_sum", 3, 9.0, "mean value"),
        ("draws", 1, 0, "never drawn"),
    ],
)
def test_check_names_what_is_broken(tree: Tree, column: str, node: int, value: float, message: str) -> None:
    getattr(tree, column)[node] = value
    with pytest.raises(ValueError, match=message):
        tree.check()
