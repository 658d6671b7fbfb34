"""The rows of the decode batch: what each one is doing, as numpy vectors over rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mcts.engines.kv import Prefix, PrefixCache
from mcts.engines.sampling import Draws, Removed, UInt64
from mcts.types import MIN_UNSEEN, Drawn, Float32, Int32, Request, Step, Stop

RUNNING, DELIMITER, LENGTH, EOS, FED = range(5)
"""Why the token that a row forwards next is its last (EOS is never forwarded; FED: a prefix was recomputed)."""
STOPS = {DELIMITER: Stop.DELIMITER, LENGTH: Stop.LENGTH, EOS: Stop.EOS}

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(eq=False, slots=True)
class Search:
    """One open search."""

    cache: PrefixCache
    requests: dict[int, Active] = field(default_factory=dict)
    feeds: dict[bytes, Feed] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Active:
    """One request under way."""

    request: Request
    search: Search
    key: bytes
    """Its prefix as int32 bytes."""
    cost: int
    """Worst case in tokens, counted in the search's `pending`."""
    limit: int
    """Longest step, in tokens, after the context's cap."""
    steps: list[Step | None]
    left: int
    node: Prefix | None = None
    path: Int32 | None = None  # [P] slots of the prefix
    prompt: int = 0
    """Prefix tokens forwarded for it."""
    first: Draws | None = None
    """First token of every sample, [n]."""
    keys: UInt64 | None = None  # [n] streams of its samples


@dataclass(eq=False, slots=True)
class Feed:
    """A prefix to be recomputed token by token, and the requests that wait for it."""

    search: Search
    tokens: Int32  # [P]
    key: bytes
    parent: Prefix | None
    waiting: list[Active]

    @property
    def start(self) -> int:
        """Tokens that are cached already."""
        return self.parent.length if self.parent is not None else 0


