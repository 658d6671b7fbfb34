"""The doctor on side files: nothing on a run that was scored again, each damage by its name, and what is right."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import ipc

from selfplay.doctor import examine
from selfplay.doctor.documents import read_documents
from selfplay.doctor.sides import side_faults
from selfplay.run_folder import RunFolder
from selfplay.schema import batch_digest
from selfplay.shards import iter_batches, read_metadata, shard_path, write_pending
from selfplay.side_rows import SIDE_SCHEMA, side_path
from tests.selfplay.test_doctor import cut, flip
from tests.selfplay.test_reanalyse_loop import SETTINGS, go
from tests.selfplay.tiny_run import tiny_config
from tests.selfplay.trace_samples import unsealed

SIDE = "reanalysis/version=00001/iteration=00001/part-00000.arrow"
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Iteration 1 was scored again by version 1, which learned it a second time."""
    path = tmp_path_factory.mktemp("clean") / "run"
    go(RunFolder.create(path, tiny_config(*SETTINGS, "learn.reanalyse=true", "evaluate.samples=0")))
    return path


@pytest.fixture
def run(clean: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(clean, tmp_path / "run"))


def findings(run: Path) -> list[tuple[str, str]]:
    """Of the side files alone."""
    return [(found.check, found.where) for found in side_faults(read_documents(run)[0], len)]


def rewrite(run: Path, change: Callable[[Rows], Any] = len, to: str = SIDE, **metadata: str) -> None:
    """Write the side file again, changed, with checksums that fit."""
    source = run / SIDE
    rows = [row for batch in iter_batches(source) for row in batch.to_pylist()]
    change(rows)
    told = read_metadata(source)
    kept = {name: told[name] for name in ("run_id", "config_hash", "kind", "version", "weights")}
    new = run.parent / "rewritten.arrow"
    write_pending(new, rows, kept | metadata, columns=SIDE_SCHEMA)
    (run / to).parent.mkdir(parents=True, exist_ok=True)
    os.replace(new, run / to)


def test_a_run_that_was_scored_again_has_no_findings(clean: Path, run: Path) -> None:
    assert (clean / SIDE).exists()
    assert list(examine(clean)) == []
    rewrite(run)
    assert findings(run) == []


def test_a_row_that_could_not_be_scored_is_none(run: Path) -> None:
    rewrite(run, lambda rows: rows[0].update(nodes=None, error="too long"))
    assert findings(run) == []


def _node(rows: Rows, **values: Any) -> None:
    rows[0]["nodes"][1].update(values)


ROW_DAMAGES: dict[str, tuple[str, Callable[[Rows], Any]]] = {
    "a trace of another shard": ("traces", lambda rows: rows[0].update(trace_id="0" * 32)),
    "there twice": ("twice", lambda rows: rows.append(rows[0])),
    "row missing": ("rows", lambda rows: rows.pop()),
    "node missing": ("nodes", lambda rows: rows[0]["nodes"].pop()),
    "neither nodes nor reason": ("nodes", lambda rows: rows[0].update(nodes=None)),
    "nodes and a reason": ("nodes", lambda rows: rows[0].update(error="no")),
    "by another version": ("versions", lambda rows: rows[0].update(policy_version=0)),
    "values by another version": ("versions", lambda rows: rows[0].update(value_version=2)),
    "tokens cut": ("logprobs", lambda rows: _node(rows, logprobs=rows[0]["nodes"][1]["logprobs"][1:])),
    "no log-probabilities": ("logprobs", lambda rows: _node(rows, logprobs=None)),
    "a value above 1": ("values", lambda rows: _node(rows, raw_value=1.5)),
    "a prior that is no number": ("values", lambda rows: _node(rows, prior=float("nan"))),
    "a mean above 1": ("values", lambda rows: _node(rows, value_sum=1e6)),
}


@pytest.mark.parametrize("name", ROW_DAMAGES)
def test_a_broken_row_is_named(name: str, run: Path) -> None:
    check, damage = ROW_DAMAGES[name]
    rewrite(run, damage)
    found = set(findings(run))
    also = {("rows", SIDE)} if check == "traces" else set()
    assert found == {(check, SIDE), *also}


