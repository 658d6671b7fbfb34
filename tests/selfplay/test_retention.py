"""What is deleted is never what resume or the replay window may still read."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfplay.config import RetentionConfig
from selfplay.doctor import examine
from selfplay.retention import checkpoints_gone, delete_traces, resume_points, sides_gone, traces_gone
from selfplay.s3 import Bucket
from selfplay.shards import list_shards
from selfplay.side_rows import KIND, side_key
from selfplay.store import Store, is_remote
from tests.selfplay.test_damage import drive
from tests.selfplay.test_launch import lay
from tests.selfplay.test_resume import outcome
from tests.selfplay.test_store import new_store
from tests.selfplay.test_store import url as url  # a fixture: a disk, or object storage

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


def side(version: int, iteration: int, part: int = 0) -> str:
    return f"reanalysis/version={version:05d}/iteration={iteration:05d}/part-{part:05d}.arrow"


@given(
    st.sets(st.tuples(st.integers(1, 30), st.integers(1, 30))), st.sets(st.integers(1, 30)), EXISTING,
    st.integers(1, 5), st.integers(0, 3),
)  # fmt: skip
def test_side_files_go_where_no_traces_are_left_and_none_will_be_read(
    scored: set[tuple[int, int]], left: set[int], existing: list[int], window: int, staleness: int
) -> None:
    names = [side(version, iteration) for version, iteration in scored]
    gone = sides_gone([*names, f"{KIND}/notes.txt"], left, existing, window=window, staleness=staleness)
    first = resume_points(existing, staleness)[0] + 2 - window if existing else 0
    wanted = {(v, i) for v, i in scored if i < first and i not in left}
    assert gone == sorted(f"{KIND}/version={v:05d}/iteration={i:05d}" for v, i in wanted)


SHARDS = {f"traces/iteration={i:05d}/part-{part:05d}.arrow" for i in range(1, 5) for part in range(2)}
SIDES = {side(version, i, part) for version in range(1, 5) for i in range(1, version + 1) for part in range(2)}


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


def delete(store: Store) -> None:
    delete_traces(store, range(5), RetentionConfig(iterations=1), window=1, staleness=0)


def names_of(store: Store) -> set[str]:
    return {*store.listing("traces"), *store.listing(KIND)}


def test_side_files_go_after_their_shards_whenever_the_driver_is_killed(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {name for name in SHARDS | SIDES if "iteration=00004" in name}
    for step in itertools.count():
        store = new_store(f"{url}-{step}")
        for name in SHARDS | SIDES:
            lay(store.place.url, name)
        count = itertools.count()

        def counted(real: Any, step: int = step, count: Any = count) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if next(count) == step:
                    raise Killed
                return real(*args, **kwargs)

            return call

        def one_by_one(self: Bucket, keys: Iterable[str], real: Any = Bucket.delete, counted: Any = counted) -> None:
            for key in keys:
                counted(real)(self, [key])

        with monkeypatch.context() as patch:
            if is_remote(url):
                patch.setattr(Bucket, "delete", one_by_one)
            for owner, name in [] if is_remote(url) else [(os, "rename"), (os, "rmdir"), (shutil, "rmtree")]:
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                delete(store)
            except Killed:
                pass
            else:
                break
        found = names_of(store)
        iterations = {name.split("/")[1] for name in found & SHARDS}
        assert {name for name in SIDES if name.split("/")[2] in iterations} <= found
        delete(store)
        assert names_of(store) == wanted
    assert names_of(store) == wanted
    assert step > 5
    if not is_remote(url):
        assert [path.name for path in (store.root / KIND).iterdir()] == ["version=00004"]


def test_a_run_that_keeps_all_deletes_no_side_file_whose_shard_somebody_took_away(url: str) -> None:
    store = new_store(url)
    for name in SIDES:
        lay(url, name)
    delete_traces(store, range(5), RetentionConfig(), window=1, staleness=0)
    assert names_of(store) == SIDES


def test_a_shard_and_side_file_that_come_while_retention_looks_stay(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit that was lost is played again, and scored."""
    store = new_store(url)
    for name in SHARDS:
        lay(url, name.replace("iteration=00001", "iteration=00005"))
    real, looked = type(store).listing, list[str]()
    late = {"traces/iteration=00001/part-00000.arrow", side(4, 1)}

    def listing(self: Store, name: str) -> dict[str, float]:
        found = real(self, name)
        if not looked:
            for new in late:
                lay(url, new)
        looked.append(name)
        return found

    monkeypatch.setattr(type(store), "listing", listing)
    delete_traces(store, range(5), RetentionConfig(days=1000), window=1, staleness=0)
    assert looked == [KIND, "traces"]
    assert late <= names_of(store)


def test_a_run_that_deletes_what_it_can_ends_like_one_that_keeps_all(tmp_path: Path) -> None:
    both = ("iterations=4", "learn.window=2", "learn.reanalyse=true", "evaluate.samples=0")
    for name, keep in (("all", ()), ("least", ("keep.checkpoints=1", "keep.iterations=1"))):
        drive(tmp_path / name, overrides=both + keep)
    found = {name: outcome(tmp_path / name, last=4) for name in ("all", "least")}
    assert found["least"]["weights"] == found["all"]["weights"]
    assert found["least"]["metrics"] == found["all"]["metrics"]
    for name, kept in (("all", {1, 2, 3, 4}), ("least", {3, 4})):
        run = tmp_path / name
        sides = [path.relative_to(run).as_posix() for path in (run / KIND).rglob("*.arrow")]
        assert {p.parent.name for p in list_shards(run)} == {f"iteration={i:05d}" for i in kept}
        assert {side_key(path)[:2] for path in sides} == {(i, i) for i in kept - {4}}
        assert list(examine(run)) == []
    assert [path.name for path in (tmp_path / "least" / KIND).iterdir()] == ["version=00003"]
    checkpoints = sorted(p.name for p in (tmp_path / "least" / "checkpoints").iterdir())
    assert {"00000", "00003", "00004"} <= set(checkpoints)
    assert len(checkpoints) <= 4
