"""An engine without a model: steps, probabilities and values come from a Python function. For tests of
strategies and for profiling them; same protocol and the same promises as an engine with a model."""

from __future__ import annotations

import math
import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from mcts.engines.base import EngineFull
from mcts.rng import hash64, uniform
from mcts.types import MIN_UNSEEN, Drawn, Float32, Int32, Message, Reply, Request, Step, Stop

EOS = 0
EOS_WORD = "<eos>"

Script = Callable[[str, tuple[str, ...]], Mapping[str, float]]
"""(prompt, texts of the steps so far) -> the next steps' texts with their probabilities. A text is words
separated by single spaces; one that ends with the delimiter goes on, any other is finished by EOS."""
Values = Callable[[str, tuple[str, ...]], float]
"""(prompt, texts of the steps so far) -> the value head's output, in [0, 1] or NaN."""


@dataclass(slots=True)
class _Option:
    """One possible next step."""

    text: str
    token_ids: Int32  # [T]
    logprobs: Float32  # [T]
    stop: Stop


@dataclass(slots=True)
class _State:
    """What the script says after one prefix, worked out once."""

    steps: tuple[str, ...]
    options: list[_Option]
    probabilities: list[float]
    value: float
    values: dict[str, float] = field(default_factory=dict)
    tempered: dict[tuple[float, float], tuple[list[float], list[Float32]]] = field(default_factory=dict)


@dataclass(slots=True)
class _Opened:
    prompt: str
    prompt_length: int
    reserved: int
    known: set[bytes] = field(default_factory=set)


