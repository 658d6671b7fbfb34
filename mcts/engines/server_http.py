"""Many JSON calls to one HTTP server at once: bounded, with deadlines, retries and a circuit breaker.

A thread per call under way does nothing but the exchange; everything else happens in `poll`, in the caller's thread.
"""

from __future__ import annotations

import heapq
import http.client
import json
import logging
import math
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from mcts.rng import uniform
from mcts.types import SettingError

log = logging.getLogger(__name__)

LONGEST_ANSWER = 64 * 1024 * 1024
"""Bytes of an answer that are read at most."""
_BUSY = frozenset({408, 425, 429, 503})
"""Statuses by which a server asks to come back later."""
_AWAY = frozenset({502, 503, 504})
"""Statuses by which a proxy may say that the server behind it is gone."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that will get no answer; the sentence says why."""

    why: str


class Answer(NamedTuple):
    """What became of a call."""

    key: Hashable
    value: Any
    """The JSON value, or a Failure."""
    untold: int
    """Exchanges of the call that the server may have worked on and did not answer: it never said what they cost."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server is waited for. Seconds throughout."""

    in_flight: int = 32
    """Calls under way at once; more wait here, in order."""
    deadline: float = 300.0
    """Longest single exchange."""
    attempts: int = 5
    """Exchanges of one call that may break (500, cut connection, no valid JSON, deadline) before it fails."""
    down: float = 600.0
    """How long the server may refuse connections (or answer 429 or 503) before all waiting calls fail."""
    backoff: float = 0.25
    """First pause after a failure; doubled by each further one, times a random factor between 1/2 and 1."""
    longest_backoff: float = 15.0
    trip: int = 3
    """Failures in a row, over all calls, after which one call alone is sent until the server answers again."""


class _Abort(OSError):
    """The call was given up from outside its thread."""


