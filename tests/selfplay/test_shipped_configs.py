"""Every config of configs/ runs: with a small model and few problems, everything else as shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models import bpe_tokenizer, save_model
from tests.selfplay.test_model_loop import ROOT, metrics, selfplay

pytestmark = pytest.mark.slow
DATA = ROOT.parent / "shared" / "data"
FEW = (
    "iterations=1", "warmup.examples_per_step=4", "play.problems=4", "play.unit=2", "play.open_searches=4",
    "learn.steps=2", "learn.items_per_step=4", "learn.window=1", "evaluate.samples=0", "cluster.executor=inline",
    "cluster.learner_threads=1",
)  # fmt: skip
FRESH = ("model.fresh={width: 32, layers: 1, heads: 2}", "warmup.steps=4")
GIVEN = (
    "model.path={model}", "model.device=cpu", "model.dtype=float32", "engine.dtype=null", "engine.compile=false",
    "task.max_step_tokens=8", "task.max_steps=4", "play.search.budget=96", "play.search.strategy.simulations=4",
)  # fmt: skip
SPLITS = ("task.heldout_problems=2", "task.dev_problems=2")
MATH = "task={name: math, path: '{data}', chat: true}"


@pytest.mark.parametrize(
    ("name", "data", "overrides"),
    [
        ("countdown5", "", (*FRESH, *SPLITS)),
        ("game24", "game24/24.csv", (*FRESH, "task.path={data}")),
        ("gsm8k_qwen2.5-1.5b", "gsm8k", (*GIVEN, *SPLITS, "task.path={data}")),
        ("math_qwen2.5-7b_lora", "math500/math500.jsonl", (MATH, *GIVEN, *SPLITS)),
        ("own_problems", "", (*GIVEN, *SPLITS, "warmup.steps=2")),
        ("arc_program", "arc_agi_1/training.jsonl", (*GIVEN, "task.path={data}", "task.max_prompt=700")),
    ],
)  # countdown3 is the main job; gsm8k_vllm needs a server: test_vllm_run
def test_a_shipped_config_runs_an_iteration(name: str, data: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    if not (DATA / data).exists():
        pytest.skip("the public data are not beside the checkout")
    sizes: dict[str, Any] = {"width": 32, "layers": 1, "context": 8192}
    model = save_model(tmp_path / "model", "qwen2", tok=bpe_tokenizer(), head=False, scale=1.0, **sizes) / "policy"
    places = {"{data}": str(DATA / data), "{model}": str(model)}
    for mark, place in places.items():
        overrides = tuple(override.replace(mark, place) for override in overrides)
    run = tmp_path / "run"
    launched = selfplay("launch", f"configs/{name}.yaml", "--run-dir", str(run), *FEW, *overrides)
    assert launched.returncode == 0, launched.stderr
    (row,) = metrics(run)[1:]
    assert (row["problems"], row["failed"]) == (4, 0)
