"""TorchEngine: hundreds of searches share the batch of one Hugging Face causal LM, without a barrier.

A step starts at a cached prefix: its first token is drawn from the prefix's hidden state, so that n samples forward
nothing of their parent. It then takes a row, which decodes until the delimiter, EOS or the length limit, and hands
the row to the next step in the queue. Each drawn token is forwarded once: the last one for its value and for the
hidden state that its children start from. EOS is not forwarded at all; such a step has no value (NaN), since its
reward is known by other means.

Bits (CPU, float32, fixed threads): the tokens, log-probabilities and values of a request depend on the weights, the
search's prompt, the prefix and the request alone. Prompt tokens are forwarded in chunks of fixed shape as long as
more than a whole chunk is left, all other tokens one by one in the decode batch; that includes a prefix that has to be
recomputed. Row counts per forward come from a fixed set that was seen to give equal bits (`exact`).
"""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mcts.engines import torch_probe
from mcts.engines.base import EngineFull
from mcts.engines.kv import Prefix, PrefixCache, SlotPool
from mcts.engines.model import Policy, copy_weights, load_policy
from mcts.engines.sampling import Draws, draw, stream_keys, uniforms
from mcts.engines.text import Codec
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
)
from mcts.types import Float32, Int32, Message, Reply, Request, Step

CHUNK = 64
"""Tokens of a prefill chunk."""
CHUNKS = 4
"""Most chunks in one prefill forward."""
_STARTS = 32
"""Most requests whose first tokens are drawn by one product."""
_PATIENCE = 64
"""Forwards after which `poll` returns even if nothing has finished."""


@dataclass(slots=True)
class Counters:
    """What the engine did since it was built."""

    forwarded: int = 0
    """Tokens that went through the model: prompt tokens and drawn tokens, padding left out."""
    padded: int = 0
    """Row forwards that carried no token."""
    drawn: int = 0
    """Tokens drawn, EOS included."""
    copied: int = 0
    """Tokens whose keys and values were copied into a row."""
    forwards: int = 0
    forward_seconds: float = 0.0
    poll_seconds: float = 0.0


