"""ServerEngine: steps drawn by an OpenAI-compatible server (vLLM, SGLang and others).

The server's own prefix cache shares keys and values along the tree (DESIGN.md, decision 8); nothing is promised of
bits. What was asked is checked against what came back, and a request whose answer is not what was asked ends with an
error that names the omission. A server that dies and comes back within `Patience.down` costs time only: it gets the
weights again that were loaded into it, and the same calls are sent again with the same seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from mcts.engines.base import EngineFull
from mcts.engines.server_asked import Asked, Begun, Omission, OtherWeights
from mcts.engines.server_dialects import DIALECTS
from mcts.engines.server_http import Answer, Client, Failure
from mcts.engines.server_protocol import payload, read
from mcts.engines.server_text import Text
from mcts.engines.server_value import LocalValue, ServedValue
from mcts.engines.server_weights import Reload, Weights, label
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
    """One call per sample, for servers that ignore `n`. Greedy requests are always split (vLLM refuses them else), and
    so are all of a dialect that is `single`."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More fields of the call."""


@dataclass(slots=True)
class _Active:
    """A request under way and its calls, by number; `open` are those without an answer."""

    request: Request
    asked: list[Asked] = field(default_factory=list)
    open: set[int] = field(default_factory=set)
    steps: dict[int, Step] = field(default_factory=dict)
    """By number of the sample."""
    prompt: int = 0
    cached: int = 0
    answered: int = 0
    """Calls whose answer was read."""
    drawn: int = 0
    """Tokens in those answers."""
    untold_calls: int = 0
    untold_tokens: int = 0

    def leave_out(self, calls: int, each: int) -> None:
        """So many calls may have drawn up to `each` tokens and never said how many."""
        self.untold_calls += calls
        self.untold_tokens += calls * each

    def reply(self) -> Reply:
        return Reply(
            self.request, tuple(self.steps[i] for i in range(self.request.n)), prompt=self.prompt, cached=self.cached,
            uncounted_calls=self.untold_calls, uncounted_tokens=self.untold_tokens,
        )  # fmt: skip

    def failed(self, why: str) -> Reply:
        """The reply without steps: what was drawn for them is in no reply either."""
        return Reply(
            self.request, (), prompt=self.prompt, cached=self.cached, error=why,
            uncounted_calls=self.untold_calls + self.answered, uncounted_tokens=self.untold_tokens + self.drawn,
        )  # fmt: skip


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
        self._loaded: str | None = None
        """Folder of the weights that the server was given."""
        self._searches: dict[int, tuple[bytes, int]] = {}  # prompt, reserved tokens
        self._requests: dict[int, _Active] = {}
        self._valued: dict[int, _Active] = {}  # drawn, waiting for the reward model
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
            raise EngineFull(
                f"a prompt of {len(prompt_ids)} tokens leaves no room in a context of {self.context}: raise max_context"
            )
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
        active = [*self._requests.values(), *self._valued.values()]
        for request in [a.request for a in active] + [reply.request for reply in self._ready]:
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
        self.version, self._loaded = version, path
        self.client.lost, self.client.holds = False, True

    def _prove_again(self) -> None:
        """The server was gone: whatever answers now gets the weights again, where it lacks them, before it draws."""
        assert self._reload is not None
        assert self._loaded is not None
        self.client.lost = False
        try:
            Weights(self.client.beside(), self.service.model, self._reload).keep(self._loaded, self.version)
        except SettingError as error:
            self.client.lost = True
            for active in list(self._requests.values()):
                self._fail(active, str(error))
        else:
            self.client.up()

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
        kind = DIALECTS[self.service.dialect]
        if kind.scaled and request.temperature not in (0.0, 1.0):
            why = (
                f"SGLang would return log-probabilities under temperature {request.temperature:g} and not the model's: "
                "draw at temperature 1 or 0"
            )
            self._ready.append(Reply(request, (), error=why))
            return
        greedy = request.temperature == 0.0
        bent = request.temperature != 1.0 or request.top_p != 1.0
        prefix, tokens = tuple(request.prefix.tolist()), min(request.max_tokens, room)
        size = 1 if greedy or self.service.split or kind.single else request.n
        active = self._requests[request.id] = _Active(request)
        try:
            for first in range(0, request.n, size):
                asked = Asked(self.service.model, prefix, size, tokens, greedy, bent, first, version=self._named())
                self._send(active, asked)
        except Omission as error:
            self._fail(active, str(error))

    def _named(self) -> str | None:
        """How answers name the weights that were loaded."""
        if self._loaded is None or self._reload is None or self._reload.check != "version":
            return None
        return label(self._loaded, self.version)

    def _send(self, active: _Active, asked: Asked) -> None:
        written, service = None, self.service
        if service.prompt == "text":
            written = self.text.plain(asked.prefix)
            if written is None:
                raise Omission("the prefix's text would be read as other tokens: use a server that takes token ids")
        number = len(active.asked)
        active.asked.append(asked)
        active.open.add(number)
        body = payload(active.request, asked, self.text, service.dialect, written, service.extra)
        self.client.send((active.request.id, number), "/v1/completions", body)

    def cancel(self, request_id: int) -> None:
        active = self._requests.pop(request_id, None)
        if active is not None:
            self._drop(active)
        if self._valued.pop(request_id, None) is not None and self._value_client is not None:
            self._value_client.cancel(request_id)
        self._ready = [reply for reply in self._ready if reply.request.id != request_id]

    def _drop(self, active: _Active) -> None:
        """Cancel the calls that are open."""
        for number in active.open:
            active.leave_out(self.client.cancel((active.request.id, number)), active.asked[number].most)
        active.open.clear()

    def _fail(self, active: _Active, why: str) -> None:
        """End a request without steps."""
        del self._requests[active.request.id]
        self._drop(active)
        self._ready.append(active.failed(why))

    def poll(self) -> list[Reply]:
        """Wait for the server until some request finishes (at most a second, but for one that was gone and is given its
        weights again); the requests that finished."""
        busy = bool(self._requests or self._valued)
        if busy and not self._ready:
            # With both kinds of call open each is looked at in turn, for a short time.
            both = bool(self._requests) and bool(self._valued)
            wait = 0.02 if both else _PATIENCE
            if self._requests and self.client.lost and self._loaded is not None:
                self._prove_again()
            if self._requests:
                for answer in self.client.poll(wait):
                    self._drew(answer)
            if self._valued and self._value_client is not None:
                for answer in self._value_client.poll(0.0 if self._ready else wait):
                    self._got_values(answer)
        replies, self._ready = self._ready, []
        return replies

    def shutdown(self) -> None:
        """Drop every call."""
        self.client.close()
        if self._value_client is not None:
            self._value_client.close()

    # ---- answers

    def _drew(self, answer: Answer) -> None:
        request_id, number = cast(tuple[int, int], answer.key)
        active = self._requests.get(request_id)
        if active is None:
            return  # a call of a request that has failed already
        asked = active.asked[number]
        active.open.discard(number)
        active.leave_out(answer.untold, asked.most)
        try:
            self._take(active, asked, answer.value)
        except Omission as error:
            self._fail(active, str(error))
            return
        if not active.open:
            del self._requests[request_id]
            self._value_of(active)

    def _take(self, active: _Active, asked: Asked, value: object) -> None:
        """Keep what a call drew, and go on with the steps that the server ended too early."""
        if isinstance(value, Failure):
            raise Omission(value.why)
        try:
            drew = read(value, asked, self.text)
        except OtherWeights:
            active.leave_out(1, asked.most)
            self.client.lost = True
            if asked.again:
                raise
            self._send(active, replace(asked, again=True))
            return
        except Omission:
            active.leave_out(1, asked.most)
            raise
        active.answered += 1
        active.drawn += drew.drawn
        active.prompt += drew.prompt
        active.cached += drew.cached
        for choice, step in enumerate(drew.steps):
            if isinstance(step, Begun):
                self._send(active, asked.behind(choice, step))
            else:
                active.steps[asked.first + choice] = step

    def _value_of(self, active: _Active) -> None:
        """Values of the prefix and of every step but those that ended by EOS (their reward is known otherwise)."""
        reply = active.reply()
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
        self._valued[reply.request.id] = active
        self._value_client.send(reply.request.id, self._value.path, self._value.payload(inputs))

    def _got_values(self, answer: Answer) -> None:
        active = self._valued.pop(cast(int, answer.key))
        reply = active.reply()
        assert isinstance(self._value, ServedValue)
        try:
            if isinstance(answer.value, Failure):
                raise Omission(answer.value.why)
            values = self._value.read(answer.value, len(_sequences(reply)))
        except Omission as error:
            self._ready.append(active.failed(str(error)))
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
