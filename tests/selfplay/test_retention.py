"""What is deleted is never what resume or the replay window may still read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfplay.config import RetentionConfig
from selfplay.retention import checkpoints_gone, resume_points, traces_gone
from selfplay.shards import list_shards
from tests.selfplay.test_damage import drive
from tests.selfplay.test_resume import outcome

KEEP = st.builds(
    RetentionConfig,
    checkpoints=st.integers(1, 4),
    iterations=st.none() | st.integers(1, 6),
    days=st.none() | st.floats(0.01, 10),
)
EXISTING = st.sets(st.integers(0, 30), max_size=12).map(sorted)


def row(iteration: int, score: float | None = None) -> dict[str, Any]:
    return {"iteration": iteration, "dev_pass1": score}


@given(EXISTING, st.dictionaries(st.integers(0, 30), st.none() | st.floats(0, 1)), KEEP, st.integers(0, 3), st.data())
def test_no_checkpoint_goes_that_anything_needs(
    existing: list[int], scores: dict[int, float | None], keep: RetentionConfig, staleness: int, data: st.DataObject
) -> None:
    rows = [row(i, score) for i, score in sorted(scores.items())]
    needed = data.draw(st.sets(st.sampled_from(existing)) if existing else st.just(set()))
    gone = checkpoints_gone(existing, rows, keep, staleness=staleness, needed=needed)
    assert set(gone) <= set(existing) & set(scores)  # never one whose evaluation is not written down
    left = [n for n in existing if n not in gone]
    assert left[:1] == existing[:1]
    assert needed <= set(left)
    assert set(existing[-max(keep.checkpoints, staleness + 2) :]) <= set(left)
    best = max((s for s in scores.values() if s is not None), default=None)
    if best is not None:
        first_best = next(i for i, s in sorted(scores.items()) if s == best)
        assert first_best not in gone
    kept_anyway = {*existing[:1], *existing[-max(keep.checkpoints, staleness + 2) :], *needed}
    assert len(set(left) & set(scores) - kept_anyway) <= 1  # the best on dev alone


@given(st.dictionaries(st.integers(1, 40), st.floats(0, 20)), EXISTING, KEEP, st.integers(1, 5), st.integers(0, 3))
def test_no_traces_go_that_a_learning_phase_after_resume_reads(
    ages: dict[int, float], existing: list[int], keep: RetentionConfig, window: int, staleness: int
) -> None:
    gone = traces_gone(ages, existing, keep, window=window, staleness=staleness)
    for point in resume_points(existing, staleness):
        read = range(point + 1 - window + 1, 100)  # by the phase after `point` and by all later ones
        assert not set(gone) & set(read)
    if not existing or (keep.iterations is None and keep.days is None):
        assert gone == []
    for iteration in set(ages) - set(gone):
        old = keep.days is not None and ages[iteration] > keep.days
        many = keep.iterations is not None and iteration <= max(ages) - keep.iterations
        assert not (old or many) or not existing or iteration >= resume_points(existing, staleness)[0] + 2 - window


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_damaged_newest_checkpoint_leaves_one_to_go_on_from(staleness: int) -> None:
    keep = RetentionConfig(checkpoints=1)
    rows = [row(i, 0.5) for i in range(10)]
    gone = checkpoints_gone(range(10), rows, keep, staleness=staleness)
    assert [n for n in range(10) if n not in gone] == [0, *range(8 - staleness, 10)]


def test_a_run_that_deletes_what_it_can_ends_like_one_that_keeps_all(tmp_path: Path) -> None:
    least = ("iterations=4", "learn.window=1", "keep.checkpoints=1", "keep.iterations=1", "evaluate.samples=0")
    for name in ("all", "least"):
        drive(tmp_path / name, overrides=least[: 2 if name == "all" else None] + least[-1:])
    found = {name: outcome(tmp_path / name, last=4) for name in ("all", "least")}
    assert found["least"]["weights"] == found["all"]["weights"]
    assert found["least"]["metrics"] == found["all"]["metrics"]
    assert {p.parent.name for p in list_shards(tmp_path / "least")} == {"iteration=00004"}
    assert len({p.parent.name for p in list_shards(tmp_path / "all")}) == 4
    kept = sorted(p.name for p in (tmp_path / "least" / "checkpoints").iterdir())
    assert {"00000", "00003", "00004"} <= set(kept)
    assert len(kept) <= 4
