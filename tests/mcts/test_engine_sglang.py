"""The server engine in front of a server that answers as SGLang does, real byte-pair tokenizer included."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mcts.engines.server import ServerEngine
from mcts.engines.server_asked import Asked
from mcts.engines.server_reading import ending
from mcts.engines.server_text import Text
from mcts.engines.server_weights import SGLANG
from mcts.types import Request, Stop
from tests.mcts.engine_contract import EngineContract, drain
from tests.mcts.fake_server import log_odds
from tests.mcts.fake_sglang import FakeSGLang, said
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


def test_a_server_that_is_started_anew_with_other_weights_gets_its_weights_again_before_it_draws(
    server: FakeSGLang, folder: Path
) -> None:
    engine = make(server, folder, delimiter="\n", service={"dialect": "sglang"}, reload=SGLANG)
    engine.load(str(folder), 3)
    plain = ask(engine, PROMPT)
    server.restart()
    server.faults.append("cut")  # what a call under way sees of it
    again = ask(engine, PROMPT)
    assert (again.error, server.reloads, server.version) == (None, 2, 3)
    assert [s.token_ids.tolist() for s in again.steps] == [s.token_ids.tolist() for s in plain.steps]


def test_a_server_that_was_only_out_of_reach_keeps_its_weights(server: FakeSGLang, folder: Path) -> None:
    engine = make(server, folder, delimiter="\n", service={"dialect": "sglang"}, reload=SGLANG)
    engine.load(str(folder), 3)
    server.die()
    ids = engine.encode(PROMPT)
    assert engine.open(1, ids, 500)
    engine.submit(Request(1, 1, ids, 2, 6, seed=4))
    while not engine.client.lost:
        engine.client.poll(0.01)
    server.start()
    assert drain(engine, 1)[1].error is None
    assert server.reloads == 1


def test_what_other_weights_drew_is_drawn_again_with_those_that_were_loaded(server: FakeSGLang, folder: Path) -> None:
    """Started anew while no call was under way: the answers alone tell."""
    engine = make(server, folder, delimiter="\n", service={"dialect": "sglang"}, reload=SGLANG)
    engine.load(str(folder), 3)
    plain = ask(engine, PROMPT)
    server.restart()
    again = ask(engine, PROMPT)
    assert (again.error, server.reloads) == (None, 2)
    assert [s.token_ids.tolist() for s in again.steps] == [s.token_ids.tolist() for s in plain.steps]
    assert again.uncounted_calls >= 1


def test_the_weights_of_another_run_are_other_weights_although_their_version_is_the_same(
    server: FakeSGLang, folder: Path
) -> None:
    engine = make(server, folder, delimiter="\n", service={"dialect": "sglang"}, reload=SGLANG)
    engine.load(str(folder), 3)
    server.label, server.version = "3 of /another/run", 9
    again = ask(engine, PROMPT)
    assert (again.error, server.reloads, server.version) == (None, 2, 3)


def test_weights_that_another_run_keeps_loading_end_the_request(server: FakeSGLang, folder: Path) -> None:
    engine = make(server, folder, delimiter="\n", service={"dialect": "sglang"}, reload=SGLANG)
    engine.load(str(folder), 3)
    server.always = "rival"
    assert "drew with weights '9' where '3 of " in str(ask(engine, PROMPT).error)


def test_requests_end_with_a_sentence_where_a_server_that_was_started_anew_cannot_be_given_its_weights(
    server: FakeSGLang, folder: Path
) -> None:
    engine = make(server, folder, delimiter="\n", service={"dialect": "sglang"}, reload=SGLANG)
    engine.load(str(folder), 3)
    server.restart()
    server.faults.append("cut")
    server.always = "no_such_folder"
    assert "did not load" in str(ask(engine, PROMPT).error)
    drawn = server.sampled
    server.always = None
    assert ask(engine, PROMPT).error is None, "it is tried again by the next request"
    assert (server.version, server.sampled > drawn) == (3, True)


@pytest.mark.parametrize("delimiter", ["\n", "\n\n"])
def test_whatever_sglangs_detokenizer_gives_out_for_tokens_is_read_as_they_are(folder: Path, delimiter: str) -> None:
    """Random prefixes and draws, rich in pieces of characters and line ends."""
    text, tok, pick = Text(folder, delimiter), bpe_tokenizer(), random.Random(0)
    pieces = [i for i in range(len(tok)) if "\ufffd" in text.decode([i])] + tok("\n")["input_ids"]
    for _ in range(3000):
        token = [pick.choice(pieces) if pick.random() < 0.4 else pick.randrange(len(tok)) for _ in range(20)]
        prefix, drawn = token[: pick.randrange(1, 11)], token[11:]
        ids, reason = [], "length"
        while reason == "length" and len(ids) < len(drawn):
            ids.append(drawn[len(ids)])
            if ids[-1] in text.eos_ids or delimiter in text.decode(ids):
                reason = "stop"
        shown = said(tok, prefix, ids[:-1] if ids[-1] in text.eos_ids else ids)
        shown = shown.partition(delimiter)[0] if reason == "stop" else shown
        asked = Asked("tiny", tuple(prefix), 1, len(drawn), False, False)
        stop = ending({"finish_reason": reason, "text": shown}, ids, asked, text)
        assert (stop is Stop.EOS) == (ids[-1] in text.eos_ids)
        assert (stop is Stop.DELIMITER) == (delimiter in text.decode(ids))
