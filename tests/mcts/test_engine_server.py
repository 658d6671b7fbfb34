"""The server engine against a local server that misbehaves on demand."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mcts.engines.server import ServerEngine, Service
from mcts.engines.server_http import Client, Failure, Patience
from mcts.engines.server_text import Text
from mcts.engines.server_value import LocalValue, ServedValue
from mcts.engines.server_weights import SGLANG, Reload
from mcts.search import Driver, Search
from mcts.strategies import build
from mcts.tasks import load_task
from mcts.types import Ended, Reply, Request, SettingError, Stop
from tests.mcts.engine_contract import EngineContract, drain, extend
from tests.mcts.fake_server import FakeServer, log_odds
from tests.models import make_policy, save_model, tokenizer, words

QUICK = Patience(in_flight=8, deadline=30.0, attempts=3, backoff=1e-4, longest_backoff=1e-3, down=60.0)
PROMPT = "3 7 12 -> 33 :"
EOS = 1


@pytest.fixture(scope="module")
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


def make(server: FakeServer, folder: Path, patience: Patience = QUICK, **options: Any) -> ServerEngine:
    service = Service("tiny", **options.pop("service", {}))
    kept = {"context": 256, "kv_slots": 2048, **options}
    return ServerEngine(Client(server.url, patience), service, Text(folder, ";"), **kept)


@pytest.fixture
def engine(server: FakeServer, folder: Path) -> Iterator[ServerEngine]:
    made = make(server, folder)
    yield made
    made.shutdown()


@pytest.fixture
def prompt() -> str:
    return PROMPT


class TestContract(EngineContract):
    """A server without a reward model keeps the contract but for values and excluded steps."""

    values = False


class TestContractWithLocalValues(EngineContract):
    @pytest.fixture
    def engine(self, server: FakeServer, folder: Path) -> Iterator[ServerEngine]:
        made = make(server, folder, value=LocalValue(folder))
        yield made
        made.shutdown()


class TestContractWithServedValues(EngineContract):
    @pytest.fixture
    def engine(self, server: FakeServer, folder: Path) -> Iterator[ServerEngine]:
        made = make(server, folder, value=ServedValue(server.url, "prm"), value_client=Client(server.url, QUICK))
        yield made
        made.shutdown()


class TestContractOneChoicePerCall(EngineContract):
    """For servers that ignore n; their prefix is read once per sample."""

    values = False

    @pytest.fixture
    def engine(self, server: FakeServer, folder: Path) -> Iterator[ServerEngine]:
        made = make(server, folder, service={"split": True})
        yield made
        made.shutdown()

    def test_a_reply_holds_n_steps_of_at_most_max_tokens_in_a_consistent_shape(self, engine: Any, prompt: str) -> None:
        ids = engine.encode(prompt)
        assert engine.open(1, ids, 200)
        engine.submit(Request(1, 1, ids, 5, 7, seed=3))
        reply = drain(engine, 1)[1]
        assert (len(reply.steps), reply.prompt + reply.cached) == (5, 5 * len(ids))


def ask(engine: ServerEngine, **options: Any) -> Reply:
    """One request after PROMPT, in a search of its own."""
    ids = engine.encode(PROMPT)
    assert engine.open(9, ids, 500)
    fields: dict[str, Any] = {"prefix": ids, "n": 3, "max_tokens": 6, "seed": 4, **options}
    engine.submit(Request(1, 9, **fields))
    reply = drain(engine, 1)[1]
    engine.close(9)
    return reply


# ---- what was asked is what came back

OMISSIONS = {
    "ignores_n": "returned 1 choices where n=3",
    "same_index": "not numbered 0 to 2",
    "no_logprobs": "no logprobs",
    "few_logprobs": "token ids with",
    "positive": "log-probability that is no number",
    "aborted": "finish_reason 'abort'",
    "other_text": "is not what its tokens say",
    "bad_id": "token ids outside",
    "ambiguous": "is not exactly one token",
    "ignores_stop": "drew on behind the end of a step",
    "too_long": "tokens where 1 to 6 were asked for",
    "short_prompt": "read a prompt of",
    "wrong_count": "tokens are missing",
    "no_usage": "no usage.prompt_tokens",
    "other_model": "answered with model 'another'",
}


@pytest.mark.parametrize("fault", OMISSIONS)
def test_an_answer_that_is_not_what_was_asked_ends_the_request_with_a_sentence_that_names_it(
    server: FakeServer, engine: ServerEngine, fault: str
) -> None:
    server.always = fault
    reply = ask(engine)
    assert reply.steps == ()
    assert reply.error is not None
    assert OMISSIONS[fault] in reply.error
    assert len(server.seen) == 1, "asking again would not help"


def test_steps_hold_the_tokens_and_log_probabilities_that_the_server_drew(
    server: FakeServer, engine: ServerEngine
) -> None:
    ids = engine.encode(PROMPT)
    stops = set()
    for step in ask(engine, n=40).steps:
        path = ids.tolist()
        for token, logprob in zip(step.token_ids.tolist(), step.logprobs, strict=True):
            assert logprob == pytest.approx(log_odds(path, server.size, server.likely, 0)[token], abs=1e-6)
            path.append(token)
        assert (step.stop is Stop.EOS) == (step.token_ids[-1] == EOS)
        assert (step.stop is Stop.DELIMITER) == step.text.endswith(";")
        stops.add(step.stop)
    assert stops == set(Stop)


def test_the_delimiter_stays_in_the_step_although_the_servers_text_drops_it(
    server: FakeServer, engine: ServerEngine
) -> None:
    step = next(step for step in ask(engine, n=40).steps if step.stop is Stop.DELIMITER)
    assert step.text == engine.decode(step.token_ids)
    assert step.text.endswith(";")
    assert server.seen[0]["stop"] == [";"]


def test_tokens_are_recovered_from_their_texts_where_each_is_one_token(
    server: FakeServer, engine: ServerEngine
) -> None:
    plain = ask(engine)
    server.always = "no_token_ids"
    again = ask(engine)
    assert [s.token_ids.tolist() for s in again.steps] == [s.token_ids.tolist() for s in plain.steps]


def test_sampling_that_a_server_does_not_describe_has_unknown_behaviour_odds(engine: ServerEngine) -> None:
    for step in ask(engine, temperature=0.7).steps:
        assert step.behavior_logprobs is not None
        assert np.isnan(step.behavior_logprobs).all()
        assert not np.isnan(step.logprobs).any()


def test_text_prompts_draw_the_same_as_token_ids(server: FakeServer, engine: ServerEngine, folder: Path) -> None:
    plain = ask(engine)
    other = make(server, folder, service={"prompt": "text"})
    again = ask(other)
    assert server.seen[-1]["prompt"] == PROMPT
    assert [s.token_ids.tolist() for s in again.steps] == [s.token_ids.tolist() for s in plain.steps]


def test_a_prefix_whose_text_means_other_tokens_is_refused_where_only_text_is_taken(
    server: FakeServer, folder: Path
) -> None:
    engine = make(server, folder, service={"prompt": "text"})
    ids = extend(engine.encode(PROMPT), ())
    prefix = np.append(ids, [0, 0]).astype(np.int32)
    engine.text.plain = lambda _: None  # type: ignore[method-assign,assignment]
    reply = ask(engine, prefix=prefix)
    assert "would be read as other tokens" in str(reply.error)
    assert server.seen == []


def test_neutral_sampling_is_asked_for_so_that_the_models_own_defaults_do_not_bend_it(
    server: FakeServer, engine: ServerEngine
) -> None:
    ask(engine)
    body = server.seen[0]
    assert (body["top_k"], body["min_p"], body["repetition_penalty"], body["top_p"]) == (-1, 0.0, 1.0, 1.0)


# ---- servers in trouble


@pytest.mark.parametrize("fault", ["500", "cut", "truncate", "half", "429"])
def test_a_fault_that_passes_costs_time_only(server: FakeServer, engine: ServerEngine, fault: str) -> None:
    plain = ask(engine)
    server.faults = deque([fault, fault])
    again = ask(engine)
    assert again.error is None
    assert [s.token_ids.tolist() for s in again.steps] == [s.token_ids.tolist() for s in plain.steps]
    assert engine.client.retries == 2


@pytest.mark.parametrize("fault", ["500", "cut", "truncate", "half"])
def test_a_fault_that_stays_ends_the_request_after_the_attempts(
    server: FakeServer, engine: ServerEngine, fault: str
) -> None:
    server.always = fault
    reply = ask(engine)
    assert "failed 3 times" in str(reply.error)
    assert len(server.seen) == 3


def test_a_refused_call_is_not_repeated(server: FakeServer, engine: ServerEngine) -> None:
    server.always = "400"
    assert "status 400" in str(ask(engine).error)
    assert len(server.seen) == 1


def test_a_call_past_its_deadline_is_cut_and_repeated(server: FakeServer, folder: Path) -> None:
    engine = make(server, folder, Patience(deadline=2.0, attempts=3, backoff=1e-4, longest_backoff=1e-3))
    server.faults = deque(["slow"])
    assert ask(engine).error is None
    engine = make(server, folder, Patience(deadline=0.05, attempts=3, backoff=1e-4, longest_backoff=1e-3))
    server.always = "slow"
    assert "no answer within 0.05 s" in str(ask(engine).error)


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


# ---- values


def test_served_values_are_read_by_index_and_label(server: FakeServer, folder: Path) -> None:
    engine = make(server, folder, value=ServedValue(server.url, "prm"), value_client=Client(server.url, QUICK))
    reply = ask(engine, n=12)
    assert reply.prefix_value == 0.75
    assert {step.value for step in reply.steps if step.stop is not Stop.EOS} == {0.75}
    assert all(math.isnan(step.value) for step in reply.steps if step.stop is Stop.EOS)


def test_a_pooled_logit_becomes_a_value_only_by_the_sigmoid(server: FakeServer, folder: Path) -> None:
    source = ServedValue(server.url, "prm", endpoint="pooling", sigmoid=True)
    engine = make(server, folder, value=source, value_client=Client(server.url, QUICK))
    assert ask(engine).prefix_value == pytest.approx(1.0 / (1.0 + math.exp(-2.0)))
    bare = ServedValue(server.url, "prm", endpoint="pooling")
    engine = make(server, folder, value=bare, value_client=Client(server.url, QUICK))
    assert "outside [0, 1]" in str(ask(engine).error)


def test_missing_values_end_the_request(server: FakeServer, folder: Path) -> None:
    engine = make(server, folder, value=ServedValue(server.url, "prm"), value_client=Client(server.url, QUICK))
    server.always = "few_values"
    assert "one result for each" in str(ask(engine).error)


def test_local_values_are_those_of_the_policys_head(server: FakeServer, folder: Path) -> None:
    import torch

    policy = make_policy()
    engine = make(server, folder, value=LocalValue(folder))
    reply = ask(engine)
    assert policy.head is not None
    with torch.inference_mode():
        hidden = policy.hidden(torch.tensor([engine.encode(PROMPT).tolist()]))
        assert reply.prefix_value == pytest.approx(float(policy.head(hidden[0, -1])), abs=1e-5)


# ---- new weights


def test_new_weights_are_loaded_and_their_version_is_checked(server: FakeServer, folder: Path) -> None:
    engine = make(server, folder, reload=SGLANG)
    before = ask(engine)
    engine.load(str(folder), 3)
    assert (engine.version, server.version, server.root) == (3, 3, str(folder / "policy"))
    after = ask(engine)
    assert [s.token_ids.tolist() for s in before.steps] != [s.token_ids.tolist() for s in after.steps]


def test_a_server_that_keeps_its_old_weights_is_found_out(server: FakeServer, folder: Path) -> None:
    engine = make(server, folder, reload=SGLANG)
    server.always = "stale"
    with pytest.raises(SettingError, match="says version '0' and not '3'"):
        engine.load(str(folder), 3)
    assert engine.version == 0


def test_a_restart_command_is_run_and_its_result_checked(server: FakeServer, folder: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit(0)", "{path}"]
    engine = make(server, folder, reload=Reload(command=command, check="id", id="tiny"))
    engine.load(str(folder), 1)
    assert engine.version == 1
    engine = make(server, folder, reload=Reload(command=command, check="id", id="tiny-{version}"))
    with pytest.raises(SettingError, match="not 'tiny-2'"):
        engine.load(str(folder), 2)
    broken = [sys.executable, "-c", "import sys; sys.exit('no such node')"]
    with pytest.raises(SettingError, match="no such node"):
        make(server, folder, reload=Reload(command=broken)).load(str(folder), 2)


def test_without_a_way_to_reload_new_weights_are_refused(engine: ServerEngine, folder: Path) -> None:
    with pytest.raises(SettingError, match=r"engine\.server\.reload"):
        engine.load(str(folder), 1)


# ---- searches


@pytest.mark.parametrize(
    ("strategy", "settings"), [("best_of_n", {"n": 4}), ("mcts", {"commit": "never", "simulations": 8, "expand": 2})]
)
def test_searches_through_the_server_never_exceed_their_budget_and_count_what_the_server_did(
    server: FakeServer, folder: Path, strategy: str, settings: dict[str, Any]
) -> None:
    engine = make(server, folder, value=LocalValue(folder))
    task = load_task("countdown", numbers=3)
    server.faults = deque(["429", "429"])  # faults that cost no tokens
    searches = [
        Search(problem=p, strategy=build(strategy, **settings), budget=120, seed=i)
        for i, p in enumerate(task.problems("dev")[:6])
    ]
    results = list(Driver(engine, task).run(searches))
    assert len(results) == 6
    for result in results:
        assert result.error is None
        assert 0 < result.usage.sampled <= 120
        assert result.tree.tokens + result.usage.discarded == result.usage.sampled
    assert sum(r.usage.sampled for r in results) == server.sampled
    assert sum(r.usage.prompt for r in results) == server.prompt
    assert sum(r.usage.cached for r in results) == server.cached
    assert sum(r.usage.calls for r in results) == len(server.seen) - 2
    engine.shutdown()


def test_a_search_fails_with_the_servers_omission_and_the_others_go_on(server: FakeServer, folder: Path) -> None:
    engine = make(server, folder)
    task = load_task("countdown", numbers=3)
    server.faults = deque(["no_logprobs"])
    searches = [
        Search(problem=p, strategy=build("best_of_n", n=2), budget=120, seed=i)
        for i, p in enumerate(task.problems("dev")[:3])
    ]
    results = list(Driver(engine, task).run(searches))
    failed = [r for r in results if r.ended is Ended.FAILED]
    assert len(failed) == 1
    assert "no logprobs" in str(failed[0].error)
    engine.shutdown()


def test_a_client_forgets_a_cancelled_call(server: FakeServer) -> None:
    client = Client(server.url, QUICK)
    server.always = "slow"
    client.send("a", "/v1/completions", {"prompt": [1]})
    while not server.seen:
        client.poll(0.01)
    client.cancel("a")
    assert client.poll(0.0) == []
    assert isinstance(client.call("/nowhere"), Failure)


# ---- chosen by the config


def served_config(server: FakeServer, **fields: Any) -> Any:
    from selfplay.config import Config

    return Config.model_validate(
        {
            "task": {"name": "countdown", "numbers": 3},
            "play": {"search": {"strategy": {"name": "best_of_n", "n": 2}, "budget": 120}},
            "engine": {"kind": "server", "server": {"url": server.url, "model": "tiny", **fields}},
        }
    )


def test_the_config_chooses_the_server_and_what_it_needs(server: FakeServer, folder: Path) -> None:
    from selfplay.worker import make_engine

    config = served_config(server, value="local", dialect="sglang", reload={"preset": "sglang"})
    task = load_task("countdown", numbers=3)
    made = make_engine(config, folder / "policy", folder / "value_head.safetensors", 4, task)
    assert isinstance(made, ServerEngine)
    assert (made.version, server.version) == (4, 4)
    assert not math.isnan(ask(made).prefix_value)


def test_a_server_engine_without_its_section_is_refused(server: FakeServer) -> None:
    from selfplay.config import ConfigError, parse_config

    text = served_config(server).to_yaml()
    assert parse_config(text).engine.kind == "server"
    with pytest.raises(ConfigError, match="belong together"):
        parse_config(text, ["engine.server=null"])


def test_a_missing_key_is_named_by_its_variable(
    server: FakeServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfplay.worker import make_engine

    monkeypatch.delenv("SOME_SERVER_KEY", raising=False)
    config = served_config(server, api_key_env="SOME_SERVER_KEY")
    with pytest.raises(ValueError, match="SOME_SERVER_KEY is not set"):
        make_engine(config, folder / "policy", None, 0, load_task("countdown", numbers=3))
