"""TRL's own trainers take two steps on the exported files. Opt-in: TRL is installed into an environment of its own.

TRL removed PRMTrainer in September 2026 (huggingface/trl pull request 7133), so that trainer comes from 1.12, put
beside the rest of the environment without its dependencies.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts.bench_peers import ENVIRONMENT, ROOT, ready_environment
from selfplay.export import export_path
from tests.models import make_policy
from tests.selfplay.test_export import PROMPT, shard
from tests.selfplay.trace_samples import won_search

pytestmark = pytest.mark.bench

WITH_PRM = "trl==1.12.0"
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}: {% endif %}"
)


@pytest.fixture(scope="module")
def python() -> Path:
    return ready_environment()


@pytest.fixture(scope="module")
def old_trl(python: Path) -> Path:
    """A folder that holds the last TRL with PRMTrainer and nothing else."""
    folder = ENVIRONMENT / WITH_PRM.replace("==", "-")
    if not (folder / "trl" / "experimental" / "prm").is_dir():
        command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, WITH_PRM]
        subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy as a Hugging Face folder, with a chat template."""
    folder = tmp_path_factory.mktemp("model")
    policy = make_policy(scale=1.0)
    policy.tokenizer.chat_template = TEMPLATE
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def train(python: Path, kind: str, data: Path, model: Path, scratch: Path, extra: Path | None = None) -> Any:
    environment = {
        **os.environ,
        "PYTHONPATH": "" if extra is None else str(extra),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    command = [python, ROOT / "scripts" / "trl_steps.py", kind, data, model, scratch]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    return found


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize(
    ("form", "kind", "trainer"),
    [("sft", "sft", "SFTTrainer"), ("preference", "dpo", "DPOTrainer"), ("stepwise", "prm", "PRMTrainer")],
)
def test_trl_trains_two_steps_on_an_export(
    python: Path, old_trl: Path, model: Path, tmp_path: Path, form: str, kind: str, trainer: str, chat: bool
) -> None:
    results = []
    for number in range(8):
        won = won_search(f"q{number}")
        prompt: Any = PROMPT.replace("33", str(33 + number))
        if chat:
            prompt = ({"role": "user", "content": prompt},)
        results.append(replace(won, problem=replace(won.problem, prompt=prompt)))
    out = tmp_path / "data" / f"{form}.parquet"
    made = export_path(shard(tmp_path, results), form, out, tokenizer=model)
    found = train(python, kind, out, model, tmp_path / "trainer", old_trl if kind == "prm" else None)
    assert found["trainer"] == trainer
    assert found["rows"] == made.rows >= 2
    assert found["steps"] == 2
    assert found["moved"]
    assert len(found["losses"]) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in found["losses"])
