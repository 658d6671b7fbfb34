"""What the tests of the server engine share; other modules have an engine of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mcts.engines.server import ServerEngine
from tests.mcts.fake_server import FakeServer
from tests.mcts.served import EOS, PROMPT, make
from tests.models import save_model, tokenizer, words


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer and a value head."""
    return save_model(tmp_path_factory.mktemp("served"))


@pytest.fixture
def server() -> Iterator[FakeServer]:
    tok = tokenizer(words())
    made = FakeServer(tok, EOS)
    made.likely = (EOS, tok.convert_tokens_to_ids(";"))
    yield made
    made.stop()


@pytest.fixture
def engine(server: FakeServer, folder: Path) -> Iterator[ServerEngine]:
    made = make(server, folder)
    yield made
    made.shutdown()


@pytest.fixture
def prompt() -> str:
    return PROMPT
