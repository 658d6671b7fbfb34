"""SearchResult <-> one row of the trace store (DESIGN.md, section 8).

A row is a plain dict with exactly the columns of the format and the values that pyarrow's `to_pylist` gives
back: numbers rounded to their width on disk, None for what was never computed, JSON text for `meta` and
`settings`. What `to_row` makes is therefore equal to what a reader reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from mcts.budget import Usage
from mcts.tree import Tree
from mcts.types import Ended, Problem, SearchResult, Status, Verdict
from selfplay.tree_rows import Row, clean, float32s, nodes_of, number, tree_of

T = TypeVar("T")

CHAT = "chat"
"""Key of `settings`: true where `prompt` holds chat messages as JSON; left out otherwise."""
ORACLE = "oracle"
"""Key of `settings`: true where gold was used to choose; left out otherwise."""


@dataclass(frozen=True, slots=True)
class TraceContext:
    """What a row says beyond its search."""

    config_hash: str
    """Hash of the settings that determine traces; nothing of the run, the machines or the number of workers."""
    task: str
    split: str
    iteration: int
    attempt: int = 0
    seed: int | None = None
    """The seed that goes into `trace_id`; None: the search's own."""
    group: str | None = None
    parent_trace: str | None = None
    value_version: int | None = None
    joiner: str = ""
    """What stands between two steps' texts in `solution`."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, so that equal values give equal text.

    Raises ValueError for what JSON cannot hold, NaN and infinity included.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta and settings of a trace must be plain JSON: {error}") from error
    return clean(text)


def trace_id(config_hash: str, seed: int, iteration: int, problem_id: str, attempt: int) -> str:
    """Id of a trace, 32 hex digits: the same search has the same id in every run with the same settings."""
    key = canonical_json([config_hash, seed, iteration, problem_id, attempt])
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def signed(seed: int) -> int:
    """An unsigned 64-bit seed as the int64 with the same bits."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def unsigned(seed: int) -> int:
    """The inverse of `signed`."""
    return seed % (1 << 64)


def to_row(result: SearchResult, context: TraceContext) -> Row:
    """The row of a finished search.

    `path` runs from node 0 to the chosen node, whether it won or not; where nothing was chosen it holds the moves
    played so far (empty where none were). `solution` is the text along `path` if the verdict is `correct`, else
    null. Raises ValueError where the search holds what the format cannot.
    """
    tree, problem, verdict = result.tree, result.problem, result.verdict
    settings = dict(result.settings)
    prompt = problem.prompt
    if not isinstance(prompt, str):
        prompt = canonical_json([dict(message) for message in prompt])
        settings[CHAT] = True
    if result.oracle:
        settings[ORACLE] = True
    path = tree.path(result.chosen) if result.chosen is not None else list(tree.played)
    won = verdict is not None and verdict.won
    seed = result.seed if context.seed is None else context.seed
    usage = result.usage
    return {
        "trace_id": trace_id(context.config_hash, seed, context.iteration, problem.id, context.attempt),
        "problem_id": problem.id,
        "task": context.task,
        "split": context.split,
        "prompt": clean(prompt),
        "reference": _clean(problem.reference),
        "meta": canonical_json(dict(problem.meta)),
        "iteration": context.iteration,
        "attempt": context.attempt,
        "group": context.group,
        "parent_trace": context.parent_trace,
        "policy_version": result.policy_version,
        "value_version": context.value_version,
        "seed": signed(result.seed),
        "strategy": result.strategy,
        "settings": canonical_json(settings),
        "ended": result.ended.value,
        "answer": _clean(result.answer),
        "verdict": verdict.status.value if verdict is not None else None,
        "reward": float32s([verdict.reward])[0] if verdict is not None else None,
        "error": _clean(result.error),
        "solution": clean(_text(tree, path, context.joiner)) if won else None,
        "path": path,
        "usage": {
            "sampled": usage.sampled,
            "discarded": usage.discarded,
            "prompt": usage.prompt,
            "cached": usage.cached,
            "scored": usage.scored,
            "calls": usage.calls,
            "uncounted_calls": usage.uncounted_calls,
            "uncounted_tokens": usage.uncounted_tokens,
        },
        "seconds": float(result.seconds),
        "nodes": nodes_of(tree),
    }