class Rows:
    """State of R rows. A row is occupied while it has a job, and live while it takes part in decoding (a row whose
    prompt is still being prefilled in chunks is occupied and not live)."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.jobs: list[Active | Feed | None] = [None] * count
        self.excluded: dict[int, list[Drawn]] = {}
        """Per row that has any: the excluded steps that begin with the tokens it drew."""
        self.occupied: Bool = np.zeros(count, dtype=bool)
        self.live: Bool = np.zeros(count, dtype=bool)
        self.chunk: Int64 = np.full(count, -1)  # next prompt position to prefill in chunks; -1: none
        self.sample: Int64 = np.zeros(count, dtype=np.int64)
        self.token: Int64 = np.zeros(count, dtype=np.int64)  # the token forwarded next
        self.pos: Int64 = np.zeros(count, dtype=np.int64)  # its position
        self.base: Int64 = np.zeros(count, dtype=np.int64)  # where its own tokens start
        self.known: Int64 = np.zeros(count, dtype=np.int64)  # positions below are given, not drawn
        self.limit: Int64 = np.zeros(count, dtype=np.int64)  # a step ends before this position
        self.stop: npt.NDArray[np.int8] = np.zeros(count, dtype=np.int8)
        self.keys: UInt64 = np.zeros(count, dtype=np.uint64)
        self.temperature: Float32 = np.ones(count, dtype=np.float32)
        self.top_p: Float32 = np.ones(count, dtype=np.float32)
        self.tokens: Int32 = np.zeros((count, 0), dtype=np.int32)  # [R, C] by position; own tokens and given ones
        self.logprobs: Float32 = np.zeros((count, 0), dtype=np.float32)  # [R, C]
        self.behavior: Float32 = np.zeros((count, 0), dtype=np.float32)  # [R, C]
        self._vectors = [a for a in vars(self).values() if isinstance(a, np.ndarray) and a.ndim == 1]

    def reserve(self, length: int) -> None:
        """Let rows hold sequences of `length` tokens."""
        have = self.tokens.shape[1]
        if length > have:
            pad = ((0, 0), (0, length + length // 2 - have))
            self.tokens = np.pad(self.tokens, pad)
            self.logprobs = np.pad(self.logprobs, pad)
            self.behavior = np.pad(self.behavior, pad)

    def free(self, rows: Int64) -> None:
        """Forget the jobs of `rows` [m]; plain sampling settings keep the fast path open."""
        for row in rows.tolist():
            self.jobs[row] = None
            self.excluded.pop(row, None)
        self.occupied[rows] = False
        self.live[rows] = False
        self.chunk[rows] = -1
        self.temperature[rows] = 1.0
        self.top_p[rows] = 1.0
        self.pos[rows] = 0
        self.base[rows] = 0
        self.token[rows] = 0

    def move(self, source: int, target: int) -> None:
        """Move a job to a free row."""
        self.jobs[target] = self.jobs[source]
        if source in self.excluded:
            self.excluded[target] = self.excluded[source]
        for vector in self._vectors:
            vector[target] = vector[source]
        for table in (self.tokens, self.logprobs, self.behavior):
            table[target] = table[source]
        self.free(np.array([source]))

    def seat(self, row: int, active: Active, i: int, stop: int) -> None:
        """Give a row sample `i` of a request whose first token is drawn."""
        request, first = active.request, active.first
        assert first is not None
        assert active.keys is not None
        p = len(request.prefix)
        self.jobs[row] = active
        self.occupied[row] = self.live[row] = True
        self.sample[row] = i
        self.token[row] = self.tokens[row, p] = first.tokens[i]
        self.logprobs[row, p] = first.logprobs[i]
        self.behavior[row, p] = first.behavior[i]
        self.pos[row] = self.base[row] = p
        self.known[row] = 0
        self.limit[row] = p + active.limit
        self.stop[row] = stop
        self.keys[row] = active.keys[i]
        self.temperature[row] = request.temperature
        self.top_p[row] = request.top_p
        if request.exclude:
            self._exclude(row, request.exclude, 0, int(first.tokens[i]))

    def _exclude(self, row: int, steps: Iterable[Drawn], at: int, token: int) -> None:
        """Keep of the excluded steps those that have `token` at place `at` and go on after it."""
        kept = [d for d in steps if d.token_ids[at] == token and len(d.token_ids) > at + 1]
        if kept:
            self.excluded[row] = kept
        else:
            self.excluded.pop(row, None)

    def drew(self, rows: Int64, tokens: Int64) -> None:
        """Note the tokens drawn by `rows` at their positions `pos`, for those that have excluded steps."""
        if self.excluded:
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                steps = self.excluded.get(row)
                if steps is not None:
                    self._exclude(row, steps, int(self.pos[row] - self.base[row]), token)

    def removed(self, rows: Int64) -> Removed | None:
        """What the excluded steps take away from the next token of `rows`, which is at their positions `pos`."""
        if not self.excluded:
            return None
        held = ((row, self.excluded[row]) for row in rows.tolist() if row in self.excluded)
        return take_away((row, steps, int(self.pos[row] - self.base[row])) for row, steps in held)

    def seat_feed(self, row: int, feed: Feed, chunked: int) -> None:
        """Give a row a prefix to recompute; its first `chunked` tokens come by prefill."""
        start, length = max(feed.start, chunked), len(feed.tokens)
        self.jobs[row] = feed
        self.occupied[row] = True
        self.live[row] = chunked == 0
        self.chunk[row] = 0 if chunked else -1
        self.tokens[row, :length] = feed.tokens
        self.pos[row] = start
        self.base[row] = feed.start
        self.token[row] = feed.tokens[start]
        self.known[row] = length
        self.limit[row] = length
        self.stop[row] = FED if start + 1 == length else RUNNING


def take_away(excluded: Iterable[tuple[int, Iterable[Drawn], int]]) -> Removed | None:
    """For every (row, excluded steps, place): what the steps have of the row's distribution of the token at that place
    of the step. Nothing for a row of which they have it all; None where nothing is to be removed."""
    removed = Removed([], [], [])
    for row, steps, at in excluded:
        mass: dict[int, float] = {}
        for step in steps:
            token = step.token_ids[at]
            mass[token] = mass.get(token, 0.0) + step.rest[at]
        if 1.0 - sum(mass.values()) >= MIN_UNSEEN:
            removed.rows.extend([row] * len(mass))
            removed.tokens.extend(mass)
            removed.mass.extend(mass.values())
    return removed if removed.rows else None


def ranges(rows: Int64, starts: Int64, lengths: Int64) -> tuple[Int64, Int64]:
    """Row and column of every token of the given ranges: range i is row rows[i], columns starts[i] and on."""
    before = np.cumsum(lengths) - lengths
    columns = np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)
    return np.repeat(rows, lengths), columns
