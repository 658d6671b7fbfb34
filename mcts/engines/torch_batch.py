"""The decode batch: a queue of prefixes to recompute, a queue of samples that are ready, and the rows they take.

Nothing here waits for anything: a row that ends is given to the next sample before the next forward.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from mcts.engines import torch_probe
from mcts.engines.counters import Counters
from mcts.engines.kv import Prefix, SlotPool
from mcts.engines.model import Policy
from mcts.engines.sampling import Draws, Settings, stream_keys, uniforms
from mcts.engines.text import Codec
from mcts.engines.torch_draw import Drawer
from mcts.engines.torch_forward import Forward
from mcts.engines.torch_rows import (
    EOS,
    FED,
    LENGTH,
    RUNNING,
    STOPS,
    Active,
    Feed,
    Int64,
    Rows,
    Search,
    ranges,
    take_away,
)
from mcts.engines.transfer import to_host
from mcts.types import Float32, Int32, Step

CHUNK = 64
"""Tokens of a prefill chunk."""
_STARTS = 32
"""Most requests whose first tokens are drawn by one product."""


class Batch:
    """Rows, queues and forwards of one engine. Requests go in by `place`; `work` runs one round, after which
    `finished` holds the requests whose steps are complete."""

    def __init__(
        self, policy: Policy, codec: Codec, pool: SlotPool, rows: int, context: int, *, fuse: bool = False
    ) -> None:
        self.policy = policy
        self.codec = codec
        self.counters = Counters()
        self.clock: Callable[[], float] = time.perf_counter
        """What `counters` measure seconds with (benchmarks on a shared core take CPU time)."""
        self.finished: list[Active] = []
        self._pool = pool
        self._starting: deque[Active] = deque()
        self._feeds: deque[Feed] = deque()
        self._ready: deque[tuple[Active, int, int]] = deque()  # request, sample, stop code of its first token
        self._rows = Rows(rows)
        with torch.inference_mode():
            shape, expected = torch_probe.examine(policy, context)
            torch_probe.use_attention(policy)
            self._forward = Forward(policy, *shape, rows, pool.size, context, fuse=fuse)
            torch_probe.check_equal(policy, self._forward, rows, expected)
            self._drawer = Drawer(policy, rows, _STARTS, self._forward.graphs)
            self._sizes, self._chunks, self.steady = torch_probe.shapes(policy, self._forward, CHUNK, context)
        self._enough = 1 if policy.device.type == "cpu" else max(1, rows // 16)
        """Free rows for which first tokens are drawn; on a GPU a few take as long as many."""

    @property
    def busy(self) -> bool:
        """Whether any row has a job."""
        return bool(self._rows.occupied.any())

    def place(self, active: Active) -> None:
        """Queue a request at its cached prefix, or have the prefix computed first (the prompt before the rest)."""
        search, cache = active.search, active.search.cache
        node = cache.find(active.key)
        if node is not None:
            active.node, active.path = node, node.path()
            self._starting.append(active)
            return
        parent = cache.longest(active.request.prefix)
        tokens = cache.prompt if parent is None else active.request.prefix
        key = tokens.tobytes()
        feed = search.feeds.get(key)
        if feed is None:
            feed = search.feeds[key] = Feed(search, tokens, key, parent, [])
            self._feeds.append(feed)
            active.prompt += len(tokens) - feed.start
        feed.waiting.append(active)

    def drop(self, active: Active) -> None:
        """Forget a request."""
        if active in self._starting:
            self._starting.remove(active)
        self._ready = deque(entry for entry in self._ready if entry[0] is not active)
        rows = [row for row, job in enumerate(self._rows.jobs) if job is active]
        self._rows.free(np.array(rows, dtype=np.int64))
        for feed in active.search.feeds.values():
            if active in feed.waiting:
                feed.waiting.remove(active)

    def drop_feeds(self, search: Search) -> None:
        """Forget the prefixes of `search` that are being recomputed."""
        if not search.feeds:
            return
        self._feeds = deque(feed for feed in self._feeds if feed.search is not search)
        rows = [row for row, job in enumerate(self._rows.jobs) if isinstance(job, Feed) and job.search is search]
        self._rows.free(np.array(rows, dtype=np.int64))
        search.feeds.clear()

    @torch.inference_mode()
    def work(self) -> None:
        """Fill the rows and, unless that finished a request already, run one forward."""
        self._draw_first()
        self._seat()
        if not self.finished and self.busy:
            self._step()

    def _draw_first(self) -> None:
        """Draw the first tokens of waiting requests while enough free rows lack work."""
        free = self._rows.count - int(np.count_nonzero(self._rows.occupied))
        if free < self._enough and self.busy:
            return
        while self._starting and len(self._ready) < free:
            batch: list[Active] = []
            count = 0
            while self._starting and len(batch) < _STARTS and count < self._rows.count:
                batch.append(self._starting.popleft())
                count += batch[-1].request.n
            self._start(batch, count)

    def _start(self, batch: list[Active], count: int) -> None:
        """First tokens of all `count` samples of the requests in `batch`."""
        hidden = np.zeros((_STARTS, len(self._hidden_of(batch[0]))), dtype=np.float32)
        for i, active in enumerate(batch):
            hidden[i] = self._hidden_of(active)
        ns = np.array([active.request.n for active in batch])
        owner = np.zeros(-(-count // 32) * 32, dtype=np.int64)
        owner[:count] = np.repeat(np.arange(len(batch)), ns)
        keys = np.zeros(len(owner), dtype=np.uint64)
        keys[:count] = stream_keys([active.request.seed for active in batch], ns)
        temperature = np.array([active.request.temperature for active in batch], dtype=np.float32)[owner]
        top_p = np.array([active.request.top_p for active in batch], dtype=np.float32)[owner]
        number = uniforms(keys, np.zeros(len(owner), dtype=np.int64))
        settings = []
        for at in range(0, len(owner), self._rows.count):  # bounds the memory that large n takes
            part = slice(at, at + self._rows.count)
            asked = [batch[i].request.exclude for i in owner[at : min(at + self._rows.count, count)]]
            removed = take_away((row, steps, 0) for row, steps in enumerate(asked) if steps)
            settings.append((Settings(number[part], temperature[part], top_p[part]), removed))
        parts = self._drawer.first(hidden, owner, settings)
        draws = Draws(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.logprobs for part in parts]),
            np.concatenate([part.behavior for part in parts]),
        )
        self._check_finite(draws.logprobs[:count])
        self.counters.drawn += count
        codes = self.codec.codes(draws.tokens).tolist()
        lo = 0
        for active, n in zip(batch, ns.tolist(), strict=True):
            active.first = Draws(draws.tokens[lo : lo + n], draws.logprobs[lo : lo + n], draws.behavior[lo : lo + n])
            active.keys = keys[lo : lo + n]
            for i in range(n):
                code = codes[lo + i]
                if code == EOS:
                    self._finish_step(active, i, *self._first(active, i), EOS, math.nan)
                else:
                    if code == RUNNING and active.limit == 1:
                        code = LENGTH
                    self._ready.append((active, i, code))
            lo += n

    @staticmethod
    def _hidden_of(active: Active) -> Float32:
        assert active.node is not None
        return active.node.hidden

    @staticmethod
    def _first(active: Active, i: int) -> tuple[Int32, Float32, Float32]:
        assert active.first is not None
        first = active.first
        return first.tokens[i : i + 1].astype(np.int32), first.logprobs[i : i + 1], first.behavior[i : i + 1]

    def _check_finite(self, logprobs: Float32) -> None:
        if not np.isfinite(logprobs).all():
            raise RuntimeError("the policy gave non-finite logits: its weights are broken, load an earlier checkpoint")

    def _seat(self) -> None:
        """Give free rows to prefixes that must be recomputed, then to samples that are ready."""
        if not (self._feeds or self._ready):
            return
        rows = self._rows
        free = np.flatnonzero(~rows.occupied).tolist()
        slots: list[Int32] = []
        targets: list[int] = []
        length = 0
        for row in free:
            if self._feeds:
                feed = self._feeds.popleft()
                length = max(length, len(feed.tokens))
                rows.reserve(len(feed.tokens))
                whole = (len(feed.tokens) - 1) // CHUNK * CHUNK if feed.parent is None else 0
                rows.seat_feed(row, feed, whole)
                path = feed.parent.path() if feed.parent is not None else None
            elif self._ready:
                active, i, code = self._ready.popleft()
                prefix = len(active.request.prefix)
                length = max(length, prefix + 1)
                rows.reserve(prefix + active.limit)
                rows.seat(row, active, i, code)
                path = active.path
            else:
                break
            if path is not None:
                slots.append(path)
                targets.append(row)
        self._forward.fit(max(length, int(rows.pos.max()) + 1))
        if slots:
            lengths = np.array([len(path) for path in slots])
            where, columns = ranges(np.array(targets), np.zeros(len(slots), dtype=np.int64), lengths)
            self._forward.gather(np.concatenate(slots).astype(np.int64), where, columns)
            self.counters.copied += len(columns)

    def _compact(self) -> int:
        """Move jobs into the lowest rows where that allows a smaller forward; the row count to forward."""
        rows = self._rows
        occupied = np.flatnonzero(rows.occupied)
        size = next(size for size in self._sizes if size >= len(occupied))
        high = occupied[occupied >= size]
        if len(high):
            for source, target in zip(high.tolist(), np.flatnonzero(~rows.occupied[:size]).tolist(), strict=False):
                rows.move(source, target)
                self._forward.move(source, target)
        return size

    def _step(self) -> None:
        """One forward (two where a prompt is being prefilled), and what follows from it for every row."""
        rows = self._rows
        k = self._compact()
        began = self.clock()
        self._prefill()
        live = np.flatnonzero(rows.live[:k])
        if not len(live):
            self.counters.forward_seconds += self.clock() - began
            return
        self._forward.fit(int(rows.pos.max()) + 1)
        hidden = self._forward.decode(rows.token[:k], rows.pos[:k])
        stop = rows.stop[live]
        done, going = live[stop != RUNNING], live[stop == RUNNING]
        rows.pos[going] += 1
        position = rows.pos[going]
        given = position < rows.known[going]
        drawing = going[~given]
        logits = self._drawer.logits(hidden) if len(drawing) else None
        self.counters.forward_seconds += self.clock() - began
        self.counters.forwards += 1
        self.counters.forwarded += len(live)
        self.counters.padded += k - len(live)
        if len(drawing) < len(going):
            fed, at = going[given], position[given]
            rows.token[fed] = rows.tokens[fed, at]
            rows.stop[fed] = np.where(at + 1 == rows.known[fed], FED, RUNNING)
        ended = drawing[:0]
        if len(drawing):
            ended = self._draw(logits, drawing, k)
        if len(done):
            self._finish_rows(done, hidden)
        if len(ended):
            self._finish_eos(ended)

    def _prefill(self) -> None:
        """Forward one chunk of each of up to `_chunks` prompts that are at the same position."""
        rows = self._rows
        waiting = np.flatnonzero(rows.chunk >= 0)
        if not len(waiting):
            return
        start = int(rows.chunk[waiting].min())
        batch = waiting[rows.chunk[waiting] == start][: self._chunks]
        end = start + CHUNK
        self._forward.prefill(rows.tokens[batch, start:end].astype(np.int64), batch, start)
        self.counters.forwards += 1
        self.counters.forwarded += len(batch) * CHUNK
        ready = batch[rows.pos[batch] == end]
        rows.chunk[batch] = end
        rows.chunk[ready] = -1
        rows.live[ready] = True

    def _draw(self, logits: torch.Tensor | None, drawing: Int64, k: int) -> Int64:
        """Draw the next token of the rows `drawing` from the logits [k, V] of the forward; the rows that drew EOS."""
        rows = self._rows
        number = uniforms(rows.keys[:k], rows.pos[:k] - rows.base[:k])
        draws = self._drawer.next(logits, number, rows.temperature[:k], rows.top_p[:k], rows.removed(drawing))
        tokens, logprobs, at = draws.tokens[drawing], draws.logprobs[drawing], rows.pos[drawing]
        self._check_finite(logprobs)
        self.counters.drawn += len(drawing)
        rows.token[drawing] = rows.tokens[drawing, at] = tokens
        rows.logprobs[drawing, at] = logprobs
        rows.behavior[drawing, at] = draws.behavior[drawing]
        rows.drew(drawing, tokens)
        codes = self.codec.codes(tokens)
        if self.codec.long:
            codes = self.codec.long_codes(codes, rows.tokens, drawing, at, rows.base[drawing])
        codes = np.where((codes == RUNNING) & (at + 1 >= rows.limit[drawing]), LENGTH, codes)
        rows.stop[drawing] = codes
        ended: Int64 = drawing[codes == EOS]
        return ended

    def _finish_rows(self, done: Int64, hidden: torch.Tensor) -> None:
        """Rows whose last token was just forwarded: keep its keys, values and hidden state, and end the step."""
        rows = self._rows
        kept = hidden.index_select(0, torch.from_numpy(done).to(hidden.device)).float()
        values = [math.nan] * len(done)
        if self.policy.head is None:
            states = kept.cpu().numpy()
        else:
            # Padded to a multiple of 32 rows: other counts may end in another kernel and another last bit.
            padded = torch.nn.functional.pad(kept, (0, 0, 0, -len(done) % 32))
            states, found = to_host(kept, self.policy.head(padded)[: len(done)])
            values = found.tolist()
        stored: list[tuple[int, int, Int32]] = []
        again: list[Active] = []
        for j, (row, start, end, value) in enumerate(self._spans(done, values)):
            job = rows.jobs[row]
            assert job is not None
            tokens = rows.tokens[row, start:end].copy()
            if isinstance(job, Feed):
                key, parent = job.key, job.parent
                del job.search.feeds[key]
                again += job.waiting
            else:
                key, parent = job.key + tokens.tobytes(), job.node
                self._finish_row(row, job, start, end, tokens, value)
            cache = job.search.cache
            if key not in cache.prefixes:
                slots = self._pool.take(end - start)
                cache.add(key, Prefix(parent, end, slots, states[j].copy(), value))
                stored.append((row, start, slots))
        rows.free(done)
        for active in again:
            self.place(active)
        if stored:
            lengths = np.array([len(slots) for _, _, slots in stored])
            where, columns = ranges(
                np.array([row for row, _, _ in stored]), np.array([start for _, start, _ in stored]), lengths
            )
            self._forward.store(where, columns, np.concatenate([slots for _, _, slots in stored]).astype(np.int64))

    def _spans(self, done: Int64, values: Sequence[float]) -> Iterator[tuple[int, int, int, float]]:
        """(row, first column, column after the last, value) of rows that are done."""
        ends = self._rows.pos[done] + 1
        return zip(done.tolist(), self._rows.base[done].tolist(), ends.tolist(), values, strict=True)

    def _finish_eos(self, done: Int64) -> None:
        """Rows that drew EOS: nothing below can be asked for, so nothing is kept."""
        rows = self._rows
        for row, start, end, value in self._spans(done, [math.nan] * len(done)):
            job = rows.jobs[row]
            assert isinstance(job, Active)
            self._finish_row(row, job, start, end, rows.tokens[row, start:end].copy(), value)
        rows.free(done)

    def _finish_row(self, row: int, active: Active, start: int, end: int, tokens: Int32, value: float) -> None:
        rows = self._rows
        logprobs, behavior = rows.logprobs[row, start:end].copy(), rows.behavior[row, start:end]
        self._finish_step(active, int(rows.sample[row]), tokens, logprobs, behavior, int(rows.stop[row]), value)

    def _finish_step(
        self,
        active: Active,
        i: int,
        tokens: Int32,
        logprobs: Float32,
        behavior: Float32,
        stop: int,
        value: float,
    ) -> None:
        request = active.request
        plain = request.temperature == 1.0 and request.top_p == 1.0 and not request.exclude
        kept = None if plain else behavior.copy()
        active.steps[i] = Step(self.codec.decode(tokens), tokens, logprobs, STOPS[stop], value, kept)
        active.left -= 1
        if not active.left:
            self.finished.append(active)
