"""A self-play run whose steps a real vLLM server draws, opt-in (marker `server`): see tests/vllm_server.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from selfplay.shards import iter_traces, list_shards
from tests.mcts.text_rows import gsm8k_folder
from tests.models import GSM8K
from tests.selfplay.test_model_loop import ROOT, metrics, selfplay
from tests.vllm_server import CONTEXT, NAME, Served, Server, make_server, needs_vllm, save_served

pytestmark = needs_vllm
VERSIONS = [0, 1]
"""Iteration 1 plays with the model as it came, iteration 2 with what the first one taught it."""


def run_config(folder: Path, model: Path, url: str, reload: dict[str, Any]) -> Path:
    """configs/gsm8k_vllm.yaml with a tiny model, and few and short searches."""
    config = yaml.safe_load((ROOT / "configs" / "gsm8k_vllm.yaml").read_text())
    del config["plan"]
    data = str(GSM8K) if GSM8K.exists() else gsm8k_folder(folder)
    config |= {"iterations": len(VERSIONS), "warmup": {"steps": 0}}
    config["task"] |= {
        "path": data, "train_problems": 64, "dev_problems": 2, "heldout_problems": 3, "max_steps": 6,
        "max_step_tokens": 24,
    }  # fmt: skip
    config["model"] |= {"path": str(model), "device": "cpu"}
    config["engine"] |= {"max_context": CONTEXT}
    config["engine"]["server"] |= {"url": url, "model": NAME, "reload": reload, "deadline_seconds": 120.0}
    config["play"] |= {"problems": 12, "unit": 6, "open_searches": 12}
    config["play"]["search"] |= {"strategy": {"name": "mcts", "commit": "never", "simulations": 8, "expand": 3}}
    config["play"]["search"]["budget"] = 160
    config["learn"] |= {
        "objective": {"name": "alphazero"}, "steps": 4, "items_per_step": 8, "precision": "float32",
        "optimizer": {"name": "adamw", "lr": 2.0e-3},
    }  # fmt: skip
    config["evaluate"] = {"samples": 0, "every": 2}
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def check(run: Path, launched: subprocess.CompletedProcess[str]) -> None:
    """Every iteration was played with its own version's weights, and nothing is wrong with the run."""
    assert launched.returncode == 0, launched.stderr + launched.stdout
    rows = metrics(run)[1:]
    shown = ("sampled_tokens", "prefix_reuse", "logprob_gap", "policy_loss", "value_loss")
    print([{name: row[name] for name in shown} for row in rows])
    for row, version in zip(rows, VERSIONS, strict=True):
        assert (row["problems"], row["failed"], row["uncounted_calls"]) == (12, 0, 0)
        assert row["logprob_gap"] < 1e-3, "what was drawn are not the odds of the version that the rows name"
        shards = list_shards(run, first=row["iteration"], last=row["iteration"])
        assert {trace.policy_version for shard in shards for trace in iter_traces(shard)} == {version}
    weights = [(run / "checkpoints" / f"{v:05d}" / "policy" / "model.safetensors").read_bytes() for v in VERSIONS]
    assert weights[0] != weights[1]
    doctor = selfplay("doctor", str(run))
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    summary = json.loads(selfplay("inspect", str(run), "--json").stdout)["summary"]
    assert [(row["searches"], row["ended"].get("failed", 0)) for row in summary] == [(12, 0)] * len(VERSIONS)
    assert [row["sampled_tokens"] for row in summary] == [row["sampled_tokens"] for row in rows]


def test_a_run_plays_each_iteration_with_the_weights_that_the_last_one_taught(tmp_path: Path, vllm: Served) -> None:
    file = run_config(tmp_path, vllm.a / "policy", vllm.server.url, {"preset": "vllm"})
    check(tmp_path / "run", selfplay("launch", str(file), "--run-dir", str(tmp_path / "run"), timeout=900.0))


@pytest.fixture
def own(tmp_path: Path) -> Any:
    """A server of the test's own, which a reload command may replace."""
    save_served(tmp_path / "model", seed=2, tied=True)
    server = make_server(tmp_path)
    process = server.start(tmp_path / "model" / "policy")
    try:
        server.wait(process)
        yield server
    finally:
        server.stop()
        process.wait()


def test_a_run_restarts_its_server_for_every_version(tmp_path: Path, own: Server) -> None:
    """Tied embeddings, which vLLM on a CPU does not reload in place."""
    command = [sys.executable, "-m", "tests.vllm_server", str(own.pid_file), str(own.port), "{path}"]
    reload = {"command": command, "check": "logprobs"}
    file = run_config(tmp_path, tmp_path / "model" / "policy", own.url, reload)
    check(tmp_path / "run", selfplay("launch", str(file), "--run-dir", str(tmp_path / "run"), timeout=900.0))
