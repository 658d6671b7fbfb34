"""The whole loop on real architectures with byte-pair tokenizers and a chat template, on GSM8K questions."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import load_dataset

from mcts.engines import adapters
from mcts.engines.model import Policy
from mcts.engines.value_head import ValueHead
from mcts.tasks import load_task
from selfplay.forward import batches, forward
from selfplay.items import ExampleEncoder
from selfplay.objectives.loss import Coefficients, Totals, composite_loss
from selfplay.packing import pack
from tests.models import FAMILIES, GSM8K, bpe_tokenizer, config, load_policy, save_model

ROOT = Path(__file__).resolve().parents[2]
needs_data = pytest.mark.skipif(not GSM8K.exists(), reason="the public data are not beside the checkout")


def run_config(model: Path, **changes: Any) -> dict[str, Any]:
    """A run of two short iterations with `model` on chat prompts."""
    return {
        "seed": 1,
        "iterations": 2,
        "task": {
            "name": "gsm8k", "path": str(GSM8K), "chat": True, "train_problems": 64, "dev_problems": 2,
            "heldout_problems": 3, "max_steps": 6, "max_step_tokens": 40,
        },
        "model": {"path": str(model), **changes},
        "warmup": {"steps": 30, "examples_per_step": 8, "lr_warmup_steps": 3},
        "engine": {"rows": 32, "kv_slots": 16384, "max_context": 512},
        "play": {
            "problems": 6, "unit": 3, "open_searches": 6,
            "search": {
                "strategy": {"name": "mcts", "commit": "never", "simulations": 6, "expand": 2}, "budget": 240,
                "prior_rule": "draws",
            },
        },
        "learn": {"steps": 6, "items_per_step": 8, "replay": 0.5, "lr_scale": 0.5, "optimizer": {"lr": 0.004}},
        "evaluate": {"samples": 0},
        "cluster": {"executor": "inline", "learner_threads": 1},
    }  # fmt: skip


def selfplay(*arguments: str, moment: str | None = None, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    command = (
        [sys.executable, "-m", "selfplay"] if moment is None else [sys.executable, "-m", "tests.selfplay.tiny_run"]
    )
    return subprocess.run(
        [*command, *([moment] if moment else []), *arguments],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=timeout,
        check=False,
    )  # fmt: skip


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def whole_loop(folder: Path, family: str, **changes: Any) -> list[dict[str, Any]]:
    """Launch, kill -9 in the middle of play, resume, inspect, evaluate, solve, export; the rows of metrics.jsonl."""
    model = save_model(
        folder / "model", family, tok=bpe_tokenizer(), head=False, scale=1.0, width=48, layers=2, context=512
    )
    file, run = folder / "run.yaml", folder / "run"
    file.write_text(yaml.safe_dump(run_config(model, **changes)))
    killed = selfplay(str(run), str(file), moment="play")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = selfplay("resume", str(run))
    assert resumed.returncode == 0, resumed.stderr
    rows = metrics(run)
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    inspected = selfplay("inspect", str(run), "--json")
    assert inspected.returncode == 0, inspected.stderr
    evaluated = selfplay(
        "evaluate", str(run), "--strategy", "greedy", "--strategy", "sampler", "--budget", "240",
        "--json", str(folder / "evaluated.json"),
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    assert {line["problems"] for line in json.loads((folder / "evaluated.json").read_text())["lines"]} == {3}
    solved = selfplay("solve", str(run), "Tom has 3 apples and buys 4. How many?", "--budget", "240")
    assert solved.returncode in (0, 1), solved.stderr
    assert "Traceback" not in solved.stderr
    assert "tokens sampled" in solved.stdout
    export(run, folder / "exported")
    return rows


def export(run: Path, folder: Path) -> None:
    """Traces as reward-model rows that `datasets` loads, chat prompts as their template wrote them; the value head."""
    rows = folder / "rows" / "prm.parquet"
    written = selfplay("export", str(run), "--format", "prm", "--value", "search", "--out", str(rows), "--json")
    assert written.returncode == 0, written.stderr
    loaded = load_dataset("parquet", data_files=str(rows), split="train", cache_dir=str(folder / "cache"))
    assert len(loaded) == json.loads(written.stdout)["rows"] > 0
    assert all(row["prompt"] and len(row["completions"]) == len(row["values"]) > 0 for row in loaded)
    head = selfplay("export", str(run), "--format", "prm-model", "--out", str(folder / "head"), "--json")
    assert head.returncode == 0, head.stderr
    assert json.loads(head.stdout)["written_error"] < 1e-5
    assert json.loads((folder / "head" / "config.json").read_text())["id2label"] == {"0": "value"}


SHOWN = ("policy_loss", "value_loss", "replay_nll", "replay_value_loss", "logprob_gap", "sampled_tokens", "solved")


def losses(policy: Policy) -> tuple[float, float]:
    """Policy loss (nats a token) and value loss on worked examples that no phase of the run draws, always the same,
    with a quarter of the negatives as in training (`warmup.negative_share`)."""
    task = load_task(**run_config(Path())["task"])
    encode = ExampleEncoder(policy.tokenizer)
    stream = list(itertools.islice(task.warmup(987654321), 160))
    negatives = [example for example in stream if not example.imitate]
    items = encode([example for example in stream if example.imitate] + negatives[::4])
    totals, coefficients = Totals.of(items), Coefficients(nll=1.0, value=1.0)
    nll = value = 0.0
    with torch.inference_mode():
        for batch in batches(items, 2048):
            packed = pack([items[i] for i in batch])
            _, parts = composite_loss(forward(policy, packed), packed, totals, coefficients)
            nll += float(parts["nll"])
            value += float(parts["value_loss"])
    return nll, value


def falls(folder: Path, rows: list[dict[str, Any]], *, further: bool = True) -> None:
    """Policy and value losses on the same worked examples are lower after warm-up and at the end than of the untrained
    model; `further`: the policy loss also falls in the iterations. The value loss need not: all played problems are
    lost, and the head learns so."""
    untrained = load_policy(folder / "model")
    untrained.head = ValueHead(untrained.model.config.hidden_size)
    start = losses(untrained)
    warm, end = (losses(load_policy(folder / "run" / "checkpoints" / name)) for name in ("00000", "00002"))
    print({"untrained": start, "after warm-up": warm, "at the end": end})
    print([{k: row.get(k) for k in SHOWN} for row in rows])
    assert warm[0] < start[0]
    assert end[0] < (warm[0] if further else start[0])
    assert warm[1] < start[1]
    assert end[1] < start[1]
    for row in rows[1:]:
        assert row["logprob_gap"] is None or row["logprob_gap"] < 1e-3
        assert row["trained_per_path"] == 0.0
        assert row["sampled_tokens"] > 0


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_loop_runs_with_a_chat_template(tmp_path: Path, family: str) -> None:
    falls(tmp_path, whole_loop(tmp_path, family))


@needs_data
@pytest.mark.slow
def test_the_whole_loop_trains_a_lora_adapter_on_a_base_that_stays_as_it_was(tmp_path: Path) -> None:
    rows = whole_loop(tmp_path, "qwen2", lora={"rank": 4, "alpha": 8}, gradient_checkpointing=True)
    falls(tmp_path, rows, further=False)  # twelve steps of so small an adapter are within its noise
    newest = tmp_path / "run" / "checkpoints" / "00002" / "policy"
    assert adapters.base_of(newest) == str(tmp_path / "model")
    assert not (newest / "model.safetensors").exists()
    assert not adapters.has_adapter(load_policy(newest).model)


def test_a_context_longer_than_the_model_reads_is_refused_before_the_run_begins(tmp_path: Path) -> None:
    assert config("llama", 50).max_position_embeddings == 256
    model = save_model(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({
        "task": {"name": "countdown", "numbers": 3}, "model": {"path": str(model)}, "engine": {"max_context": 300},
        "play": {"search": {"strategy": {"name": "mcts"}, "budget": 96}},
    }))  # fmt: skip
    refused = selfplay("launch", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run"))
    assert refused.returncode == 2
    assert "lower max_context" in refused.stderr
    assert not (tmp_path / "run").exists()
