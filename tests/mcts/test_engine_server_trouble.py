"""The server engine where a server is slow, breaks off, refuses or dies."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest

from mcts.engines.server import ServerEngine
from mcts.engines.server_http import Client, Failure, Patience
from mcts.types import Request, SettingError
from tests.mcts.engine_contract import drain
from tests.mcts.fake_server import FakeServer
from tests.mcts.served import PROMPT, QUICK, ask, make


@pytest.mark.parametrize("fault", ["500", "cut", "truncate", "half", "latin", "chunks", "negative", "head", "429"])
def test_a_fault_that_passes_costs_time_only(server: FakeServer, engine: ServerEngine, fault: str) -> None:
    plain = ask(engine)
    server.faults = deque([fault, fault])
    again = ask(engine)
    assert again.error is None
    assert [s.token_ids.tolist() for s in again.steps] == [s.token_ids.tolist() for s in plain.steps]
    assert engine.client.retries == 2
    lost = 0 if fault == "429" else 2  # by 429 a server says that it did not take the call
    assert (again.uncounted_calls, again.uncounted_tokens) == (lost, lost * 18)


@pytest.mark.parametrize("fault", ["500", "cut", "truncate", "half"])
def test_a_fault_that_stays_ends_the_request_after_the_attempts(
    server: FakeServer, engine: ServerEngine, fault: str
) -> None:
    server.always = fault
    reply = ask(engine)
    assert "failed 3 times" in str(reply.error)
    assert (reply.uncounted_calls, reply.uncounted_tokens) == (3, 54)
    assert len(server.seen) == 3


def test_a_refused_call_is_not_repeated(server: FakeServer, engine: ServerEngine) -> None:
    server.always = "400"
    reply = ask(engine)
    assert "status 400" in str(reply.error)
    assert reply.uncounted_calls == 0
    assert len(server.seen) == 1


def test_a_call_past_its_deadline_is_cut_and_repeated(server: FakeServer, folder: Path) -> None:
    engine = make(server, folder, Patience(deadline=2.0, attempts=3, backoff=1e-4, longest_backoff=1e-3))
    server.faults = deque(["slow"])
    reply = ask(engine)
    assert reply.error is None
    assert (reply.uncounted_calls, reply.uncounted_tokens) == (1, 18), (
        "the server may have drawn for the first exchange"
    )
    engine = make(server, folder, Patience(deadline=0.05, attempts=3, backoff=1e-4, longest_backoff=1e-3))
    server.always = "slow"
    assert "no answer within 0.05 s" in str(ask(engine).error)


@pytest.mark.parametrize("fault", ["slow_head", "trickle"])
def test_an_answer_that_never_ends_is_cut_at_its_deadline(server: FakeServer, fault: str) -> None:
    """Also one whose end is the connection's, and one that looks whole where it was cut."""
    server.always = fault
    client = Client(server.url, Patience(deadline=0.2, attempts=2, backoff=1e-4, longest_backoff=1e-3))
    client.send("a", "/v1/completions", {"prompt": [1]})
    answers = [answer for _ in range(50) for answer in client.poll(0.2)]
    client.close()
    assert [type(answer.value) for answer in answers] == [Failure]
    assert "no answer within 0.2 s" in answers[0].value.why


def test_a_server_that_dies_and_comes_back_costs_time_only(server: FakeServer, engine: ServerEngine) -> None:
    plain = ask(engine)
    ids = engine.encode(PROMPT)
    assert engine.open(1, ids, 1000)
    server.die()
    for i in range(4):
        engine.submit(Request(i, 1, ids, 3, 6, seed=4))
    while engine.client.retries < 6:  # it has been refused several times
        assert engine.poll() == []
    server.start()
    for reply in drain(engine, 4).values():
        assert [s.token_ids.tolist() for s in reply.steps] == [s.token_ids.tolist() for s in plain.steps]


def test_a_server_that_stays_down_ends_every_request_with_its_reason(server: FakeServer, folder: Path) -> None:
    engine = make(server, folder, Patience(down=0.0, backoff=1e-4, longest_backoff=1e-3))
    server.die()
    ids = engine.encode(PROMPT)
    assert engine.open(1, ids, 1000)
    for i in range(3):
        engine.submit(Request(i, 1, ids, 3, 6, seed=4))
    for reply in drain(engine, 3).values():
        assert "is down" in str(reply.error)
        assert reply.uncounted_calls == 0, "it never took a call"
        assert "refused" in str(reply.error)