class ScriptedEngine:
    """Draws whole steps from a script. One token per word; token ids are hashes of the words, so they do not
    depend on what was seen before. A step's token log-probabilities follow the chain rule over the texts that
    share its first words, so they sum to the log of its probability; a step cut by `max_tokens` has the
    probability of its cut form. Temperature and top_p act on whole steps.

    Sample i of a request is decided by number (seed, i, 0) of the counter-based stream: it depends on nothing
    else. `capacity` bounds the reserved tokens of open searches; each `poll` finishes `per_poll` requests (None:
    all), in an order that `shuffle` scrambles.
    """

    name = "scripted"

    def __init__(
        self,
        script: Script,
        values: Values | None = None,
        *,
        delimiter: str = ";",
        capacity: int | None = None,
        per_poll: int | None = None,
        shuffle: int | None = None,
        fail: Callable[[Request], str | None] | None = None,
    ) -> None:
        self.version = 0
        self.excludes = True
        self.script = script
        self.head = values if values is not None else (lambda prompt, steps: math.nan)  # noqa: ARG005
        self.capacity = capacity
        self.per_poll = per_poll
        self.shuffle = shuffle
        self.fail = fail
        self.sampled = 0
        """Tokens drawn since the engine was made."""
        self._words: dict[int, str] = {EOS: EOS_WORD}
        self._delimiter = self._token(delimiter)
        self._searches: dict[int, _Opened] = {}
        self._queue: list[Request] = []
        self._states: dict[tuple[str, bytes], _State] = {}

    def encode(self, prompt: str | Sequence[Message]) -> Int32:
        """One token per word; raises ValueError for a prompt without words."""
        text = prompt if isinstance(prompt, str) else " ".join(message["content"] for message in prompt)
        if not text.split():
            raise ValueError("a prompt needs at least one word")
        return np.array([self._token(word) for word in text.split()], dtype=np.int32)

    def decode(self, token_ids: Int32) -> str:
        return " ".join(self._words[int(token)] for token in token_ids if token != EOS)

    def open(self, search: int, prompt_ids: Int32, max_new_tokens: int) -> bool:
        need = len(prompt_ids) + max_new_tokens
        if self.capacity is not None:
            if need > self.capacity:
                raise EngineFull(f"a search of {need} tokens does not fit into an engine of {self.capacity}")
            if sum(opened.reserved for opened in self._searches.values()) + need > self.capacity:
                return False
        self._searches[search] = _Opened(self.decode(prompt_ids), len(prompt_ids), need)
        return True

    def submit(self, request: Request) -> None:
        if request.search not in self._searches:
            raise KeyError(f"search {request.search} is not open")
        self._queue.append(request)

    def poll(self) -> list[Reply]:
        if self.shuffle is not None:
            salt = self.shuffle
            self._queue.sort(key=lambda request: hash64(salt, request.id))
        count = len(self._queue) if self.per_poll is None else self.per_poll
        batch, self._queue = self._queue[:count], self._queue[count:]
        return [self._answer(request) for request in batch]

    def cancel(self, request_id: int) -> None:
        self._queue = [request for request in self._queue if request.id != request_id]

    def close(self, search: int) -> None:
        del self._searches[search]
        self._queue = [request for request in self._queue if request.search != search]

    def load(self, path: str, version: int) -> None:  # noqa: ARG002 - a script has no weights
        if self._searches:
            raise RuntimeError("weights cannot be changed while a search is open")
        self.version = version

    def _token(self, word: str) -> int:
        token = (zlib.crc32(word.encode()) & 0x7FFFFFFF) or 1
        if self._words.setdefault(token, word) != word:
            raise ValueError(f"words {word!r} and {self._words[token]!r} have the same token id: rename one")
        return token

    def _answer(self, request: Request) -> Reply:
        error = self.fail(request) if self.fail is not None else None
        if error is not None:
            return Reply(request, (), error=error)
        opened = self._searches[request.search]
        key = request.prefix.tobytes()
        state = self._states.get((opened.prompt, key))
        if state is None:
            state = self._states[(opened.prompt, key)] = self._read(opened, request.prefix)
        weights, behavior = state.probabilities, None
        if (request.temperature, request.top_p) != (1.0, 1.0):
            weights, behavior = self._temper(state, request.temperature, request.top_p)
        if request.exclude:
            if behavior is not None:
                raise ValueError("steps are excluded at temperature 1 and top_p 1 only")
            weights, behavior = self._without(state, request.exclude)
        bounds = list(accumulate(weights))
        steps = []
        for sample in range(request.n):
            point = uniform(request.seed, sample, 0) * bounds[-1]
            index = min(bisect_right(bounds, point), len(bounds) - 1)
            step = self._step(opened, state, index, None if behavior is None else behavior[index], request)
            self.sampled += len(step.token_ids)
            opened.known.add(key + step.token_ids.tobytes())
            steps.append(step)
        length = len(request.prefix)
        cached = length if key in opened.known else 0
        opened.known.add(key)
        return Reply(request, tuple(steps), state.value, prompt=length - cached, cached=cached)

    def _step(self, opened: _Opened, state: _State, index: int, behavior: Float32 | None, request: Request) -> Step:
        option = state.options[index]
        if len(option.token_ids) > request.max_tokens:
            end = request.max_tokens
            return Step(
                self.decode(option.token_ids[:end]),
                option.token_ids[:end],
                option.logprobs[:end],
                Stop.LENGTH,
                state.value,
                None if behavior is None else behavior[:end],
            )
        value = state.values.get(option.text)
        if value is None:
            value = state.values[option.text] = self.head(opened.prompt, (*state.steps, option.text))
        return Step(option.text, option.token_ids, option.logprobs, option.stop, value, behavior)

    def _read(self, opened: _Opened, prefix: Int32) -> _State:
        steps: list[str] = []
        words: list[str] = []
        for token in prefix[opened.prompt_length :].tolist():
            if token == EOS:
                raise ValueError("nothing can follow a finished path: its last token is EOS")
            words.append(self._words[token])
            if token == self._delimiter:
                steps.append(" ".join(words))
                words = []
        if words:
            raise ValueError(f"the prefix ends within a step: {' '.join(words)!r}")
        given = self.script(opened.prompt, tuple(steps))
        total = sum(given.values())
        if not given or not math.isclose(total, 1.0, rel_tol=1e-9):
            raise ValueError(f"the script's probabilities after {steps} sum to {total}, not to 1")
        probabilities = list(given.values())
        tokens = []
        for text in given:
            ids = [self._token(word) for word in text.split()]
            tokens.append(ids if ids and ids[-1] == self._delimiter else [*ids, EOS])
        options = [
            _Option(
                text,
                np.array(ids, dtype=np.int32),
                logprobs,
                Stop.EOS if ids[-1] == EOS else Stop.DELIMITER,
            )
            for text, ids, logprobs in zip(given, tokens, _chain_rule(tokens, probabilities), strict=True)
        ]
        return _State(tuple(steps), options, probabilities, self.head(opened.prompt, tuple(steps)))

    @staticmethod
    def _without(state: _State, exclude: Sequence[Drawn]) -> tuple[list[float], list[Float32] | None]:
        """Probabilities and behaviour log-probabilities of the options that are not excluded."""
        gone = {drawn.token_ids for drawn in exclude}
        pairs = zip(state.options, state.probabilities, strict=True)
        left = [0.0 if tuple(option.token_ids.tolist()) in gone else p for option, p in pairs]
        total = sum(left)
        if total < MIN_UNSEEN:
            return state.probabilities, None
        weights = [p / total for p in left]
        return weights, _chain_rule([option.token_ids.tolist() for option in state.options], weights)

    def _temper(self, state: _State, temperature: float, top_p: float) -> tuple[list[float], list[Float32]]:
        """Probabilities and behaviour log-probabilities of the options as they are sampled."""
        found = state.tempered.get((temperature, top_p))
        if found is not None:
            return found
        p = state.probabilities
        if temperature == 0.0:
            weights = [0.0] * len(p)
            weights[p.index(max(p))] = 1.0
        else:
            weights = [x ** (1.0 / temperature) for x in p]
            total = sum(weights)
            weights = [w / total for w in weights]
            kept, mass = set(), 0.0
            for index in sorted(range(len(p)), key=lambda i: (-weights[i], i)):
                if mass >= top_p:
                    break
                kept.add(index)
                mass += weights[index]
            weights = [w / mass if index in kept else 0.0 for index, w in enumerate(weights)]
        tokens = [option.token_ids.tolist() for option in state.options]
        found = state.tempered[(temperature, top_p)] = (weights, _chain_rule(tokens, weights))
        return found


def _chain_rule(tokens: list[list[int]], probabilities: list[float]) -> list[Float32]:
    """Log-probability of each token given the tokens before it, for each option: float32 [T], nats. -inf from
    the first token on that no option of positive probability has."""
    mass: dict[tuple[int, ...], float] = {}
    for ids, p in zip(tokens, probabilities, strict=True):
        for end in range(len(ids) + 1):
            mass[tuple(ids[:end])] = mass.get(tuple(ids[:end]), 0.0) + p
    rows = []
    for ids in tokens:
        row = []
        for end in range(1, len(ids) + 1):
            before, after = mass[tuple(ids[: end - 1])], mass[tuple(ids[:end])]
            row.append(math.log(after / before) if after > 0.0 else -math.inf)
        rows.append(np.array(row, dtype=np.float32))
    return rows
