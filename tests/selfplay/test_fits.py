"""Problems that cannot be sent to the model are told before a run begins, each by its id."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mcts.engines.model import ModelError
from mcts.tasks import load_task
from selfplay.config import Config, parse_config
from selfplay.errors import UserError
from selfplay.fits import check_prompts
from tests.mcts.text_rows import gsm8k_folder
from tests.models import bpe_tokenizer, make_policy, save_model

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"


def saved(folder: Path, template: str | None) -> Path:
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = template
    return save_model(folder / "model", tok=tokenizer)


def check(model: Path, context: int = 256, **task: object) -> None:
    gsm8k_folder(model.parent)
    settings = {"name": "gsm8k", "path": str(model.parent), **task}
    config: Config = parse_config(
        f"task: {json.dumps(settings)}\nmodel: {{path: {model}}}\nengine: {{max_context: {context}}}\n"
        "play: {search: {strategy: {name: mcts}, budget: 64}}"
    )
    check_prompts(config, load_task(**settings))


def test_chat_problems_need_a_chat_template_that_takes_them(tmp_path: Path) -> None:
    check(saved(tmp_path, None))
    with pytest.raises(ModelError, match="has no chat template: set chat: false"):
        check(saved(tmp_path, None), chat=True)
    with pytest.raises(ModelError, match=r"refuses these messages \(System role not supported\): change"):
        check(saved(tmp_path, NO_SYSTEM), chat=True, system="Be brief.")
    with pytest.raises(ModelError, match="refuses these messages"):
        check(saved(tmp_path, "{{ nope( }}"), chat=True)
    for broken in ("{{ 'a' + 1 }}", "{{ 1 / 0 }}"):
        with pytest.raises(ModelError, match="refuses these messages"):
            check(saved(tmp_path, broken), chat=True)
    with pytest.raises(UserError, match="has no token: correct its template"):
        check(saved(tmp_path, "{{ '' }}"), chat=True)
    check(saved(tmp_path, NO_SYSTEM), chat=True)


def test_a_problem_that_leaves_no_room_is_named_before_the_run_begins(tmp_path: Path) -> None:
    model = saved(tmp_path, None)
    with pytest.raises(UserError, match=r"heldout problem gsm8k-test-\d+ has \d+ tokens, .* raise engine\.max_"):
        check(model, 8)


def test_an_end_of_text_that_the_model_has_no_output_for_is_refused() -> None:
    from mcts.engines.torch_engine import TorchEngine

    policy = make_policy()
    policy.model.generation_config.eos_token_id = [1, 99_999]
    with pytest.raises(ModelError, match="ends a text at token 99999 and the model has"):
        TorchEngine(policy, ";", rows=32, kv_slots=64)
