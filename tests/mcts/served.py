"""A server engine in front of the local server that misbehaves on demand, for the tests of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mcts.engines.server import ServerEngine, Service
from mcts.engines.server_http import Client, Patience
from mcts.engines.server_text import Text
from mcts.types import Reply, Request
from tests.mcts.engine_contract import drain
from tests.mcts.fake_server import FakeServer

QUICK = Patience(in_flight=8, deadline=30.0, attempts=3, backoff=1e-4, longest_backoff=1e-3, down=60.0)
PROMPT = "3 7 12 -> 33 :"
EOS = 1


def make(server: FakeServer, folder: Path, patience: Patience = QUICK, **options: Any) -> ServerEngine:
    service = Service("tiny", **options.pop("service", {}))
    text = Text(folder, options.pop("delimiter", ";"))
    kept = {"context": 256, "kv_slots": 2048, **options}
    return ServerEngine(Client(server.url, patience), service, text, **kept)


def ask(engine: ServerEngine, prompt: str = PROMPT, **options: Any) -> Reply:
    """One request after `prompt`, in a search of its own."""
    ids = engine.encode(prompt)
    assert engine.open(9, ids, 500)
    fields: dict[str, Any] = {"prefix": ids, "n": 3, "max_tokens": 6, "seed": 4, **options}
    engine.submit(Request(1, 9, **fields))
    reply = drain(engine, 1)[1]
    engine.close(9)
    return reply