def test_after_failures_in_a_row_one_call_alone_probes_the_server(server: FakeServer, folder: Path) -> None:
    patience = Patience(in_flight=8, attempts=50, trip=2, backoff=1e-4, longest_backoff=1e-3)
    client = Client(server.url, patience)
    server.faults = deque(["500"] * 20)
    engine = make(server, folder, patience)
    assert ask(engine, n=1, temperature=0.0).error is None  # opens the breaker: 20 failures, one call
    server.faults = deque(["500"] * 30)
    ids = engine.encode(PROMPT)
    assert engine.open(1, ids, 1000)
    engine.client._row = patience.trip  # the breaker is open when the calls come
    for i in range(8):
        engine.submit(Request(i, 1, ids, 1, 6, seed=4))
    most = 0
    while len(server.seen) < 40:
        engine.client.poll(0.001)
        most = max(most, len(engine.client._running))
    assert most == 1
    client.close()
    engine.shutdown()


def test_no_more_calls_are_under_way_than_allowed(server: FakeServer, folder: Path) -> None:
    engine = make(server, folder, Patience(in_flight=2))
    server.always = "slow"
    ids = engine.encode(PROMPT)
    assert engine.open(1, ids, 1000)
    for i in range(6):
        engine.submit(Request(i, 1, ids, 1, 6, seed=i))
    while len(server.seen) < 2:
        engine.client.poll(0.01)
    server.stall.set()
    assert len(drain(engine, 6)) == 6
    assert server.most == 2


def test_the_client_says_which_url_it_cannot_use() -> None:
    with pytest.raises(SettingError, match="http://host:port"):
        Client("localhost:8000")
    for url in ("http://127.0.0.1:99999", "http://127.0.0.1:port", "http://a..b:80"):
        with pytest.raises(SettingError, match="no such host or port"):
            Client(url)


def test_a_key_that_no_header_can_hold_is_refused() -> None:
    with pytest.raises(SettingError, match="line break"):
        Client("http://127.0.0.1:8000", api_key="secret\n")


def test_a_path_that_no_call_can_have_is_said(server: FakeServer) -> None:
    answer = Client(server.url + "/a b").call("/v1/models")
    assert isinstance(answer, Failure)
    assert "no call can go to" in answer.why


def test_a_redirect_is_refused_and_not_followed(server: FakeServer, engine: ServerEngine) -> None:
    server.always = "moved"
    assert "status 302: it points to http://elsewhere/" in str(ask(engine).error)
    assert len(server.seen) == 1


def test_a_refusal_names_the_address_that_was_called(server: FakeServer) -> None:
    answer = Client(server.url + "/v1", QUICK).call("/v1/completions", {})
    assert isinstance(answer, Failure)
    assert answer.why.startswith(f"{server.url}/v1/v1/completions refused the call with status 404")


def test_https_where_there_is_none_is_said_at_once(server: FakeServer) -> None:
    """Waiting would not help."""
    client = Client(server.url.replace("http:", "https:"), QUICK)
    answer = client.call("/v1/models")
    assert isinstance(answer, Failure)
    assert "speaks no https that can be trusted" in answer.why
    assert client.retries == 0


def test_that_a_server_is_waited_for_is_told_once(
    server: FakeServer, engine: ServerEngine, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults = deque(["429"] * 4)
    assert ask(engine).error is None
    assert [record.getMessage() for record in caplog.records] == [
        f'{server.url} takes no call (status 429: {{"error": "later"}}): it is waited for, 60 s at most'
    ]


def test_what_was_drawn_for_a_request_that_fails_is_uncounted(server: FakeServer, folder: Path) -> None:
    """Two calls, one after the other: the first is answered, the second refused."""
    engine = make(server, folder, Patience(in_flight=1), service={"split": True})
    server.faults = deque(["none", "400"])
    reply = ask(engine, n=2)
    assert "status 400" in str(reply.error)
    assert (reply.uncounted_calls, reply.uncounted_tokens) == (1, server.sampled)


def test_calls_that_are_cut_because_their_request_fails_are_uncounted(server: FakeServer, folder: Path) -> None:
    engine = make(server, folder, Patience(in_flight=2), service={"split": True})
    server.faults = deque(["slow", "slow"])
    ids = engine.encode(PROMPT)
    assert engine.open(1, ids, 500)
    engine.submit(Request(1, 1, ids, 3, 6, seed=4))
    while len(server.seen) < 2:
        engine.client.poll(0.01)
    active = engine._requests[1]
    engine._fail(active, "as if one of them was refused")
    (reply,) = engine.poll()
    assert (reply.uncounted_calls, reply.uncounted_tokens) == (2, 12), "two were sent, of six tokens each"


def test_a_client_forgets_a_cancelled_call(server: FakeServer) -> None:
    client = Client(server.url, QUICK)
    server.always = "slow"
    client.send("a", "/v1/completions", {"prompt": [1]})
    while not server.seen:
        client.poll(0.01)
    assert client.cancel("a") == 1, "it was sent, and what it cost stays untold"
    assert client.cancel("a") == 0
    assert client.poll(0.0) == []
    assert isinstance(client.call("/nowhere"), Failure)