@dataclass(slots=True, eq=False)
class _Call:
    key: Hashable
    method: str
    path: str
    body: bytes | None
    order: int
    broken: int = 0
    failures: int = 0
    deadline: float = math.inf
    cancelled: bool = False
    aborted: str | None = None
    sock: socket.socket | None = None
    """Once it is connected. Not the connection's, which lets go of it before a body that ends with the connection."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def hold(self, sock: socket.socket) -> None:
        with self.lock:
            if self.aborted is not None:
                raise _Abort(self.aborted)
            self.sock = sock

    def abort(self, why: str) -> None:
        """Cut the connection, which wakes the thread and tells the server to stop working on it."""
        with self.lock:
            self.aborted = why
            sock = self.sock
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # it was closed already


@dataclass(frozen=True, slots=True)
class _Outcome:
    kind: str
    """ok, refused (asking again is no use; `endless`: so is an answer that is too long), broken, or down (the server
    says that it did not take the call)."""
    value: Any
    wait: float = 0.0
    """Seconds that the server asked for."""
    away: bool = False
    """The server was gone: another process may answer from now on."""


class Client:
    """Calls to the server at `url` (http or https, a path before the endpoints is allowed). `seed` keys the jitter
    of the pauses; `api_key` is sent as a bearer token."""

    def __init__(
        self, url: str, patience: Patience | None = None, *, api_key: str | None = None, seed: int = 0
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingError(f"the server's url {url!r} must look like http://host:port")
        try:
            _, _ = parts.port, parts.hostname.encode("idna")
        except ValueError as error:
            raise SettingError(f"the server's url {url!r} has no such host or port: {error}") from error
        if api_key and not re.fullmatch(r"[!-~]+", api_key):
            raise SettingError("the key for the server holds a space, a line break or another odd character: mend it")
        self.url = url.rstrip("/")
        self.patience = patience or Patience()
        self.retries = 0
        """Exchanges that failed and were tried again."""
        self.lost = False
        """The server was gone for a moment since this was last cleared: another process may answer now."""
        self.holds = False
        """Send nothing while `lost`."""
        self._parts = parts
        self._api_key = api_key
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._seed = seed
        self._order = 0
        self._draws = 0
        self._calls: dict[Hashable, _Call] = {}
        self._waiting: list[tuple[float, int, _Call]] = []  # a heap by (due, order)
        self._running: set[_Call] = set()
        self._results: queue.SimpleQueue[tuple[_Call, _Outcome]] = queue.SimpleQueue()
        self._row = 0  # failures in a row
        self._down_since: float | None = None
        self._probe_at = 0.0

    def __len__(self) -> int:
        """Calls without an answer."""
        return len(self._calls)

    def beside(self) -> Client:
        """Another client of the same server, for calls between this one's."""
        return Client(self.url, self.patience, api_key=self._api_key, seed=self._seed)

    def send(self, key: Hashable, path: str, payload: Mapping[str, Any] | None = None) -> None:
        """Queue a call: POST with a JSON body, or GET without. Its answer comes out of `poll` under `key`."""
        if key in self._calls:
            raise ValueError(f"call {key!r} is under way already")
        body = None if payload is None else json.dumps(payload).encode()
        call = _Call(key, "GET" if body is None else "POST", path, body, self._order)
        self._order += 1
        self._calls[key] = call
        heapq.heappush(self._waiting, (0.0, call.order, call))
        self._dispatch()

    def cancel(self, key: Hashable) -> int:
        """Forget a call; unknown keys are ignored. Its exchanges that stay untold (`Answer`)."""
        call = self._calls.pop(key, None)
        if call is None:
            return 0
        call.cancelled = True
        call.abort("cancelled")
        return call.broken + (call in self._running and call.sock is not None)

    def poll(self, wait: float) -> list[Answer]:
        """Answers that came. Blocks at most `wait` seconds, and not at all where no call is open."""
        until = time.monotonic() + wait
        while True:
            done: list[Answer] = []
            while not self._results.empty():
                done += self._settle(*self._results.get())
            self._dispatch()
            now = time.monotonic()
            if done or not self._calls or now >= until or (self._held() and not self._running):
                return done
            for call in [call for call in self._running if call.deadline <= now]:
                call.deadline = math.inf
                call.abort(f"no answer within {self.patience.deadline:g} s")
            times = [until, *(call.deadline for call in self._running)]
            if self._waiting and len(self._running) < self._room() and not self._held():
                times.append(max(self._waiting[0][0], self._probe_at))
            try:
                call, outcome = self._results.get(timeout=max(0.0, min(times) - now))
            except queue.Empty:
                continue
            self._results.put((call, outcome))

    def call(self, path: str, payload: Mapping[str, Any] | None = None) -> Any:
        """One call, waited for; the JSON value or a Failure. Only while no other call is open, and never held."""
        if self._calls:
            raise RuntimeError("other calls are under way: finish them first")
        holds, self.holds = self.holds, False
        try:
            self.send("call", path, payload)
            while True:
                for answer in self.poll(1.0):
                    return answer.value
        finally:
            self.holds = holds

    def close(self) -> None:
        """Cancel everything."""
        for key in list(self._calls):
            self.cancel(key)

    # ---- when to send

    def _held(self) -> bool:
        return self.holds and self.lost

    def _room(self) -> int:
        return 1 if self._row >= self.patience.trip else self.patience.in_flight

    def _dispatch(self) -> None:
        now = time.monotonic()
        while self._waiting and len(self._running) < self._room() and not self._held():
            due, _, call = self._waiting[0]
            if call.cancelled:
                heapq.heappop(self._waiting)
                continue
            if max(due, self._probe_at) > now:
                return
            heapq.heappop(self._waiting)
            call.deadline, call.aborted, call.sock = now + self.patience.deadline, None, None
            self._running.add(call)
            threading.Thread(target=self._work, args=(call,), name="server-call", daemon=True).start()

    def _settle(self, call: _Call, outcome: _Outcome) -> list[Answer]:
        """What an exchange's outcome means for its call, and for the others."""
        self._running.discard(call)
        if call.cancelled:
            return []
        if outcome.kind in ("ok", "refused", "endless"):
            self.up()
            del self._calls[call.key]
            return [Answer(call.key, outcome.value, call.broken + (outcome.kind == "endless"))]
        now, patience = time.monotonic(), self.patience
        self._row += 1
        call.failures += 1
        pause = max(outcome.wait, self._pause(call.failures))
        if outcome.kind == "broken":
            call.broken += 1
            if call.broken >= patience.attempts:
                del self._calls[call.key]
                why = f"{self.url}{call.path} failed {call.broken} times, lastly: {outcome.value}"
                return [Answer(call.key, Failure(why), call.broken)]
        else:
            if self._down_since is None:
                self._down_since = now
                log.warning(
                    "%s takes no call (%s): it is waited for, %g s at most", self.url, outcome.value, patience.down
                )
            if now - self._down_since >= patience.down:
                why = f"the server at {self.url} is down for {patience.down:g} s ({outcome.value}): start it and go on"
                return self._give_up(why)
        if self._row >= patience.trip:
            self._probe_at = now + max(outcome.wait, self._pause(self._row - patience.trip + 1))
        self.retries += 1
        heapq.heappush(self._waiting, (now + pause, call.order, call))
        return []

    def up(self) -> None:
        """The server was seen to answer, or is waited for no more: failures are counted anew."""
        self._row, self._down_since, self._probe_at = 0, None, 0.0

    def _give_up(self, why: str) -> list[Answer]:
        self.up()
        return [Answer(key, Failure(why), self.cancel(key)) for key in list(self._calls)]

    def _pause(self, failures: int) -> float:
        longest = min(self.patience.longest_backoff, self.patience.backoff * 2.0 ** min(failures - 1, 30))
        self._draws += 1
        return longest * (0.5 + 0.5 * uniform(self._seed, self._draws))

    # ---- one exchange, in its own thread

    def _work(self, call: _Call) -> None:
        try:
            outcome = self._exchange(call)
        except ConnectionRefusedError as error:
            outcome = _Outcome("down", f"connection refused ({error.strerror})", away=True)
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            # the last two are what http.client and ssl make of odd chunk sizes and of sockets closed under them
            if isinstance(error, http.client.InvalidURL):
                self._results.put((call, _Outcome("refused", Failure(f"no call can go to {self.url}: {error}"))))
                return
            if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
                why = f"{self.url} speaks no https that can be trusted ({error}): mend the url or the certificate"
                self._results.put((call, _Outcome("refused", Failure(why))))
                return
            connected = call.sock is not None
            late = isinstance(error, TimeoutError)
            said = f"no answer within {self.patience.deadline:g} s" if late else f"{type(error).__name__}: {error}"
            why = call.aborted or said
            away = call.aborted is None and not late
            outcome = _Outcome("broken" if connected or call.aborted else "down", why, away=away)
        if outcome.away:  # at once, so that no call is sent after it
            self.lost = True
        self._results.put((call, outcome))

    def _exchange(self, call: _Call) -> _Outcome:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        assert self._parts.hostname is not None
        connection = kind(self._parts.hostname, self._parts.port, timeout=self.patience.deadline)
        try:
            connection.connect()
            call.hold(connection.sock)
            connection.request(call.method, self._parts.path.rstrip("/") + call.path, call.body, self._headers)
            response = connection.getresponse()
            data = response.read(LONGEST_ANSWER + 1)
        finally:
            connection.close()
        if call.aborted is not None:  # what was read may look whole
            raise _Abort(call.aborted)
        if (
            not data
            and response.status == 200
            and not (response.chunked or response.getheader("Content-Length") == "0")
        ):
            raise http.client.IncompleteRead(data)  # cut off within the head, or behind it
        return _judge(f"{self.url}{call.path}", response, data)


def _judge(url: str, response: http.client.HTTPResponse, data: bytes) -> _Outcome:
    status, retry_after = response.status, response.getheader("Retry-After")
    text, away = " ".join(data[:400].decode("utf-8", "replace").split()), status in _AWAY
    if status in _BUSY:
        wait = float(retry_after) if retry_after is not None and retry_after.isdecimal() else 0.0
        return _Outcome("down", f"status {status}: {text}", min(wait, 60.0), away)
    if status >= 500:
        return _Outcome("broken", f"status {status}: {text}", away=away)
    if status >= 300 or status < 200:
        moved = response.getheader("Location")
        said = text if moved is None else f"it points to {moved[:300]}, and no call is sent elsewhere: mend the url"
        return _Outcome("refused", Failure(f"{url} refused the call with status {status}: {said}"))
    if len(data) > LONGEST_ANSWER:
        return _Outcome("endless", Failure(f"the server's answer is longer than {LONGEST_ANSWER} bytes"))
    if not data.strip():
        return _Outcome("ok", None)  # reload endpoints answer with an empty body
    try:
        return _Outcome("ok", json.loads(data))
    except (ValueError, RecursionError):
        return _Outcome("broken", f"the answer is no valid JSON (cut off?): {text[:80]}")
