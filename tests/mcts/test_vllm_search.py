"""Whole searches through a real vLLM server, opt-in (marker `server`): see tests/vllm_server.py."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from mcts.engines.model import load_policy
from mcts.engines.server import ServerEngine, Service
from mcts.engines.server_http import Client, Patience
from mcts.engines.server_text import Text
from mcts.engines.server_value import LocalValue
from mcts.engines.server_weights import VLLM
from mcts.search import Driver, Search
from mcts.strategies import build
from mcts.tasks import load_task
from mcts.types import Ended, SearchResult
from tests.mcts.text_rows import gsm8k_folder
from tests.models import GSM8K
from tests.vllm_server import CONTEXT, NAME, Served, needs_vllm

pytestmark = needs_vllm
SEARCHES, BUDGET = 24, 240


def generated(url: str) -> int:
    """Tokens that the server says it has ever drawn."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = re.search(r"^vllm:generation_tokens_total\{.*\} (\S+)$", text, re.MULTILINE)
    assert found is not None
    return int(float(found.group(1)))


@pytest.fixture(scope="module")
def played(vllm: Served, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[SearchResult], int]:
    """Many searches at once, and what the server counted meanwhile."""
    data = str(GSM8K) if GSM8K.exists() else gsm8k_folder(tmp_path_factory.mktemp("data"))
    task = load_task("gsm8k", path=data, chat=True, max_steps=6, max_step_tokens=24)
    engine = ServerEngine(
        Client(vllm.server.url, Patience(in_flight=64, down=30.0)), Service(NAME), Text(vllm.a, task.delimiter),
        context=CONTEXT, value=LocalValue(vllm.a), reload=VLLM,
    )  # fmt: skip
    engine.load(str(vllm.a), 0)
    before = generated(vllm.server.url)
    strategy = build("mcts", commit="never", simulations=32, expand=4)
    searches = [
        Search(problem=problem, strategy=strategy, budget=BUDGET, seed=number)
        for number, problem in enumerate(task.problems("train")[:SEARCHES])
    ]
    results = list(Driver(engine, task, max_open=SEARCHES).run(searches))
    engine.shutdown()
    return results, generated(vllm.server.url) - before


def test_every_search_ends_within_its_budget_and_no_answer_is_refused(
    played: tuple[list[SearchResult], int],
) -> None:
    results, _ = played
    assert len(results) == SEARCHES
    for result in results:
        assert (result.error, result.usage.uncounted_calls) == (None, 0)
        assert result.ended is not Ended.FAILED
        assert 0 < result.usage.sampled <= BUDGET
        assert result.tree.tokens + result.usage.discarded == result.usage.sampled
    assert sum(r.usage.cached for r in results) > sum(r.usage.prompt for r in results), "prefixes were not shared"


def test_the_server_drew_exactly_the_tokens_that_the_searches_count(played: tuple[list[SearchResult], int]) -> None:
    results, drawn = played
    assert sum(result.usage.sampled for result in results) == drawn


def test_every_path_of_the_trees_has_the_policys_own_log_probabilities(
    played: tuple[list[SearchResult], int], vllm: Served
) -> None:
    policy, worst = load_policy(Path(vllm.a)), 0.0
    for result in played[0][:6]:
        tree = result.tree
        for node in range(1, len(tree)):
            step = tree.steps[node]
            assert step is not None
            prefix = [tree.steps[above].token_ids for above in tree.path(node)[1:-1]]  # type: ignore[union-attr]
            ids = np.concatenate([tree.prompt_ids, *prefix, step.token_ids]).astype(np.int64)
            with torch.inference_mode():
                rows = torch.log_softmax(policy.unembed(policy.hidden(torch.from_numpy(ids)[None])[0]), -1).numpy()
            at = np.arange(len(ids) - len(step.token_ids), len(ids))
            worst = max(worst, float(np.abs(rows[at - 1, ids[at]] - step.logprobs).max()))
    print(f"largest gap of log-probabilities {worst:.2e} nats")
    assert worst < 1e-3
