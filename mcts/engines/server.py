"""ServerEngine: steps drawn by an OpenAI-compatible server (vLLM, SGLang and others).

The server's own prefix cache shares keys and values along the tree (DESIGN.md, decision 8); nothing is promised of
bits. What was asked is checked against what came back, and a request whose answer is not what was asked ends with an
error that names the omission. A server that dies and comes back within `Patience.down` costs time only: the same
calls are sent again with the same seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mcts.engines.base import EngineFull
from mcts.engines.server_http import Client, Failure
from mcts.engines.server_protocol import Asked, Drew, Omission, payload, read
from mcts.engines.server_text import Text
from mcts.engines.server_value import LocalValue, ServedValue
from mcts.engines.server_weights import Reload, Weights
from mcts.types import Int32, Message, Reply, Request, SettingError, Step, Stop

_PATIENCE = 1.0
"""Seconds after which `poll` returns even if nothing has finished."""


@dataclass(frozen=True, slots=True)
class Service:
    """Which model a server serves, and how it is asked."""

    model: str
    """The served model's name."""
    dialect: Literal["vllm", "sglang", "openai"] = "vllm"
    prompt: Literal["token_ids", "text"] = "token_ids"
    """`text` for servers that take no token ids: a prefix whose text would be read as other tokens is refused."""
    split: bool = False
    """One call per sample, for servers that ignore `n`. Greedy requests are always split: vLLM refuses them else."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More fields of the call."""


@dataclass(slots=True)
class _Active:
    request: Request
    asked: list[Asked]
    drawn: dict[int, Drew] = field(default_factory=dict)  # part -> its answer


