"""Tree <-> the `nodes` of a trace row: a list of plain dicts, one per node (DESIGN.md, section 8).

Numbers are rounded to their width on disk and NaN is None, so the dicts equal what a reader reads.
"""

from __future__ import annotations

import math
from itertools import accumulate, chain
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from mcts.tree import ROOT, Tree
from mcts.types import Float32, Int32, Kind, Status, Step, Stop, Verdict

Row = dict[str, Any]
T = TypeVar("T")


def clean(text: str) -> str:
    """`text` with lone surrogates, which no UTF-8 can hold and a hostile model may send, as U+FFFD."""
    if text.isascii():
        return text
    return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)


def float32s(values: npt.ArrayLike) -> list[float | None]:
    """Values rounded to float32 as Python floats, NaN as None."""
    array = np.asarray(values, dtype=np.float32)
    numbers: list[float | None] = array.tolist()
    if np.isnan(array).any():
        return [None if x != x else x for x in numbers]
    return numbers


def _token_lists(tree: Tree) -> list[list[int]]:
    """Token ids per node, the prompt's first. One conversion for the whole tree: numpy calls per node are slow."""
    arrays = [tree.prompt_ids, *(step.token_ids for step in tree.steps if step is not None)]
    return _cut(np.concatenate(arrays).tolist(), [len(array) for array in arrays])


def _logprob_lists(values: list[npt.NDArray[np.float32] | None], lengths: list[int]) -> list[list[float | None] | None]:
    """Per node the log-probabilities of its tokens; None where there are none or all are NaN."""
    present = []
    for node, (array, length) in enumerate(zip(values, lengths, strict=True)):
        if array is not None:
            if len(array) != length:
                raise ValueError(f"node {node} has {length} tokens and {len(array)} log-probabilities")
            present.append(array)
    if not present:
        return [None] * len(values)
    flat = np.concatenate(present)
    cut = iter(_cut(float32s(flat), [len(array) for array in present]))
    lists = [None if array is None else next(cut) for array in values]
    if not np.isnan(flat).any():
        return lists
    return [None if floats and all(x is None for x in floats) else floats for floats in lists]


def _cut(flat: list[T], lengths: list[int]) -> list[list[T]]:
    """`flat` as consecutive lists of the given lengths."""
    starts = accumulate(lengths, initial=0)
    return [flat[start : start + length] for start, length in zip(starts, lengths, strict=False)]


def nodes_of(tree: Tree) -> list[Row]:
    """The nodes of a row, in order of creation. Raises ValueError where a step's columns differ in length."""
    prior, raw_value, reward = float32s(tree.prior), float32s(tree.raw_value), float32s(tree.reward)
    target = float32s(tree.target)
    steps = tree.steps
    token_ids = _token_lists(tree)
    lengths = [len(ids) for ids in token_ids]
    logprobs = _logprob_lists([None if s is None else s.logprobs for s in steps], lengths)
    behavior = _logprob_lists([None if s is None else s.behavior_logprobs for s in steps], lengths)
    rows: list[Row] = []
    for node, step in enumerate(steps):
        verdict, answer, context = tree.verdict[node], tree.answer[node], tree.context[node]
        rows.append(
            {
                "parent": tree.parent[node],
                "depth": tree.depth[node],
                "kind": tree.kind[node].value,
                "text": clean(tree.prompt_text if step is None else step.text),
                "token_ids": token_ids[node],
                "logprobs": logprobs[node],
                "behavior_logprobs": behavior[node],
                "stop": None if step is None else step.stop.value,
                "draws": tree.draws[node],
                "prior": prior[node],
                "visits": tree.visits[node],
                "value_sum": tree.value_sum[node],
                "raw_value": raw_value[node],
                "reward": reward[node],
                "verdict": None if verdict is None else verdict.status.value,
                "answer": None if answer is None else clean(answer),
                "terminal": tree.terminal[node],
                "target": target[node],
                "context": None if context is None else list(context),
            }
        )
    return rows


def tree_of(nodes: list[Row]) -> Tree:
    """The search tree of a row's `nodes`.

    `Step.value` is the node's `raw_value`, a verdict's `extracted` is the node's answer and its `why` is empty;
    `in_flight` is 0 and `played` is empty, for the format does not hold them. Raises ValueError where the nodes
    are no tree.
    """
    if not nodes or nodes[ROOT]["parent"] != -1:
        raise ValueError("a trace needs a first node with parent -1")
    token_ids = _arrays([row["token_ids"] for row in nodes], np.int32)
    logprobs = _arrays([row["logprobs"] for row in nodes], np.float32)
    behavior = _arrays([row["behavior_logprobs"] for row in nodes], np.float32)
    tree = Tree(cast(Int32, token_ids[ROOT]), nodes[ROOT]["text"])
    for node, row in enumerate(nodes):
        if node != ROOT:
            if not 0 <= row["parent"] < node:
                raise ValueError(f"node {node} has parent {row['parent']}, which must come before it")
            tree.add(
                row["parent"],
                _step(row, cast(Int32, token_ids[node]), logprobs[node], behavior[node]),
                prior=number(row["prior"]),
                kind=Kind(row["kind"]),
                draws=row["draws"],
            )
    for node, row in enumerate(nodes):
        tree.reward[node] = number(row["reward"])
        tree.terminal[node] = row["terminal"]
        tree.answer[node] = row["answer"]
        if row["verdict"] is not None:
            tree.verdict[node] = Verdict(Status(row["verdict"]), tree.reward[node], row["answer"])
        if row["context"] is not None:
            tree.context[node] = tuple(row["context"])
    tree.prior[ROOT] = number(nodes[ROOT]["prior"])
    tree.draws[ROOT] = nodes[ROOT]["draws"]
    tree.visits = [row["visits"] for row in nodes]
    tree.value_sum = [row["value_sum"] for row in nodes]
    tree.raw_value = [number(row["raw_value"]) for row in nodes]
    tree.target = [number(row["target"]) for row in nodes]
    return tree


def _arrays(lists: list[list[Any] | None], dtype: type[np.generic]) -> list[npt.NDArray[Any] | None]:
    """Each list as an array (views of one buffer); None within a list becomes NaN."""
    flat = np.array(list(chain.from_iterable(x for x in lists if x)), dtype=dtype)
    ends = accumulate(0 if x is None else len(x) for x in lists)
    return [None if x is None else flat[end - len(x) : end] for x, end in zip(lists, ends, strict=True)]


def _step(row: Row, token_ids: Int32, logprobs: Float32 | None, behavior: Float32 | None) -> Step:
    if logprobs is None:
        logprobs = np.full(len(token_ids), np.nan, dtype=np.float32)
    return Step(
        text=row["text"],
        token_ids=token_ids,
        logprobs=logprobs,
        stop=Stop(row["stop"]),
        value=number(row["raw_value"]),
        behavior_logprobs=behavior,
    )


def number(value: float | None) -> float:
    return math.nan if value is None else value
