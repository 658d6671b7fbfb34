"""What a run does when learning goes wrong: it goes on from the last good weights and says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from selfplay.errors import NonFiniteLoss
from selfplay.executor import InlineExecutor
from selfplay.loop import Loop, chunks_of, last_good
from selfplay.run_folder import RunFolder
from tests.selfplay.tiny_run import tiny_config


def row(iteration: int, score: float | None, problems: int = 256) -> dict[str, Any]:
    return {"iteration": iteration, "dev_pass1": score, "dev_problems": problems}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row(0, 0.4), row(1, 0.5)], 1),
        ([row(0, 0.4), row(1, 0.5), row(2, 0.3)], 2),  # worse, but no collapse
        ([row(0, 0.4), row(1, 0.5), row(2, 0.05)], 1),  # collapse: back to the best
        ([row(0, 0.5, 6), row(1, 0.17, 6)], 1),  # too few problems to tell
        ([row(0, None), row(1, None)], 1),  # never evaluated
        ([], 1),
    ],
)
def test_a_collapse_of_the_dev_score_goes_back_to_the_best(rows: list[dict[str, Any]], expected: int) -> None:
    newest = rows[-1]["iteration"] if rows else 1
    assert last_good(rows, default=newest) == expected


def test_chunks_for_workers_lose_nothing_and_are_even() -> None:
    chunks = chunks_of(list(range(7)), 4)  # type: ignore[arg-type]
    assert [list(c) for c in chunks] == [[0, 1, 2], [3, 4, 5, 6]]
    assert chunks_of([], 2) == []


class Diverging(InlineExecutor):
    """Learning fails in iteration 1."""

    def learn(self, iteration: int, *arguments: Any) -> dict[str, Any]:
        if iteration == 1:
            raise NonFiniteLoss("the loss is not a finite number")
        return super().learn(iteration, *arguments)


def test_a_loss_that_is_not_finite_keeps_the_weights_and_the_run_goes_on(tmp_path: Path) -> None:
    config = tiny_config("evaluate.samples=0")
    run = RunFolder.create(tmp_path / "run", config)
    executor = Diverging(config, run.place)
    rows = Loop(run, executor, lambda _: None).go()
    executor.close()
    run.close()
    assert [r.get("rolled_back") for r in rows] == [None, True, False]
    before, kept, after = (
        load_file(run.checkpoints / name / "policy" / "model.safetensors") for name in ("00000", "00001", "00002")
    )
    assert all(bool((before[k] == kept[k]).all()) for k in before)
    assert not all(bool((kept[k] == after[k]).all()) for k in kept)
    assert json.loads((run.path / "heartbeat.json").read_text())["iteration"] == 2