def other_schema(path: Path) -> None:
    """Checksums fit, and a column is missing."""
    with ipc.open_file(path) as reader:
        metadata, batch = reader.schema.metadata, reader.get_batch(0)
    batch = pa.record_batch([batch.column(0)], names=["trace_id"])
    with ipc.new_file(path, batch.schema.with_metadata(unsealed(metadata))) as writer:
        writer.write_batch(batch, custom_metadata={"index": "0", "sha256": batch_digest(batch)})


FILE_DAMAGES: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "bit flipped": ("checksum", SIDE, lambda run: flip(run / SIDE)),
    "truncated": ("checksum", SIDE, lambda run: cut(run / SIDE)),
    "another schema": ("schema", SIDE, lambda run: other_schema(run / SIDE)),
    "a shard in its place": ("schema", SIDE, lambda run: shutil.copy(shard_path(run, 1, 0), run / SIDE)),
    "another run's": ("run id", SIDE, lambda run: rewrite(run, run_id="other")),
    "another version's": ("versions", SIDE, lambda run: rewrite(run, version="2")),
    "other weights": ("weights", SIDE, lambda run: rewrite(run, weights="abc")),
    "weights that never were": ("versions", SIDE.replace("version=00001", "version=00009"), lambda run: rewrite(
        run, lambda rows: [row.update(policy_version=9, value_version=9) for row in rows],
        SIDE.replace("version=00001", "version=00009"), version="9")),
    "odd name": ("side files", "reanalysis/mine.arrow", lambda run: shutil.copy(
        run / SIDE, run / "reanalysis/mine.arrow")),
    "a second name": ("side files", SIDE.replace("00000", "000000"), lambda run: shutil.copy(
        run / SIDE, run / SIDE.replace("00000", "000000"))),
    "its shard lost": ("side files", SIDE, lambda run: shard_path(run, 1, 0).unlink()),
    "another shard's": ("traces", SIDE, lambda run: shutil.copy(
        run / SIDE.replace("part-00000", "part-00001"), run / SIDE)),
}  # fmt: skip


@pytest.mark.parametrize("name", FILE_DAMAGES)
def test_a_broken_file_is_named(name: str, run: Path) -> None:
    check, where, damage = FILE_DAMAGES[name]
    damage(run)
    found = [*side_faults(read_documents(run)[0], len)]
    also = {("rows", where)} if check == "traces" else set()
    assert {(one.check, one.where) for one in found} == {(check, where), *also}
    assert all(one.what and one.cure and "\n" not in one.line for one in found)


def test_a_side_file_whose_shard_retention_deleted_is_no_finding(run: Path) -> None:
    """The driver was killed in between; it has gone on long since."""
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("iterations: null", "iterations: 1"))
    for number in (3, 4):
        shutil.copytree(run / "checkpoints/00002", run / f"checkpoints/{number:05d}")
    shutil.rmtree(run / "traces/iteration=00001")
    assert findings(run) == []
    (run / "config.yaml").write_text(config)
    assert len(findings(run)) == 3  # a run that keeps all deleted nothing


def older(run: Path) -> None:
    """Iteration 2, which version 1 played, scored by version 0."""
    from selfplay import checkpoint as checkpoints
    from selfplay.objectives.base import Models
    from selfplay.reanalyse import Scorer
    from selfplay.shards import iter_traces

    folder = run / "checkpoints/00000"
    policy = checkpoints.load(folder)[0]
    scorer = Scorer(Models(policy, None, 300, 64, 32), 0, checkpoints.weights_digest(folder))
    for part in range(3):
        shard = shard_path(run, 2, part)
        told = {name: read_metadata(shard)[name] for name in ("run_id", "config_hash")}
        metadata = {**told, "kind": "reanalysis", "version": "0", "weights": scorer.weights}
        write_pending(side_path(shard, 0), scorer.rows(list(iter_traces(shard))), metadata, columns=SIDE_SCHEMA)


def test_weights_older_than_the_trace_are_named_unless_the_run_went_back_to_them(run: Path) -> None:
    older(run)
    assert set(findings(run)) == {
        ("versions", f"reanalysis/version=00000/iteration=00002/part-{part:05d}.arrow") for part in range(3)
    }
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row, score in zip(rows, (1.0, 0.9, 0.0), strict=True):  # version 2 collapsed, so iteration 3 begins at 0
        row.update(dev_pass1=score, dev_problems=100)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert findings(run) == []
