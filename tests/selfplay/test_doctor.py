"""The doctor finds nothing on a clean run, and on a run damaged in one way it names that damage and nothing else."""

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
from selfplay.doctor.traces import trace_faults
from selfplay.run_folder import RunError, read_metrics
from selfplay.shards import iter_rows, list_shards, shard_path
from tests.selfplay.trace_samples import unsealed
from tests.selfplay.winning_run import UNITS, build, rewrite, won

FIRST = "traces/iteration=00001/part-00000.arrow"
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("clean") / "run")


@pytest.fixture
def run(clean: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(clean, tmp_path / "run"))


def checks(run: Path) -> list[tuple[str, str]]:
    return [(finding.check, finding.where) for finding in examine(run)]


def test_a_clean_run_has_no_findings_and_holds_wins(clean: Path) -> None:
    assert list(examine(clean)) == []
    assert any(row["verdict"] == "correct" for row in iter_rows(shard_path(clean, 1, 0)))  # or rows below test nothing


def test_a_rewritten_but_unchanged_shard_is_no_finding(run: Path) -> None:
    rewrite(run, len)
    assert checks(run) == []


def step_of(row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(node for node in row["nodes"] if node["parent"] == 0)
    return found


def set_node(row: dict[str, Any], node: int, **values: Any) -> None:
    row["nodes"][node].update(values)


def _inner(row: dict[str, Any]) -> int:
    """A node with children, not the root."""
    return next(int(n["parent"]) for n in row["nodes"] if n["parent"] > 0)


def _end(row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = row["nodes"][row["path"][-1]]
    return found


def _set(of: Callable[[Rows], dict[str, Any]], **values: Any) -> Callable[[Rows], None]:
    return lambda rows: of(rows).update(values)


def _first(rows: Rows) -> dict[str, Any]:
    return rows[0]


def _usage(**change: int) -> Callable[[Rows], None]:
    def apply(rows: Rows) -> None:
        for name, by in change.items():
            rows[0]["usage"][name] += by

    return apply


def _node_with(**fields: Any) -> Callable[[Rows], dict[str, Any]]:
    """The first node of any row for which each field is there (True) or null (False)."""
    return lambda rows: next(
        node
        for row in rows
        for node in row["nodes"]
        if all((node[name] is not None) == there for name, there in fields.items())
    )


ROW_DAMAGES: list[tuple[str, str, Callable[[Rows], Any]]] = [
    ("parent after child", "tree", lambda rows: set_node(rows[0], 1, parent=len(rows[0]["nodes"]) - 1)),
    ("no root", "tree", lambda rows: set_node(rows[0], 0, parent=0)),
    ("no nodes", "tree", lambda rows: rows[0].update(nodes=[], path=[], verdict=None, answer=None)),
    ("depth", "tree", lambda rows: set_node(rows[0], 1, depth=7)),
    ("life after the end", "tree", lambda rows: set_node(rows[0], _inner(rows[0]), terminal=True)),
    ("never drawn", "tree", lambda rows: set_node(rows[0], 1, draws=0)),
    ("kind", "tree", lambda rows: set_node(rows[0], 1, kind="guess")),
    ("stop", "tree", lambda rows: set_node(rows[0], 1, stop=None)),
    ("visits", "visits", lambda rows: set_node(rows[0], _inner(rows[0]), visits=0, value_sum=0.0)),
    ("value sum", "values", lambda rows: set_node(rows[0], 0, value_sum=1e6)),
    ("raw value", "values", lambda rows: set_node(rows[0], 0, raw_value=1.5)),
    ("raw value not a number", "values", lambda rows: set_node(rows[0], 0, raw_value=float("nan"))),
    ("reward of the row", "values", lambda rows: won(rows).update(reward=1.25)),
    ("priors", "priors", lambda rows: step_of(rows[0]).update(prior=1.0)),
    ("targets", "targets", _set(_node_with(target=True), target=0.0)),
    ("judged midway", "verdicts", lambda rows: set_node(rows[0], _inner(rows[0]), verdict="wrong", reward=0.0)),
    ("unknown verdict", "verdicts", _set(_node_with(verdict=True), verdict="splendid", reward=None)),
    ("reward without verdict", "verdicts", _set(_node_with(verdict=False, reward=False), reward=0.5)),
    ("win without reward", "verdicts", lambda rows: _end(won(rows)).update(reward=0.0)),
    ("win that nobody awarded", "verdicts", lambda rows: _end(won(rows)).update(verdict="wrong", reward=0.0)),
    ("loss turned into a win", "verdicts", lambda rows: next(r for r in rows if r["verdict"] != "correct").update(
        verdict="correct", reward=1.0, solution="7 * 3 = 21")),
    ("row's reward against its verdict", "verdicts", lambda rows: won(rows).update(reward=0.0)),
    ("win without solution", "verdicts", lambda rows: won(rows).update(solution=None)),
    ("path jumps", "path", lambda rows: won(rows)["path"].pop(1)),
    ("path elsewhere", "path", lambda rows: won(rows).update(answer="1")),
    ("more tokens than the tree has", "tokens", _usage(sampled=-1)),
    ("more discarded than sampled", "tokens", _usage(discarded=1000)),
    ("fewer calls than none", "tokens", _usage(calls=-1000)),
    ("over budget", "budget", lambda rows: rows[0].update(settings=rows[0]["settings"].replace(
        '"budget":150', '"budget":3'))),
    ("settings", "settings", lambda rows: rows[0].update(settings="[1")),
    ("logprobs cut", "logprobs", lambda rows: rows[0]["nodes"][1]["logprobs"].pop()),
    ("logprobs above 0", "logprobs", lambda rows: set_node(
        rows[0], 1, logprobs=[1.0] * len(rows[0]["nodes"][1]["logprobs"]))),
    ("ended", "ended", lambda rows: rows[0].update(ended="bored")),
    ("failed without reason", "ended", lambda rows: rows[0].update(ended="failed")),
    ("another iteration's", "iteration", lambda rows: rows[0].update(iteration=2)),
    ("version", "versions", lambda rows: rows[0].update(policy_version=1)),
    ("trace id", "trace id", lambda rows: rows[0].update(trace_id="0" * 32)),
    ("seed", "seed", lambda rows: rows[0].update(seed=rows[0]["seed"] ^ 1)),
    ("there twice", "twice", lambda rows: rows.__setitem__(1, rows[0])),
    ("row missing", "rows", lambda rows: rows.pop()),
]  # fmt: skip

ALSO = {
    "reward of the row": {"verdicts"},
    "parent after child": {"path"},
    "no nodes": {"tokens", "path", "verdicts"},
    "more tokens than the tree has": {"metrics"},
    "row's reward against its verdict": set(),
    "loss turned into a win": {"metrics"},
    "another iteration's": {"trace id", "seed"},
    "seed": {"trace id"},
    "there twice": {"metrics"},
    "win that nobody awarded": set(),
    "more discarded than sampled": set(),
    "settings": set(),
}
"""What else such a damage breaks, or may break."""


@pytest.mark.parametrize(("name", "check", "damage"), ROW_DAMAGES, ids=[damage[0] for damage in ROW_DAMAGES])
def test_a_broken_row_is_named(name: str, check: str, damage: Callable[[Rows], Any], run: Path) -> None:
    rewrite(run, damage)
    documents, wrong = read_documents(run)
    assert not wrong
    found = [(finding.check, finding.where) for finding in trace_faults(documents, len)]  # weights take their time
    assert (check, FIRST) in found
    assert {c for c, _ in found} <= {check} | ALSO.get(name, set())


def test_many_broken_rows_of_a_shard_are_one_line(run: Path) -> None:
    rewrite(run, lambda rows: [row.update(ended="bored") for row in rows])
    (finding,) = examine(run)
    assert "and 7 more rows" in finding.line


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _other_schema(path: Path) -> None:
    """A shard whose checksums fit and whose answers are numbers."""
    from selfplay.schema import batch_digest

    with ipc.open_file(path) as reader:
        metadata, batch = reader.schema.metadata, reader.get_batch(0)
    at = batch.schema.get_field_index("answer")
    batch = batch.set_column(at, "answer", pa.array([1] * batch.num_rows, pa.int64()))
    with ipc.new_file(path, batch.schema.with_metadata(unsealed(metadata))) as writer:
        writer.write_batch(batch, custom_metadata={"index": "0", "sha256": batch_digest(batch)})


def _metrics(run: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    rows = read_metrics(run)
    change(rows)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


def _state(run: Path, number: int, **values: Any) -> None:
    _json(run / f"checkpoints/{number:05d}/state.json", lambda manifest: manifest["state"].update(values))


def _pickled_optimizer(run: Path) -> None:
    """An optimiser state that would run code if it were unpickled, listed with its right checksum."""
    import hashlib
    import pickle

    data = pickle.dumps(Path("x"), protocol=2)
    (run / "checkpoints/00001/optimizer.pt").write_bytes(data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    _json(run / "checkpoints/00001/state.json", lambda manifest: manifest["files"].update({"optimizer.pt": entry}))


def _no_value_head(run: Path) -> None:
    """A value head of noise, listed with its right checksum."""
    import hashlib

    (run / "checkpoints/00001/value_head.safetensors").write_bytes(b"x" * 100)
    entry = {"size": 100, "sha256": hashlib.sha256(b"x" * 100).hexdigest()}
    _json(
        run / "checkpoints/00001/state.json",
        lambda manifest: manifest["files"].update({"value_head.safetensors": entry}),
    )


FOLDER_DAMAGES: list[tuple[str, str, str, Callable[[Path], Any]]] = [
    ("bit flipped", "checksum", FIRST, lambda run: flip(run / FIRST)),
    ("bit flipped at the front", "checksum", FIRST, lambda run: flip(run / FIRST, 0.01)),
    ("truncated", "checksum", FIRST, lambda run: cut(run / FIRST)),
    ("empty", "checksum", FIRST, lambda run: (run / FIRST).write_bytes(b"")),
    ("another schema", "schema", FIRST, lambda run: _other_schema(run / FIRST)),
    ("unit missing", "units", "traces/iteration=00001", lambda run: (run / FIRST).unlink()),
    ("iteration missing", "units", "traces/iteration=00001", lambda run: shutil.rmtree(run / "traces/iteration=00001")),
    ("unit too many", "units", "traces/iteration=00002", lambda run: shutil.copy(
        shard_path(run, 2, 0), shard_path(run, 2, UNITS))),
    ("unit twice", "units", "traces/iteration=00002/part-000000.arrow", lambda run: shutil.copy(
        shard_path(run, 2, 0), run / "traces/iteration=00002/part-000000.arrow")),
    ("odd name", "units", "traces/iteration=00002/mine.arrow", lambda run: shutil.copy(
        shard_path(run, 2, 0), run / "traces/iteration=00002/mine.arrow")),
    ("the future", "units", "traces/iteration=00007", lambda run: shutil.copytree(
        run / "traces/iteration=00001", run / "traces/iteration=00007")),
    ("another run's", "run id", FIRST, lambda run: _json(run / "run.json", lambda facts: facts.update(id="other"))),
    ("run.json gone", "run.json", "run.json", lambda run: (run / "run.json").unlink()),
    ("run.json cut", "run.json", "run.json", lambda run: (run / "run.json").write_text("{")),
    ("config gone", "config", "config.yaml", lambda run: (run / "config.yaml").unlink()),
    ("config gone and its earlier version kept", "config", "config.yaml", lambda run: (run / "config.yaml").rename(
        run / "config.until-epoch-001.yaml")),
    ("config damaged", "config", "config.yaml", lambda run: (run / "config.yaml").write_text("seed: [")),
    ("seeds differ", "config", "config.yaml", lambda run: _json(
        run / "run.json", lambda facts: facts.update(seed=4))),
    ("config of the traces gone", "config", FIRST, lambda run: (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("steps: 150", "steps: 151"))),
    ("metrics cut", "metrics", "metrics.jsonl line 3", lambda run: cut(run / "metrics.jsonl")),
    ("metrics line lost", "metrics", "metrics.jsonl line 2", lambda run: _metrics(run, lambda rows: rows.pop(1))),
    ("metrics column lost", "metrics", "metrics.jsonl line 2", lambda run: _metrics(
        run, lambda rows: rows[1].pop("staleness"))),
    ("metrics version", "metrics", "metrics.jsonl line 2", lambda run: _metrics(
        run, lambda rows: rows[1].update(policy_version=9))),
    ("metrics emptied", "metrics", "metrics.jsonl", lambda run: (run / "metrics.jsonl").write_bytes(b"")),
    ("metrics lost", "metrics", "metrics.jsonl", lambda run: (run / "metrics.jsonl").unlink()),
    ("metrics shortened", "metrics", "metrics.jsonl", lambda run: _metrics(run, lambda rows: rows.pop())),
    ("metrics tokens", "metrics", "metrics.jsonl", lambda run: _metrics(
        run, lambda rows: rows[1].update(sampled_tokens=1))),
    ("metrics solved", "metrics", "metrics.jsonl", lambda run: _metrics(run, lambda rows: rows[1].update(solved=1.0))),
    ("metrics that are text", "metrics", "metrics.jsonl", lambda run: _metrics(
        run, lambda rows: rows[1].update(solved="x", problems="y", sampled_tokens=None))),
    ("metrics problems", "metrics", "metrics.jsonl", lambda run: _metrics(
        run, lambda rows: rows[1].update(problems=1))),
    ("checkpoint file gone", "checkpoint", "checkpoints/00001", lambda run: (
        run / "checkpoints/00001/optimizer.pt").unlink()),
    ("checkpoint bit flipped", "checkpoint", "checkpoints/00002", lambda run: flip(
        run / "checkpoints/00002/policy/model.safetensors")),
    ("optimizer that is code", "checkpoint", "checkpoints/00001", _pickled_optimizer),
    ("value head of noise", "checkpoint", "checkpoints/00001", _no_value_head),
    ("newest checkpoint gone", "checkpoint", "checkpoints/00002", lambda run: shutil.rmtree(run / "checkpoints/00002")),
    ("first checkpoint without state", "checkpoint", "checkpoints/00000", lambda run: (
        run / "checkpoints/00000/state.json").unlink()),
    ("checkpoint beyond without state", "checkpoint", "checkpoints/00003", lambda run: (
        run / "checkpoints/00003").mkdir()),
    ("checkpoint of another iteration", "checkpoint", "checkpoints/00001", lambda run: _state(run, 1, iteration=2)),
    ("checkpoint learned from elsewhere", "versions", "checkpoints/00002", lambda run: _state(run, 2, base=0)),
    ("a builder of a dead epoch", "pending", "pending/building-00007", lambda run: (
        run / "pending/building-00007").mkdir(parents=True)),
    ("leftovers of a dead epoch", "pending", "pending/epoch-00000", lambda run: (
        run / "pending/epoch-00000").mkdir(parents=True)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("check", "where", "damage"),
    [damage[1:] for damage in FOLDER_DAMAGES],
    ids=[damage[0] for damage in FOLDER_DAMAGES],
)
def test_a_damaged_folder_is_named(check: str, where: str, damage: Callable[[Path], Any], run: Path) -> None:
    damage(run)
    found = list(examine(run))
    assert (check, where) in [(finding.check, finding.where) for finding in found]
    assert all(finding.what and finding.cure and "\n" not in finding.line for finding in found)


@pytest.mark.parametrize(
    ("name", "where", "cure"),
    [
        ("iteration=00001/part-x.arrow", "traces/iteration=00001/part-x.arrow", "move it out of the run"),
        ("mine.arrow", "traces/mine.arrow", "move it out of the run"),
        ("iteration=00001/part-00099.arrow", "traces/iteration=00001", "move it out of the run, or restore the config"),
    ],
)
def test_a_broken_file_that_is_no_unit_is_one_finding(name: str, where: str, cure: str, run: Path) -> None:
    """What it holds is not looked at: resume would not play it again."""
    (run / "traces" / name).write_bytes(b"broken")
    documents, _ = read_documents(run)
    (finding,) = trace_faults(documents, len)
    assert (finding.check, finding.where) == ("units", where)
    assert finding.cure.startswith(cure)


def test_a_pickle_in_a_checkpoint_is_never_run(run: Path) -> None:
    """The marker would be set by unpickling alone."""
    import hashlib

    marker = run.parent / "ran"
    data = b"cos\nmkdir\n(S'" + os.fsencode(marker) + b"'\ntR."
    (run / "checkpoints/00001/optimizer.pt").write_bytes(data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    _json(run / "checkpoints/00001/state.json", lambda manifest: manifest["files"].update({"optimizer.pt": entry}))
    assert ("checkpoint", "checkpoints/00001") in checks(run)
    assert not marker.exists()


def test_a_run_killed_in_the_middle_of_an_iteration_has_no_findings(run: Path) -> None:
    """Units are missing, a checkpoint too; resume plays and learns them."""
    shutil.rmtree(run / "checkpoints/00002")
    shard_path(run, 2, 1).unlink()
    _metrics(run, lambda rows: rows.pop())
    (run / "pending" / "iteration=00002-part-00001.arrow").write_bytes(b"half")
    assert checks(run) == []


def test_no_folder_of_a_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        list(examine(tmp_path))


def test_a_rollback_that_the_scores_demand_is_no_finding_and_any_other_version_is(run: Path) -> None:
    """Iteration 1 collapses on dev, so iteration 2 is played by version 0."""

    def collapse(rows: list[dict[str, Any]]) -> None:
        rows[0].update(dev_pass1=1.0)
        rows[1].update(dev_pass1=0.0)

    _metrics(run, collapse)
    assert ("versions", "traces/iteration=00002/part-00000.arrow") in checks(run)  # played by 1
    for part in range(UNITS):
        rewrite(run, lambda rows: [row.update(policy_version=0) for row in rows], iteration=2, part=part)
    _state(run, 2, base=0)
    assert checks(run) == []


def test_memory_is_bounded_by_one_iterations_ids(clean: Path) -> None:
    from selfplay.doctor.rows import Iteration, row_faults
    from selfplay.shards import iter_batches

    at = Iteration(1, {0})
    for shard in list_shards(clean, first=1, last=1):
        for batch in iter_batches(shard):
            list(row_faults(batch, at, "", None))
    assert len(at.ids) == at.rows == 20