class ServerEngine:
    """An Engine (mcts.engines.base) in front of a server.

    `context`: longest sequence in tokens that the server takes.   `kv_slots`: tokens that open searches may reserve
    altogether; choose what the server's cache holds.   `value`: where values come from, None for none (NaN).
    `value_client`: the served reward model's.   `reload`: how new weights get there; None: `load` refuses.
    """

    name = "server"
    excludes = False

    def __init__(
        self,
        client: Client,
        service: Service,
        text: Text,
        *,
        context: int,
        kv_slots: int = 1 << 20,
        value: ServedValue | LocalValue | None = None,
        value_client: Client | None = None,
        reload: Reload | None = None,
        version: int = 0,
    ) -> None:
        if isinstance(value, ServedValue) and value_client is None:
            raise ValueError("a served value needs the client of its server")
        self.version = version
        self.client, self.service, self.text = client, service, text
        self.context, self.kv_slots = context, kv_slots
        self._value, self._value_client = value, value_client
        self._reload = reload
        self._searches: dict[int, tuple[bytes, int]] = {}  # prompt, reserved tokens
        self._requests: dict[int, _Active] = {}
        self._valued: dict[int, Reply] = {}  # drawn, waiting for the reward model
        self._ready: list[Reply] = []

    def encode(self, prompt: str | Sequence[Message]) -> Int32:
        return self.text.encode(prompt)

    def decode(self, token_ids: Int32) -> str:
        return self.text.decode(token_ids)

    # ---- searches

    def open(self, search: int, prompt_ids: Int32, max_new_tokens: int) -> bool:
        need = len(prompt_ids) + max_new_tokens
        if search in self._searches:
            raise ValueError(f"search {search} is open already: give every search its own number")
        if len(prompt_ids) < 1 or max_new_tokens < 1:
            raise ValueError("a search needs a prompt of at least one token and a budget of at least one token")
        if len(prompt_ids) >= self.context:
            raise EngineFull(f"a prompt of {len(prompt_ids)} tokens leaves no room in a context of {self.context}")
        if need > self.kv_slots:
            raise EngineFull(
                f"the search may need {need} tokens and the engine reserves {self.kv_slots}: raise kv_slots or lower "
                "the search's budget"
            )
        if sum(reserved for _, reserved in self._searches.values()) + need > self.kv_slots:
            return False
        self._searches[search] = (prompt_ids.tobytes(), need)
        return True

    def close(self, search: int) -> None:
        if search not in self._searches:
            raise ValueError(f"search {search} is not open: call open first")
        active = [a.request for a in self._requests.values()] + [r.request for r in self._valued.values()]
        for request in active + [reply.request for reply in self._ready]:
            if request.search == search:
                self.cancel(request.id)
        del self._searches[search]

    def load(self, path: str, version: int) -> None:
        """New weights on the server, proved to be there (server_weights), and in a local value head."""
        if self._searches:
            raise RuntimeError(f"{len(self._searches)} searches are open: close them before loading new weights")
        if self._reload is None:
            raise SettingError("new weights cannot reach the server: set engine.server.reload to say how it loads them")
        Weights(self.client, self.service.model, self._reload).load(path, version)
        if isinstance(self._value, LocalValue):
            self._value.load(path)
        self.version = version

    # ---- requests

    def submit(self, request: Request) -> None:
        """Send a request. ValueError where it breaks the protocol."""
        prompt = self._searches.get(request.search)
        if prompt is None:
            raise ValueError(f"search {request.search} is not open: call open first")
        if request.id in self._requests or request.id in self._valued:
            raise ValueError(f"request {request.id} is under way already: give every request its own number")
        if request.n < 1 or request.max_tokens < 1:
            raise ValueError("a request needs n >= 1 and max_tokens >= 1")
        if request.exclude:
            raise ValueError("a server cannot exclude steps")
        if not request.prefix.tobytes().startswith(prompt[0]):
            raise ValueError(f"request {request.id}: the prefix does not start with the prompt of its search")
        room = self.context - len(request.prefix)
        if room < 1:
            why = f"the prefix of {len(request.prefix)} tokens leaves no room in a context of {self.context}"
            self._ready.append(Reply(request, (), error=why))
            return
        written = None
        if self.service.prompt == "text":
            written = self.text.plain(request.prefix)
            if written is None:
                why = "the prefix's text would be read as other tokens: use a server that takes token ids"
                self._ready.append(Reply(request, (), error=why))
                return
        greedy = request.temperature == 0.0
        bent = request.temperature != 1.0 or request.top_p != 1.0
        sizes = [1] * request.n if greedy or self.service.split else [request.n]
        prefix, tokens = tuple(request.prefix.tolist()), min(request.max_tokens, room)
        asked = [Asked(self.service.model, prefix, size, tokens, greedy, bent) for size in sizes]
        self._requests[request.id] = _Active(request, asked)
        for part, one in enumerate(asked):
            service = self.service
            body = payload(request, one, self.text, part, service.dialect, written, service.extra)
            self.client.send((request.id, part), "/v1/completions", body)

    def cancel(self, request_id: int) -> None:
        active = self._requests.pop(request_id, None)
        if active is not None:
            for part in range(len(active.asked)):
                self.client.cancel((request_id, part))
        if self._valued.pop(request_id, None) is not None and self._value_client is not None:
            self._value_client.cancel(request_id)
        self._ready = [reply for reply in self._ready if reply.request.id != request_id]

    def poll(self) -> list[Reply]:
        """Wait for the server until some request finishes (at most a second); the requests that finished."""
        busy = bool(self._requests or self._valued)
        if busy and not self._ready:
            # With both kinds of call open each is looked at in turn, for a short time.
            both = bool(self._requests) and bool(self._valued)
            wait = 0.02 if both else _PATIENCE
            if self._requests:
                for key, answer in self.client.poll(wait):
                    self._drew(key, answer)
            if self._valued and self._value_client is not None:
                for key, answer in self._value_client.poll(0.0 if self._ready else wait):
                    self._got_values(key, answer)
        replies, self._ready = self._ready, []
        return replies

    def shutdown(self) -> None:
        """Drop every call."""
        self.client.close()
        if self._value_client is not None:
            self._value_client.close()

    # ---- answers

    def _drew(self, key: Any, answer: object) -> None:
        request_id, part = key
        active = self._requests.get(request_id)
        if active is None:
            return  # a part of a request that has failed already
        try:
            if isinstance(answer, Failure):
                raise Omission(answer.why)
            active.drawn[part] = read(answer, active.asked[part], self.text)
        except Omission as error:
            self.cancel(request_id)
            self._ready.append(Reply(active.request, (), error=str(error)))
            return
        if len(active.drawn) < len(active.asked):
            return
        del self._requests[request_id]
        parts = [active.drawn[i] for i in range(len(active.asked))]
        steps = tuple(step for drew in parts for step in drew.steps)
        prompt, cached = sum(drew.prompt for drew in parts), sum(drew.cached for drew in parts)
        self._value_of(Reply(active.request, steps, prompt=prompt, cached=cached))

    def _value_of(self, reply: Reply) -> None:
        """Values of the prefix and of every step but those that ended by EOS (their reward is known otherwise)."""
        if self._value is None:
            self._ready.append(reply)
            return
        sequences = _sequences(reply)
        if isinstance(self._value, LocalValue):
            self._ready.append(_with_values(reply, self._value.values(sequences)))
            return
        assert self._value_client is not None
        token_ids = self._value.send == "token_ids"
        inputs = sequences if token_ids else [self.text.decode(ids) for ids in sequences]
        self._valued[reply.request.id] = reply
        self._value_client.send(reply.request.id, self._value.path, self._value.payload(inputs))

    def _got_values(self, key: Any, answer: object) -> None:
        reply = self._valued.pop(key)
        assert isinstance(self._value, ServedValue)
        try:
            if isinstance(answer, Failure):
                raise Omission(answer.why)
            values = self._value.read(answer, len(_sequences(reply)))
        except Omission as error:
            self._ready.append(Reply(reply.request, (), error=str(error)))
            return
        self._ready.append(_with_values(reply, values))


def _sequences(reply: Reply) -> list[list[int]]:
    prefix = reply.request.prefix.tolist()
    return [prefix, *(prefix + step.token_ids.tolist() for step in reply.steps if step.stop is not Stop.EOS)]


def _with_values(reply: Reply, values: Sequence[float]) -> Reply:
    rest = iter(values[1:])
    steps: list[Step] = []
    for step in reply.steps:
        steps.append(replace(step, value=math.nan if step.stop is Stop.EOS else next(rest)))
    return replace(reply, steps=tuple(steps), prefix_value=values[0])
