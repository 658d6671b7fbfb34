"""Which versions and which missing traces are fine: the rules of the doctor, without a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from selfplay.config import parse_config
from selfplay.doctor.documents import Documents, missing_rows
from selfplay.doctor.traces import order_faults, versions_of
from selfplay.doctor.units import Expected, Progress, unit_faults
from tests.selfplay.winning_run import CONFIG

FIRST = "traces/iteration=00001/part-00000.arrow"
Rows = list[dict[str, Any]]


def documents_of(staleness: int, *scores: float) -> Documents:
    """A run with so many scored iterations."""
    rows = [
        {"iteration": i, "dev_pass1": score, "dev_problems": 100, "rolled_back": False}
        for i, score in enumerate(scores)
    ]
    config = parse_config(CONFIG, [f"play.max_staleness={staleness}"])
    return Documents(Path("run"), config=config, configs=[config], metrics=rows)


def test_staleness_allows_older_versions_and_no_newer_ones() -> None:
    assert versions_of(documents_of(0, 0.2, 0.3, 0.4), 3) == {2}
    assert versions_of(documents_of(1, 0.2, 0.3, 0.4), 3) == {1, 2}
    assert versions_of(documents_of(2, 0.2, 0.3, 0.4), 1) == {0}


def test_after_a_collapse_the_best_version_is_allowed_too() -> None:
    """Version 4 collapses; with staleness 1 its score may become known an iteration later."""
    scores = (0.2, 0.8, 0.7, 0.7, 0.1, 0.6)
    assert versions_of(documents_of(0, *scores[:5]), 5) == {1}
    assert versions_of(documents_of(1, *scores), 5) == {1, 3, 4}
    assert versions_of(documents_of(1, *scores), 6) == {1, 4, 5}


def test_versions_that_go_back_are_named_unless_the_weights_did() -> None:
    newest = {1: 0, 2: 1, 3: 0}
    assert [f.where for f in order_faults(newest, lambda _: False)] == ["traces/iteration=00003"]
    assert not list(order_faults(newest, lambda iteration: iteration == 3))


def listing(*iterations: int) -> dict[int, list[Path]]:
    return {i: [Path(f"traces/iteration={i:05d}/part-{part:05d}.arrow") for part in range(2)] for i in iterations}


def test_rows_that_no_driver_can_still_owe_are_missing_and_it_is_said_what_resume_can_do(tmp_path: Path) -> None:
    def said(*numbers: int, rows: int, staleness: int = 0, ended: bool = False) -> list[str]:
        for number in numbers:
            (tmp_path / f"checkpoints/{number:05d}").mkdir(parents=True, exist_ok=True)
            (tmp_path / f"checkpoints/{number:05d}/state.json").write_text("{}")
        documents = replace(documents_of(staleness, *[0.5] * rows), run=tmp_path, ended=ended)
        return [finding.line for finding in missing_rows(documents)]

    assert said(0, rows=0) == []  # killed while it was evaluated
    again = "restore it from a copy, or resume, which evaluates what is missing again"
    assert said(0, rows=0, ended=True) == [f"metrics.jsonl: has no row although there is checkpoint 0; {again}"]
    assert said(1, rows=1) == []
    assert said(1, 2, rows=1, staleness=1) == []
    assert said(1, 2, rows=1) == [f"metrics.jsonl: ends at iteration 0 although there is checkpoint 2; {again}"]
    what = "metrics.jsonl: ends at iteration 0 although there is checkpoint 4; restore it from a copy"
    assert said(4, rows=1, staleness=2) == [what]  # nothing is left of 3


def test_traces_that_retention_deleted_are_no_finding_and_a_gap_is() -> None:
    expected = {i: Expected(10, 5) for i in range(1, 10)}
    keeps = Progress(finished=8, ahead=1, needed=7, deletes=True)
    assert not list(unit_faults(listing(7, 8), expected, keeps))
    half = {**listing(6, 7, 8), 5: listing(5)[5][:1]}  # deleting 5 was interrupted
    assert not list(unit_faults(half, expected, keeps))
    assert [f.where for f in unit_faults(listing(6, 8), expected, keeps)] == ["traces/iteration=00007"]
    assert [f.where for f in unit_faults(listing(3, 5, 6, 7, 8), expected, keeps)] == ["traces/iteration=00004"]
    never = Progress(finished=8, ahead=1, needed=7, deletes=False)
    assert len(list(unit_faults(listing(5, 6, 7, 8), expected, never))) == 4
    (many,) = unit_faults({}, expected, replace(never, finished=99_999))
    assert many.what == "has no shards of the finished iterations 1-99999"


def test_a_shorter_last_unit_and_a_small_pool_are_expected() -> None:
    assert [Expected(20, 8).rows(part) for part in range(3)] == [8, 8, 4]
    assert Expected(7, 8).parts == 1