def _text(tree: Tree, path: Iterable[int], joiner: str) -> str:
    return joiner.join(step.text for node in path if (step := tree.steps[node]) is not None)


def _clean(text: str | None) -> str | None:
    return None if text is None else clean(text)


def _read(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise KeyError(f"column {name} was not read; add it to `columns`")
    return row[name]


class _Column(Generic[T]):
    """A column of the row as a typed, read-only attribute."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, trace: Trace, owner: type) -> T:
        value: T = _read(trace.row, self.name)
        return value


class Trace:
    """A row that was read. Attributes are the columns; where only some were read, the others raise KeyError."""

    trace_id = _Column[str]()
    problem_id = _Column[str]()
    task = _Column[str]()
    split = _Column[str]()
    prompt = _Column[str]()
    reference = _Column["str | None"]()
    iteration = _Column[int]()
    attempt = _Column[int]()
    group = _Column["str | None"]()
    parent_trace = _Column["str | None"]()
    policy_version = _Column[int]()
    value_version = _Column["int | None"]()
    strategy = _Column[str]()
    ended = _Column[str]()
    answer = _Column["str | None"]()
    verdict = _Column["str | None"]()
    reward = _Column["float | None"]()
    error = _Column["str | None"]()
    solution = _Column["str | None"]()
    path = _Column[list[int]]()
    seconds = _Column[float]()
    nodes = _Column[list[Row]]()

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.row = row

    def __repr__(self) -> str:
        return f"Trace({self.row.get('trace_id')}, {self.row.get('problem_id')}, {self.row.get('verdict')})"

    @property
    def won(self) -> bool:
        return self.verdict == Status.CORRECT.value

    @cached_property
    def meta(self) -> dict[str, Any]:
        return _json_object(_read(self.row, "meta"))

    @cached_property
    def settings(self) -> dict[str, Any]:
        return _json_object(_read(self.row, "settings"))

    @property
    def seed(self) -> int:
        """The search's unsigned 64-bit seed."""
        return unsigned(_read(self.row, "seed"))

    @cached_property
    def usage(self) -> Usage:
        return Usage(**{name: count for name, count in _read(self.row, "usage").items() if count is not None})

    @cached_property
    def tree(self) -> Tree:
        """The search tree, rebuilt at the first use (see `tree_of`)."""
        return tree_of(self.nodes)

    @property
    def problem(self) -> Problem:
        prompt = self.prompt
        messages = tuple(json.loads(prompt)) if self.settings.get(CHAT) else prompt
        return Problem(self.problem_id, messages, self.reference, self.meta)

    def to_result(self) -> SearchResult:
        """The search as the strategy returned it, within what the format holds (see `tree_of`); `to_row` with the
        same context makes the same row of it. `settings` keep the marks `chat` and `oracle`."""
        tree = self.tree
        chosen = self.path[-1] if self.path and tree.terminal[self.path[-1]] else None
        if chosen is None:
            tree.played = list(self.path)
        verdict = None
        if self.verdict is not None:
            verdict = Verdict(Status(self.verdict), number(self.reward), self.answer)
        return SearchResult(
            problem=self.problem,
            strategy=self.strategy,
            settings=self.settings,
            tree=tree,
            candidates=tuple(n for n in range(len(tree)) if tree.terminal[n] and tree.answer[n] is not None),
            chosen=chosen,
            answer=self.answer,
            verdict=verdict,
            usage=self.usage,
            seed=self.seed,
            policy_version=self.policy_version,
            ended=Ended(self.ended),
            oracle=bool(self.settings.get(ORACLE)),
            error=self.error,
            seconds=self.seconds,
        )


def _json_object(text: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(text)
    return value


def from_row(row: Mapping[str, Any]) -> Trace:
    """The trace of a row as read from a shard."""
    return Trace(row)
