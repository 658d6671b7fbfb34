"""The driver: many searches, one engine (DESIGN.md, decision 1). The words of a search (Search, Strategy,
SearchContext, Expand, Outcome) are importable from here."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import asdict, is_dataclass, replace
from typing import Any

from mcts.context import Search, SearchContext, Strategy
from mcts.engines.base import Engine, EngineFull
from mcts.rng import hash64
from mcts.tasks.base import Task
from mcts.types import Ended, Reply, Request, SearchError, SearchResult, Step, Stop
from mcts.waves import Expand, Outcome, Replies, Wave

__all__ = [
    "Driver",
    "Expand",
    "Outcome",
    "Replies",
    "Search",
    "SearchContext",
    "Strategy",
    "Wave",
    "settings_of",
]

_ids = itertools.count()  # searches and requests of the process; unique over all drivers of an engine


def settings_of(part: object) -> dict[str, Any]:
    """JSON-able settings of a strategy or a value source: its fields if it is a dataclass, else what its
    `settings` holds (nothing where it has none)."""
    if is_dataclass(part) and not isinstance(part, type):
        return asdict(part)
    return dict(getattr(part, "settings", {}))


class _Live:
    """A search in the engine: its generator and the wave that it waits for."""

    __slots__ = (
        "clock", "ctx", "deadline", "id", "ordinal", "replies", "search", "stopped", "strategy", "version",
        "waiting",
    )  # fmt: skip

    def __init__(self, id: int, search: Search, ctx: SearchContext, version: int) -> None:
        self.id = id
        self.search = search
        self.ctx = ctx
        self.version = version
        self.strategy: Generator[Wave, Replies, Outcome] = search.strategy.run(ctx)
        self.replies: Replies = []
        self.waiting = 0
        self.ordinal = 0
        self.stopped = False
        self.clock = time.monotonic()
        self.deadline = math.inf if search.seconds is None else self.clock + search.seconds


class Driver:
    """Runs searches on one engine: builds their requests, grants and charges their tokens, and gives each
    strategy the replies of its wave all together. A search's result depends on its own seed and settings only,
    not on timing nor on what else runs.

    An engine belongs to one driver at a time. `max_open` bounds the searches inside the engine.
    """

    def __init__(self, engine: Engine, task: Task, max_open: int = 256) -> None:
        if max_open < 1:
            raise ValueError(f"max_open must be at least 1, not {max_open}")
        self.engine = engine
        self.task = task
        self.max_open = max_open
        self._waiting: deque[tuple[int, Search, SearchContext]] = deque()
        self._live: dict[int, _Live] = {}
        self._flights: dict[int, tuple[_Live, int, int, bool]] = {}  # request: search, slot, reserved, cut
        self._done: list[SearchResult] = []
        self._cancelled: set[int] = set()
        self._strategy: tuple[Strategy | None, dict[str, Any]] = (None, {})  # the last one, and its settings

    def __len__(self) -> int:
        """Searches submitted and not yet handed out."""
        return len(self._waiting) + len(self._live) + len(self._done)

    def submit(self, search: Search) -> int:
        """Queue a search; returns its id. It starts in a later `poll`, in order of submission."""
        id = next(_ids)
        self._waiting.append((id, search, self._context(search)))
        return id

    def cancel(self, search: int) -> None:
        """End a search: it gets no more tokens, answers with the best it has once its requests in flight are
        back, and comes out as STOPPED. Its tokens stay counted. Unknown or finished ids are ignored."""
        self._cancelled.add(search)
        live = self._live.get(search)
        if live is not None:
            live.stopped = True

    def poll(self) -> list[SearchResult]:
        """Work for a while; the searches that finished, in the order in which they finished."""
        self._admit()
        if self._flights:
            for reply in self.engine.poll():
                self._receive(reply)
        done, self._done = self._done, []
        return done

    def fail(self, search: Search, reason: str) -> SearchResult:
        """The result of a search that is not made: FAILED for `reason`, its tree the prompt alone."""
        return self._result(_Live(next(_ids), search, self._context(search), self.engine.version), None, reason)

    def _context(self, search: Search) -> SearchContext:
        prompt = search.problem.prompt
        text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
        return SearchContext(search, self.task, self.engine.encode(prompt), text)

    def run(self, searches: Iterable[Search]) -> Iterator[SearchResult]:
        """Run them all, keeping the engine full; results in the order in which they finish. `searches` is
        read only as far as there is room, so it may be endless."""
        source = iter(searches)
        more = True
        while more or len(self):
            while more and len(self) < self.max_open:
                search = next(source, None)
                if search is None:
                    more = False
                else:
                    self.submit(search)
            yield from self.poll()

    def _admit(self) -> None:
        """Open waiting searches in order while there is room; the first that does not fit holds the queue, so
        that a large one is not overtaken for ever."""
        while self._waiting and len(self._live) < self.max_open:
            id, search, ctx = self._waiting[0]
            error = None
            opened = False
            try:
                opened = self.engine.open(id, ctx.tree.prompt_ids, search.budget)
            except EngineFull as full:
                error = str(full)
            if not opened and error is None:
                if self._live:
                    return
                error = "the engine refuses a search although no other is open: raise its capacity"
            self._waiting.popleft()
            live = _Live(id, search, ctx, self.engine.version)
            live.stopped = id in self._cancelled
            if error is not None:
                self._finish(live, None, error)
                continue
            self._live[id] = live
            self._advance(live, None)

    def _receive(self, reply: Reply) -> None:
        live, slot, reserved, cut = self._flights.pop(reply.request.id)
        usage = live.ctx.usage
        sampled = 0
        for step in reply.steps:
            sampled += len(step.token_ids)
        live.ctx.budget.charge(reserved, sampled)
        usage.sampled += sampled
        usage.prompt += reply.prompt
        usage.cached += reply.cached
        usage.calls += 1
        usage.uncounted_calls += reply.uncounted_calls
        usage.uncounted_tokens += reply.uncounted_tokens
        live.replies[slot] = _without_cut(live, reply) if cut else reply
        live.waiting -= 1
        if live.waiting == 0:
            self._advance(live, live.replies)

    def _advance(self, live: _Live, replies: Replies | None) -> None:
        """Hand the replies to the strategy and send its next wave; a wave for which there is no token left is
        answered at once."""
        try:
            while True:
                for reply in replies or ():
                    if reply is not None and reply.error is not None:
                        raise SearchError(f"the engine gave up on a request: {reply.error}")
                wave = next(live.strategy) if replies is None else live.strategy.send(replies)
                if time.monotonic() > live.deadline:
                    live.stopped = True
                if not wave:
                    raise SearchError(f"strategy {live.search.strategy.name!r} yielded an empty wave")
                if self._send(live, wave):
                    return
                if live.ctx.spent:
                    raise SearchError(f"strategy {live.search.strategy.name!r} asks on although its budget is spent")
                live.ctx.spent = True
                replies = live.replies
        except StopIteration as stop:
            outcome: Outcome = stop.value
            self._finish(live, outcome, None)
        except SearchError as error:
            live.strategy.close()
            self._finish(live, None, str(error))

    def _send(self, live: _Live, wave: Wave) -> bool:
        """Send what the budget grants of a wave; False if that is nothing."""
        ctx, search = live.ctx, live.search
        live.replies = [None] * len(wave)
        if live.stopped:
            return False
        longest = ctx.max_step_tokens
        start = 0
        requests: list[Request] = []
        while start < len(wave):
            n, asked = wave[start].n, min(wave[start].max_tokens or longest, longest)
            end = start + 1
            while end < len(wave) and wave[end].n == n and (wave[end].max_tokens or longest) == asked:
                end += 1
            granted = ctx.budget.grant(end - start, n, asked)
            for slot in range(start, start + granted.leaves):
                wish = wave[slot]
                temperature = search.temperature if wish.temperature is None else wish.temperature
                new = wish.new and self.engine.excludes and temperature == 1.0 and search.top_p == 1.0
                request = Request(
                    id=next(_ids),
                    search=live.id,
                    prefix=ctx.prefix(wish.node),
                    n=granted.n,
                    max_tokens=granted.max_tokens,
                    seed=hash64(search.seed, live.ordinal),
                    temperature=temperature,
                    top_p=search.top_p,
                    exclude=ctx.drawn(wish.node) if new else (),
                )
                live.ordinal += 1
                cut = granted.max_tokens < asked
                self._flights[request.id] = (live, slot, granted.n * granted.max_tokens, cut)
                requests.append(request)
            start = end
        live.waiting = len(requests)
        for request in requests:
            self.engine.submit(request)
        return bool(requests)

    def _finish(self, live: _Live, outcome: Outcome | None, error: str | None) -> None:
        """Close the search and hand out its result."""
        if self._live.pop(live.id, None) is not None:
            self.engine.close(live.id)
        self._cancelled.discard(live.id)
        self._done.append(self._result(live, outcome, error))

    def _result(self, live: _Live, outcome: Outcome | None, error: str | None) -> SearchResult:
        """What a search comes to. Outside learning gold is asked here, once, about the chosen answer."""
        ctx, search, tree = live.ctx, live.search, live.ctx.tree
        chosen = outcome.chosen if outcome is not None else None
        answer = tree.answer[chosen] if chosen is not None else None
        verdict = tree.verdict[chosen] if chosen is not None else None
        if answer is not None and not search.learning:
            try:
                verdict = self.task.verify(search.problem, answer)
            except SearchError as failure:
                error, verdict = str(failure), None
        ended = Ended.FAILED if outcome is None or error is not None else outcome.ended
        if live.stopped and ended is Ended.BUDGET:
            ended = Ended.STOPPED
        if error is not None:
            tree.in_flight = [0] * len(tree)
        ctx.usage.discarded = ctx.usage.sampled - tree.tokens  # also what a strategy left unused
        return SearchResult(
            problem=search.problem,
            strategy=search.strategy.name,
            settings=self._settings_of(search),
            tree=tree,
            candidates=tuple(ctx.candidates),
            chosen=chosen,
            answer=answer,
            verdict=verdict,
            usage=ctx.usage,
            seed=search.seed,
            policy_version=live.version,
            ended=ended,
            oracle=ctx.oracle or (outcome is not None and outcome.oracle),
            error=error,
            seconds=time.monotonic() - live.clock,
        )

    def _settings_of(self, search: Search) -> Mapping[str, Any]:
        """What determines the trace. The strategy's own settings are looked up once for the searches that share it."""
        if self._strategy[0] is not search.strategy:
            self._strategy = (search.strategy, settings_of(search.strategy))
        return {
            "budget": search.budget,
            "temperature": search.temperature,
            "top_p": search.top_p,
            "prior_rule": str(search.prior_rule),
            "check_steps": search.check_steps,
            "learning": search.learning,
            "engine": self.engine.name,
            "strategy": self._strategy[1],
            "value": {"name": search.value.name, **settings_of(search.value)},
        }


def _without_cut(live: _Live, reply: Reply) -> Reply:
    """The reply without the steps that the end of the budget cut short: they are no steps of the policy, and
    calling them wrong would teach the value head a lie. Their tokens are discarded."""
    kept: list[Step] = []
    for step in reply.steps:
        if step.stop is Stop.LENGTH:
            live.ctx.usage.discarded += len(step.token_ids)
        else:
            kept.append(step)
    return replace(reply, steps=tuple(kept))
