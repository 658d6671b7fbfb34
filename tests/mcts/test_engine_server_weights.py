"""New weights for a server, and the config that chooses it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mcts.engines.server import ServerEngine
from mcts.engines.server_http import Client, Patience
from mcts.engines.server_weights import SGLANG, Reload, Weights
from mcts.tasks import load_task
from mcts.types import Request, SettingError
from tests.mcts.engine_contract import drain
from tests.mcts.fake_server import FakeServer
from tests.mcts.served import PROMPT, ask, make


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
    with pytest.raises(SettingError, match="says version '0 of first' and not '3 of "):
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


def test_a_server_is_never_asked_for_two_versions_at_once(server: FakeServer) -> None:
    """Workers share it: one that loads the next version would change the weights under the others' searches."""
    from selfplay.config import ConfigError, parse_config

    with pytest.raises(ConfigError, match="a server serves one"):
        parse_config(served_config(server).to_yaml(), ["play.max_staleness=1"])


def test_a_run_whose_temperature_scales_sglangs_log_probabilities_is_refused(server: FakeServer) -> None:
    from selfplay.config import parse_config
    from selfplay.errors import UserError
    from selfplay.rules import check_rules

    text = served_config(server, dialect="sglang").to_yaml()
    check_rules(parse_config(text, ["play.search.temperature=0"]))
    own = "play.search.strategy={name: best_of_n, n: 4, temperature: 0.7}"
    for scaled in ("play.search.temperature=0.7", own):
        with pytest.raises(UserError, match="set the search's temperature to 1"):
            check_rules(parse_config(text, [scaled]))
        check_rules(parse_config(text, [scaled, "engine.server.dialect=vllm"]))


def test_a_missing_key_is_named_by_its_variable(
    server: FakeServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfplay.worker import make_engine

    monkeypatch.delenv("SOME_SERVER_KEY", raising=False)
    config = served_config(server, api_key_env="SOME_SERVER_KEY")
    with pytest.raises(ValueError, match="SOME_SERVER_KEY is not set"):
        make_engine(config, folder / "policy", None, 0, load_task("countdown", numbers=3))


class Scripted(Client):
    """Answers every call with `answer`."""

    def __init__(self, answer: Any) -> None:
        super().__init__("http://127.0.0.1:1")
        self.answer = answer

    def call(self, path: str, payload: Mapping[str, Any] | None = None) -> Any:  # noqa: ARG002
        return self.answer


@pytest.mark.parametrize("answer", [None, [], "ok", {"data": None}, {"data": [1, {"id": {}}]}])
@pytest.mark.parametrize("check", ["version", "root", "id"])
def test_an_odd_answer_about_what_is_served_is_one_sentence(check: Any, answer: Any) -> None:
    with pytest.raises(SettingError, match="after the reload the server says"):
        Weights(Scripted(answer), "tiny", Reload(check=check, id="tiny")).load("folder", 1)


@pytest.mark.parametrize("value", [math.nan, "x"])
def test_log_probabilities_that_are_no_numbers_prove_nothing(folder: Path, value: Any) -> None:
    answer = {"choices": [{"logprobs": {"token_logprobs": [None, *[-1.0] * 14, value]}}]}
    weights = Weights(Scripted(answer), "tiny", Reload(tolerance=1e6))
    with pytest.raises(SettingError, match=r"other weights|cannot be proved"):
        weights.load(str(folder), 1)


def test_a_server_that_comes_back_with_its_first_weights_gets_the_newest_again(
    server: FakeServer, folder: Path
) -> None:
    """Its answers name no weights, so the refused connection is what tells."""
    engine = make(server, folder, reload=SGLANG)
    engine.load(str(folder), 3)
    plain = ask(engine)
    server.die()
    server.version = 0
    ids = engine.encode(PROMPT)
    assert engine.open(1, ids, 500)
    engine.submit(Request(1, 1, ids, 3, 6, seed=4))
    while not engine.client.retries:
        engine.client.poll(0.01)
    server.start()
    reply = drain(engine, 1)[1]
    assert (reply.error, server.version, server.reloads) == (None, 3, 2)
    assert [s.token_ids.tolist() for s in reply.steps] == [s.token_ids.tolist() for s in plain.steps]


def test_new_weights_reach_a_server_that_is_lost_while_it_loads_them(server: FakeServer, folder: Path) -> None:
    engine = make(server, folder, reload=SGLANG)
    engine.load(str(folder), 3)
    server.cut_reload = 2
    client = engine.client
    left = iter(range(100))
    polled = client.poll
    client.poll = lambda wait: polled(wait) if next(left, None) is not None else pytest.fail("waits for ever")  # type: ignore[method-assign]
    engine.load(str(folder), 4)
    assert (server.version, server.reloads, client.lost) == (4, 3, False)


def test_a_server_that_stays_away_ends_the_requests_after_load_once_it_was_waited_for(
    server: FakeServer, folder: Path
) -> None:
    engine = make(server, folder, Patience(down=0.0, backoff=1e-4, longest_backoff=1e-3), reload=SGLANG)
    engine.load(str(folder), 3)
    server.die()
    for _ in range(2):
        assert "is down for 0 s" in str(ask(engine).error)
    server.start()
    assert ask(engine).error is None
