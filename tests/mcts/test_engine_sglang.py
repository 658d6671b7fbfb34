"""The server engine in front of a server that answers as SGLang does, real byte-pair tokenizer included."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mcts.engines.server import ServerEngine
from mcts.types import Request, Stop
from tests.mcts.engine_contract import EngineContract, drain
from tests.mcts.fake_server import log_odds
from tests.mcts.fake_sglang import FakeSGLang
from tests.mcts.served import ask, make
from tests.models import bpe_tokenizer, save_model

PROMPT = "How many clips did she sell?\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a byte-pair tokenizer."""
    return save_model(tmp_path_factory.mktemp("sglang"), tok=bpe_tokenizer())


@pytest.fixture
def server() -> Iterator[FakeSGLang]:
    tok = bpe_tokenizer()
    made = FakeSGLang(tok, tok.eos_token_id)
    made.likely = (tok.eos_token_id, *tok("\n")["input_ids"])
    yield made
    made.stop()


@pytest.fixture
def engine(server: FakeSGLang, folder: Path) -> Iterator[ServerEngine]:
    made = make(server, folder, delimiter="\n", service={"dialect": "sglang"})
    yield made
    made.shutdown()


@pytest.fixture
def prompt() -> str:
    return PROMPT


class TestContract(EngineContract):
    values = False

    def test_a_reply_holds_n_steps_of_at_most_max_tokens_in_a_consistent_shape(self, engine: Any, prompt: str) -> None:
        """The prefix is read once per sample."""
        ids = engine.encode(prompt)
        assert engine.open(1, ids, 200)
        engine.submit(Request(1, 1, ids, 5, 7, seed=3))
        reply = drain(engine, 1)[1]
        assert (reply.error, len(reply.steps), reply.prompt + reply.cached) == (None, 5, 5 * len(ids))
        engine.close(1)


def test_sglang_is_asked_for_token_ids_since_what_it_writes_for_a_piece_of_a_character_is_another_token(
    server: FakeSGLang, engine: ServerEngine
) -> None:
    piece = engine.text.encode("\u00e9")[0]
    server.likely = (*server.likely, int(piece))
    reply = ask(engine, PROMPT, n=12)
    assert reply.error is None
    assert any(piece in step.token_ids for step in reply.steps)
    assert server.written(int(piece)) == "\u00c3"


def test_samples_differ_although_sglang_draws_all_of_a_call_from_one_seed(
    server: FakeSGLang, engine: ServerEngine
) -> None:
    reply = ask(engine, PROMPT, n=12)
    assert len({step.token_ids.tobytes() for step in reply.steps}) > 6
    assert [body["n"] for body in server.seen] == [1] * 12
    assert len({body["seed"] for body in server.seen}) == 12


def test_a_delimiter_that_is_drawn_in_more_pieces_than_its_tokenizer_writes_it_with_ends_the_step(
    server: FakeSGLang, folder: Path
) -> None:
    engine = make(server, folder, delimiter="####", service={"dialect": "sglang"})
    sign, whole = engine.text.encode("#").tolist(), engine.text.encode("####").tolist()
    assert len(sign) == len(whole) == 1
    server.only = sign[0]
    reply = ask(engine, PROMPT, n=2, max_tokens=12)
    assert [(step.token_ids.tolist(), step.stop) for step in reply.steps] == [(sign * 4, Stop.DELIMITER)] * 2


def test_steps_hold_the_tokens_and_log_probabilities_that_were_drawn(server: FakeSGLang, engine: ServerEngine) -> None:
    ids = engine.encode(PROMPT)
    stops = set()
    for step in ask(engine, PROMPT, n=40).steps:
        path = ids.tolist()
        for token, logprob in zip(step.token_ids.tolist(), step.logprobs, strict=True):
            assert logprob == pytest.approx(log_odds(path, server.size, server.likely, 0)[token], abs=1e-5)
            path.append(token)
        stops.add(step.stop)
    assert stops == set(Stop)


def test_a_temperature_under_which_sglang_scales_its_log_probabilities_is_refused(
    server: FakeSGLang, engine: ServerEngine
) -> None:
    assert "draw at temperature 1 or 0" in str(ask(engine, PROMPT, temperature=0.5).error)
    assert server.seen == [], "nothing was drawn"
    assert ask(engine, PROMPT, temperature=0.0).error is None
    assert ask(engine, PROMPT, top_p=0.9).error is None


def test_a_prefix_that_ends_inside_a_character_gets_whole_steps(server: FakeSGLang, engine: ServerEngine) -> None:
    prefix = np.append(engine.encode(PROMPT), engine.encode("\u00e9")[:1]).astype(np.int32)
    assert engine.decode(prefix).endswith("\ufffd")
    server.likely = (*server.likely, *engine.encode("\u00e9").tolist())
    reply = ask(engine, PROMPT, prefix=prefix, n=24, max_tokens=12)
    assert reply.error is None
    assert len(server.seen) == 24
