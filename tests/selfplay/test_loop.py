"""What a run does when learning goes wrong: it goes on from the last good weights and says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from selfplay.errors import NonFiniteLoss
from selfplay.evaluation import chunks_of
from selfplay.executor import InlineExecutor
from selfplay.loop import Loop, last_good
from selfplay.run_folder import RunFolder
from selfplay.shards import iter_rows
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

    def learn(self, iteration: int, *arguments: Any) -> None:
        super().learn(iteration, *arguments)
        if iteration == 1:
            self._phase = self._diverge

    def _diverge(self) -> dict[str, Any]:
        raise NonFiniteLoss("the loss is not a finite number")


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


def play_versions(run: Path) -> dict[int, set[int]]:
    """Policy versions of the rows of each iteration."""
    found: dict[int, set[int]] = {}
    for row in iter_rows(run, columns=["iteration", "policy_version"]):
        found.setdefault(row["iteration"], set()).add(row["policy_version"])
    return found


@pytest.mark.parametrize(
    ("staleness", "expected"),
    [
        (0, {1: {0}, 2: {1}, 3: {2}, 4: {3}}),
        (1, {1: {0}, 2: {0}, 3: {1}, 4: {2}}),
        (2, {1: {0}, 2: {0}, 3: {0}, 4: {1}}),
    ],
)
def test_play_runs_ahead_by_at_most_so_many_versions_and_drops_nothing(
    tmp_path: Path, staleness: int, expected: dict[int, set[int]]
) -> None:
    config = tiny_config("iterations=4", f"play.max_staleness={staleness}")
    run = RunFolder.create(tmp_path / "run", config)
    executor = InlineExecutor(config, run.place)
    rows = Loop(run, executor, lambda _: None).go()
    executor.close()
    run.close()
    assert play_versions(run.path) == expected
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["problems"] for row in rows[1:]] == [24] * 4
    assert all(row["heldout_pass1"] is not None for row in rows)
    assert [row["staleness"] for row in rows[1:]] == [i - 1 - min(v) for i, v in expected.items()]


class Elsewhere(InlineExecutor):
    """The learner is on another node: what it saves is in object storage and not in the driver's mirror."""

    def save(self, iteration: int, state: dict[str, Any]) -> Path:
        path = super().save(iteration, state)
        for file in [p for p in path.rglob("*") if p.is_file()]:
            self.trainer.store._mirror._drop(file.relative_to(self.trainer.store.root).as_posix())
        assert not path.exists()
        return path


@pytest.mark.parametrize("every", [1, 2])
def test_no_row_is_lost_where_the_learner_is_on_another_node_than_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_url: str, every: int
) -> None:
    monkeypatch.setenv("SELFPLAY_CACHE", str(tmp_path))
    config = tiny_config(f"evaluate.every={every}")
    run = RunFolder.create(s3_url, config)
    executor = Elsewhere(config, run.place)
    rows = Loop(run, executor, lambda _: None).go()
    executor.close()
    run.close()
    assert [row["iteration"] for row in rows] == [0, 1, 2]