class TorchEngine:
    """An Engine (mcts.engines.base) for any Hugging Face causal LM with full attention. It owns the policy's model.

    `delimiter`: text that ends a step, as the tokenizer encodes it; one or several tokens, and also any single
        token whose text ends with it.
    `rows`: sequences decoded at once, a multiple of 16.   `kv_slots`: tokens kept for open searches altogether.
    `context`: longest sequence in tokens; None: what the model allows.   `threads`: torch's; None: as they are.
    """

    name = "torch"

    def __init__(
        self,
        policy: Policy,
        delimiter: str,
        rows: int = 256,
        kv_slots: int = 65536,
        context: int | None = None,
        threads: int | None = None,
        version: int = 0,
    ) -> None:
        if rows < 16 or rows % 16:
            raise ValueError(f"rows must be a positive multiple of 16, not {rows}")
        if threads is not None:
            torch.set_num_threads(threads)
        self.version = version
        self.policy = policy
        self.clock = time.perf_counter
        """What `counters` measure seconds with (benchmarks on a shared core take CPU time)."""
        allowed = getattr(policy.model.config, "max_position_embeddings", None) or context
        if allowed is None:
            raise ValueError("the model's config states no longest context: give the engine one")
        if context is not None and context > allowed:
            raise ValueError(f"the model reads at most {allowed} tokens: lower context from {context}")
        self.context = context or int(allowed)
        self.codec = Codec(policy, delimiter)
        self.counters = Counters()
        self._pool = SlotPool(kv_slots)
        self._searches: dict[int, Search] = {}
        self._requests: dict[int, Active] = {}
        self._starting: deque[Active] = deque()
        self._feeds: deque[Feed] = deque()
        self._ready: deque[tuple[Active, int, int]] = deque()  # request, sample, stop code of its first token
        self._finished: list[Reply] = []
        self._rows = Rows(rows)
        with torch.inference_mode():
            shape, expected = torch_probe.examine(policy, self.context)
            torch_probe.use_attention(policy)
            self._forward = Forward(policy, *shape, rows, kv_slots)
            torch_probe.check_equal(policy, self._forward, rows, expected)
            self._sizes, self.exact = torch_probe.equal_sizes(policy, self._forward, self.context)
            few = min(CHUNKS, rows)
            long = self.context > 2 * CHUNK
            self._chunks = torch_probe.equal_chunks(self._forward, CHUNK, few) if long else 1
        self.exact = self.exact and policy.device.type == "cpu" and policy.model.dtype == torch.float32
        """Whether a request's bits are promised to be independent of its batch."""
        if policy.device.type == "cpu" and policy.model.dtype == torch.float32 and not self.exact:
            warnings.warn(
                "on this machine a row's bits depend on its place in the batch: traces will not be bit-equal",
                stacklevel=2,
            )

    # ---- text

    def encode(self, prompt: str | Sequence[Message]) -> Int32:
        """Token ids of a prompt (text, or chat messages through the chat template), int32 [P]."""
        return self.codec.encode(prompt)

    def decode(self, token_ids: Int32) -> str:
        """The text of token ids, special tokens left out."""
        return self.codec.decode(token_ids)

    # ---- searches

    def open(self, search: int, prompt_ids: Int32, max_new_tokens: int) -> bool:
        """Reserve slots for the prompt and `max_new_tokens`; False: no room before another search closes."""
        prompt = np.ascontiguousarray(prompt_ids, dtype=np.int32)
        need = len(prompt) + max_new_tokens
        if search in self._searches:
            raise ValueError(f"search {search} is open already: give every search its own number")
        if len(prompt) < 1 or max_new_tokens < 1:
            raise ValueError("a search needs a prompt of at least one token and a budget of at least one token")
        if len(prompt) >= self.context:
            raise EngineFull(f"a prompt of {len(prompt)} tokens leaves no room in a context of {self.context}")
        if need > self._pool.size:
            raise EngineFull(
                f"the search may need {need} KV slots and the engine has {self._pool.size}: raise kv_slots or "
                "lower the search's budget"
            )
        if not self._pool.reserve(need):
            return False
        self._searches[search] = Search(PrefixCache(prompt, need))
        return True

    def close(self, search: int) -> None:
        """Forget a search; its open requests are cancelled."""
        found = self._search(search)
        for request in list(found.requests):
            self.cancel(request)
        if found.feeds:
            self._drop_feeds(found)
        self._pool.give(found.cache.drain())
        self._pool.release(found.cache.limit)
        del self._searches[search]

    def load(self, path: str, version: int) -> None:
        """Swap in the weights of a checkpoint or model folder of the same shape and tokenizer."""
        if self._searches:
            raise RuntimeError(f"{len(self._searches)} searches are open: close them before loading new weights")
        new = load_policy(path, "cpu", str(self.policy.model.dtype).removeprefix("torch."))
        if new.tokenizer.get_vocab() != self.policy.tokenizer.get_vocab():
            raise ValueError(f"{path} has another vocabulary than the policy in use: start a new engine for it")
        if (new.head is None) != (self.policy.head is None):
            raise ValueError(f"{path} and the policy in use differ in having a value head: start a new engine")
        copy_weights(new.model, self.policy.model, "policy")
        if new.head is not None and self.policy.head is not None:
            copy_weights(new.head, self.policy.head, "value head")
        self.version = version

    def _search(self, search: int) -> Search:
        if search not in self._searches:
            raise ValueError(f"search {search} is not open: call open first")
        return self._searches[search]

    # ---- requests

    def submit(self, request: Request) -> None:
        """Queue a request. ValueError where it breaks the search's reservation or its prompt."""
        search = self._search(request.search)
        if request.id in self._requests:
            raise ValueError(f"request {request.id} is under way already: give every request its own number")
        if request.n < 1 or request.max_tokens < 1:
            raise ValueError("a request needs n >= 1 and max_tokens >= 1")
        if not (request.temperature >= 0.0 and 0.0 < request.top_p <= 1.0):
            raise ValueError("a request needs temperature >= 0 and 0 < top_p <= 1")
        prefix, cache = request.prefix, search.cache
        if prefix.dtype != np.int32:
            raise ValueError(f"request {request.id}: the prefix must be int32, not {prefix.dtype}")
        prompt, key = len(cache.prompt), prefix.tobytes()
        if not key.startswith(cache.prompt_key):
            raise ValueError(f"request {request.id}: the prefix does not start with the prompt of its search")
        room = self.context - len(prefix)
        if room < 1:
            error = f"the prefix of {len(prefix)} tokens leaves no room in a context of {self.context}"
            self._finished.append(Reply(request, (), error=error))
            return
        cost = request.n * request.max_tokens
        node = cache.find(key)
        if node is None and key not in search.feeds:
            longest = cache.longest(prefix)
            cost += len(prefix) - (longest.length if longest is not None else prompt)
        held = cache.used if cache.prefixes else prompt
        if held + cache.pending + cost > cache.limit:
            raise ValueError(
                f"request {request.id} may draw {cost} tokens but search {request.search} has "
                f"{cache.limit - held - cache.pending} left of its reservation: open it with more max_new_tokens"
            )
        cache.pending += cost
        active = Active(
            request,
            search,
            key,
            cost,
            min(request.max_tokens, room),
            [None] * request.n,
            request.n,
        )
        self._requests[request.id] = search.requests[request.id] = active
        self._place(active)

    def cancel(self, request_id: int) -> None:
        """Drop a request; nothing happens where it has finished already and its reply is not yet fetched."""
        active = self._requests.get(request_id)
        if active is None:
            self._finished = [reply for reply in self._finished if reply.request.id != request_id]
            return
        self._forget(active)
        if active in self._starting:
            self._starting.remove(active)
        self._ready = deque(entry for entry in self._ready if entry[0] is not active)
        for row, job in enumerate(self._rows.jobs):
            if job is active:
                self._rows.free(np.array([row]))
        for feed in active.search.feeds.values():
            if active in feed.waiting:
                feed.waiting.remove(active)

    def _forget(self, active: Active) -> None:
        active.search.cache.pending -= active.cost
        del self._requests[active.request.id]
        del active.search.requests[active.request.id]

    def _drop_feeds(self, search: Search) -> None:
        self._feeds = deque(feed for feed in self._feeds if feed.search is not search)
        for row, job in enumerate(self._rows.jobs):
            if isinstance(job, Feed) and job.search is search:
                self._rows.free(np.array([row]))
        search.feeds.clear()

    def _place(self, active: Active) -> None:
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

    # ---- work

    @torch.inference_mode()
    def poll(self) -> list[Reply]:
        """Forward until some request finishes (at most 64 times); the requests that finished."""
        began = self.clock()
        for _ in range(_PATIENCE):
            self._draw_first()
            self._seat()
            if self._finished or not self._rows.occupied.any():
                break
            self._step()
            if self._finished:
                break
        finished, self._finished = self._finished, []
        self.counters.poll_seconds += self.clock() - began
        return finished

    def _draw_first(self) -> None:
        """Draw the first tokens of waiting requests while free rows lack work."""
        free = self._rows.count - int(np.count_nonzero(self._rows.occupied))
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
        weight = self.policy.model.get_output_embeddings().weight
        logits = self.policy.unembed(torch.from_numpy(hidden).to(weight.device, weight.dtype)).float()
        ns = np.array([active.request.n for active in batch])
        owner = np.zeros(-(-count // 32) * 32, dtype=np.int64)
        owner[:count] = np.repeat(np.arange(len(batch)), ns)
        keys = np.zeros(len(owner), dtype=np.uint64)
        keys[:count] = stream_keys([active.request.seed for active in batch], ns)
        temperature = np.array([active.request.temperature for active in batch], dtype=np.float32)[owner]
        top_p = np.array([active.request.top_p for active in batch], dtype=np.float32)[owner]
        number = uniforms(keys, np.zeros(len(owner), dtype=np.int64))
        parts = []
        for lo in range(0, len(owner), self._rows.count):  # bounds the memory that large n takes
            part = slice(lo, lo + self._rows.count)
            rows = logits.index_select(0, torch.from_numpy(owner[part]).to(logits.device))
            parts.append(draw(rows, number[part], temperature[part], top_p[part]))
        draws = Draws(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        self._check_finite(draws.logprobs[:count])
        self.counters.drawn += count
        codes = self.codec.codes(draws.tokens).tolist()
        lo = 0
        for active, n in zip(batch, ns.tolist(), strict=True):
            active.first = Draws(*(column[lo : lo + n] for column in draws))
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
            where, columns = _ranges(np.array(targets), np.zeros(len(slots), dtype=np.int64), lengths)
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
        logits = self.policy.unembed(hidden).float() if len(drawing) else None
        self.counters.forward_seconds += self.clock() - began
        self.counters.forwards += 1
        self.counters.forwarded += len(live)
        self.counters.padded += k - len(live)
        if len(drawing) < len(going):
            fed, at = going[given], position[given]
            rows.token[fed] = rows.tokens[fed, at]
            rows.stop[fed] = np.where(at + 1 == rows.known[fed], FED, RUNNING)
        ended = drawing[:0]
        if logits is not None:
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

    def _draw(self, logits: torch.Tensor, drawing: Int64, k: int) -> Int64:
        """Draw the next token of the rows `drawing` from logits [k, V]; the rows that drew EOS."""
        rows = self._rows
        number = uniforms(rows.keys[:k], rows.pos[:k] - rows.base[:k])
        draws = draw(logits, number, rows.temperature[:k], rows.top_p[:k])
        tokens, logprobs, at = draws.tokens[drawing], draws.logprobs[drawing], rows.pos[drawing]
        self._check_finite(logprobs)
        self.counters.drawn += len(drawing)
        rows.token[drawing] = rows.tokens[drawing, at] = tokens
        rows.logprobs[drawing, at] = logprobs
        rows.behavior[drawing, at] = draws.behavior[drawing]
        codes = self.codec.codes(tokens)
        if self.codec.long:
            codes = self.codec.long_codes(codes, rows.tokens, drawing, at, rows.base[drawing])
        codes = np.where((codes == RUNNING) & (at + 1 >= rows.limit[drawing]), LENGTH, codes)
        rows.stop[drawing] = codes
        return drawing[codes == EOS]

    # ---- what a row leaves behind

    def _finish_rows(self, done: Int64, hidden: torch.Tensor) -> None:
        """Rows whose last token was just forwarded: keep its keys, values and hidden state, and end the step."""
        rows = self._rows
        kept = hidden.index_select(0, torch.from_numpy(done).to(hidden.device)).float()
        values = [math.nan] * len(done)
        if self.policy.head is not None:
            # Padded to a multiple of 32 rows: other counts may end in another kernel and another last bit.
            padded = torch.nn.functional.pad(kept, (0, 0, 0, -len(done) % 32))
            values = self.policy.head(padded)[: len(done)].tolist()
        states = kept.cpu().numpy()
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
            self._place(active)
        if stored:
            lengths = np.array([len(slots) for _, _, slots in stored])
            where, columns = _ranges(
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
        self, active: Active, i: int, tokens: Int32, logprobs: Float32, behavior: Float32, stop: int, value: float
    ) -> None:
        request = active.request
        plain = request.temperature == 1.0 and request.top_p == 1.0
        active.steps[i] = Step(
            self.codec.decode(tokens), tokens, logprobs, STOPS[stop], value, None if plain else behavior.copy()
        )
        active.left -= 1
        if active.left:
            return
        self._forget(active)
        assert active.node is not None
        steps = tuple(step for step in active.steps if step is not None)
        cached = len(request.prefix) - active.prompt
        self._finished.append(Reply(request, steps, active.node.value, active.prompt, cached))


def _ranges(rows: Int64, starts: Int64, lengths: Int64) -> tuple[Int64, Int64]:
    """Row and column of every token of the given ranges: range i is row rows[i], columns starts[i] and on."""
    before = np.cumsum(lengths) - lengths
    columns = np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)
    return np.repeat(rows, lengths), columns
