"""A shard is written once, read by anyone, and believed only when it is whole."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import ipc

from selfplay.schema import SCHEMA, batch_digest, batch_of
from selfplay.shards import (
    ReplayWindow,
    ShardError,
    commit,
    content,
    content_digest,
    iter_batches,
    iter_rows,
    iter_traces,
    list_shards,
    read_metadata,
    read_shard,
    shard_path,
    write_pending,
)
from selfplay.traces import to_row
from selfplay.where import parse_where
from tests.selfplay.trace_samples import (
    METADATA,
    context,
    lost_search,
    random_search,
    rows_of,
    small_run,
    unsealed,
    won_search,
)

ROW_FIELDS = """trace_id string, problem_id string, task string, split string, prompt string, reference? string,
    meta string, iteration int32, attempt int32, group? string, parent_trace? string, policy_version int32,
    value_version? int32, seed int64, strategy string, settings string, ended string, answer? string,
    verdict? string, reward? float, error? string, solution? string, path list<int32>, usage struct,
    seconds double, nodes list<struct>"""
NODE_FIELDS = """parent int32, depth int32, kind string, text string, token_ids list<int32>, logprobs? list<float>,
    behavior_logprobs? list<float>, stop? string, draws int32, prior? float, visits int32, value_sum double,
    raw_value? float, reward? float, verdict? string, answer? string, terminal bool, target? float,
    context? list<int32>"""


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Three batches of random searches."""
    path = tmp_path / "shard.arrow"
    write_pending(path, [to_row(random_search(i, 4), context()) for i in range(130)], METADATA)
    return path


def described(fields: Any) -> str:
    def kind(type_: pa.DataType) -> str:
        if pa.types.is_list(type_):
            return f"list<{kind(type_.value_type)}>"
        return "struct" if pa.types.is_struct(type_) else str(type_)

    return ", ".join(f"{f.name}{'?' if f.nullable else ''} {kind(f.type)}" for f in fields)


def test_names_types_and_nullability_are_those_of_the_public_format() -> None:
    assert described(SCHEMA) == " ".join(ROW_FIELDS.split())
    assert described(SCHEMA.field("nodes").type.value_type) == " ".join(NODE_FIELDS.split())
    usage = "sampled int64, discarded int64, prompt int64, cached int64, scored int64, calls int64, "
    usage += "uncounted_calls? int64, uncounted_tokens? int64"
    assert described(SCHEMA.field("usage").type) == usage


def test_a_shard_has_its_metadata_small_batches_and_compression(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write_pending(path, rows_of(130), METADATA)
    with ipc.open_file(path) as reader:
        metadata = reader.schema.metadata
        sizes = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
        nbytes = sum(reader.get_batch(i).nbytes for i in range(reader.num_record_batches))
        _, custom = reader.get_batch_with_custom_metadata(1)
        assert custom[b"sha256"].decode() == batch_digest(reader.get_batch(1))
    assert (metadata[b"schema_version"], metadata[b"run_id"], metadata[b"config_hash"]) == (
        b"1.1",
        b"run-1",
        b"c0ffee",
    )
    assert sizes == [64, 64, 2]
    assert b"\x28\xb5\x2f\xfd" in path.read_bytes()  # a zstd frame
    assert path.stat().st_size < nbytes / 2
    assert read_metadata(path)["rows"] == "130"


def test_an_empty_unit_is_a_shard(tmp_path: Path) -> None:
    write_pending(tmp_path / "a.arrow", [], METADATA)
    assert list(iter_rows(tmp_path / "a.arrow")) == []
    assert read_shard(tmp_path / "a.arrow").schema.names == SCHEMA.names
    assert read_shard(tmp_path / "a.arrow", ["usage.sampled"]).schema.names == ["usage"]


FOREIGN = """
import sys
path = sys.argv[1]
import pyarrow as pa, pyarrow.dataset
table = pa.ipc.open_file(path).read_all()
want = [(r["trace_id"], r["usage"]["sampled"], [n["depth"] for n in r["nodes"]], [n["prior"] for n in r["nodes"]])
        for r in table.to_pylist()]
def same(rows):
    got = [(r["trace_id"], r["usage"]["sampled"], [n["depth"] for n in r["nodes"]],
            [n["prior"] for n in r["nodes"]]) for r in rows]
    assert got == want, (got[0], want[0])
import datasets
same(datasets.load_dataset("arrow", data_files=[path], split="train"))
import polars
same(polars.read_ipc(path).to_dicts())
import duckdb
shard = pa.dataset.dataset(path, format="ipc")
same(duckdb.sql("select * from shard").to_arrow_table().to_pylist())
n = duckdb.sql("select count(*) from shard where usage.sampled > 0 and len(nodes) > 1").fetchall()[0][0]
assert n == sum(sampled > 0 and len(depths) > 1 for _, sampled, depths, _ in want)
assert not any(name.split(".")[0] in ("selfplay", "mcts") for name in sys.modules)
print("rows", len(want))
"""


def test_pyarrow_datasets_polars_and_duckdb_read_a_shard_without_a_line_of_ours(shard: Path, tmp_path: Path) -> None:
    missing = [name for name in ("datasets", "polars", "duckdb") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", FOREIGN, str(shard)],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["rows", "130"]


def naive_digest(rows: list[dict[str, Any]], schema: pa.Schema) -> str:
    """The checksum as the docstring of `selfplay.schema` states it, from plain Python values."""

    def column(field: pa.Field, values: list[Any]) -> bytes:
        name = field.name.encode()
        return struct.pack("<I", len(name)) + name + array(field.type, values)

    def array(kind: pa.DataType, values: list[Any]) -> bytes:
        nulls = any(v is None for v in values)
        validity = b"\1" + bytes(v is not None for v in values) if nulls else b"\0"
        head = struct.pack("<q", len(values)) + validity
        if pa.types.is_boolean(kind):
            return b"b" + head + bytes(bool(v) for v in values)
        if pa.types.is_list(kind):
            lists = [v or [] for v in values]
            lengths = b"".join(struct.pack("<q", len(v)) for v in lists)
            return b"l" + head + lengths + array(kind.value_type, [x for v in lists for x in v])
        if pa.types.is_struct(kind):
            children = b"".join(column(f, [None if v is None else v[f.name] for v in values]) for f in kind)
            return b"r" + head + struct.pack("<I", kind.num_fields) + children
        if pa.types.is_string(kind):
            texts = [(v or "").encode() for v in values]
            return b"s" + head + b"".join(struct.pack("<q", len(t)) for t in texts) + b"".join(texts)
        code = {pa.int32(): "i", pa.int64(): "q", pa.float32(): "f", pa.float64(): "d"}[kind]
        tag = b"i" if pa.types.is_integer(kind) else b"f"
        numbers = b"".join(struct.pack("<" + code, v or 0) for v in values)
        return tag + head + bytes([kind.bit_width // 8]) + numbers

    return hashlib.sha256(b"".join(column(f, [r[f.name] for r in rows]) for f in schema)).hexdigest()


def test_checksum_is_the_one_that_is_documented() -> None:
    rows = [to_row(random_search(i, 12), context()) for i in range(9)]
    assert batch_digest(batch_of(rows)) == naive_digest(rows, SCHEMA)


def test_checksum_follows_content_and_not_memory_layout(shard: Path) -> None:
    batch = next(iter_batches(shard))
    rows = batch.to_pylist()
    part = batch.slice(5, 7)
    assert batch_digest(part) == batch_digest(batch_of(rows[5:12])) == naive_digest(rows[5:12], SCHEMA)
    taken = batch.take(pa.array(range(5, 12)))
    assert batch_digest(taken) == batch_digest(part)
    changed = [dict(row) for row in rows[5:12]]
    changed[0]["seconds"] += 1e-9
    assert batch_digest(batch_of(changed)) != batch_digest(part)


def test_a_truncated_shard_is_noticed(shard: Path) -> None:
    raw = shard.read_bytes()
    for keep in [0, 1, 7, *range(8, len(raw), len(raw) // 40), len(raw) - 1]:
        shard.write_bytes(raw[:keep])
        with pytest.raises(ShardError, match="damaged"):
            read_shard(shard)


def test_missing_repeated_and_swapped_batches_are_noticed(tmp_path: Path) -> None:
    path, forged = tmp_path / "a.arrow", tmp_path / "b.arrow"
    write_pending(path, rows_of(130), METADATA)
    with ipc.open_file(path) as reader:
        batches = [reader.get_batch_with_custom_metadata(i) for i in range(3)]
        schema = reader.schema.with_metadata(unsealed(reader.schema.metadata))
    for order in ([0, 1], [0, 0, 2], [1, 0, 2], [0, 1, 2, 2]):
        with ipc.new_file(forged, schema) as writer:
            for i in order:
                writer.write_batch(batches[i][0], custom_metadata=batches[i][1])
        with pytest.raises(ShardError, match=r"damaged: (it has \d|batch \d does)"):
            read_shard(forged)


def test_what_is_no_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.arrow").write_text("hello")
    with ipc.new_file(tmp_path / "other.arrow", pa.schema([("a", pa.int32())])):
        pass
    with pytest.raises(ShardError, match="damaged"):
        read_shard(tmp_path / "text.arrow")
    with pytest.raises(ShardError, match="no trace shard"):
        read_shard(tmp_path / "other.arrow")
    with pytest.raises(ShardError, match="cannot read"):
        read_shard(tmp_path / "absent.arrow")
    with pytest.raises(ShardError, match="does not exist"):
        list_shards(tmp_path / "absent")


def test_some_columns_can_be_read_alone(shard: Path) -> None:
    full = list(iter_rows(shard))
    some = list(iter_rows(shard, columns=["nodes.depth", "usage.sampled", "nodes.parent", "usage.sampled"]))
    assert some == [
        {
            "usage": {"sampled": row["usage"]["sampled"]},
            "nodes": [{"depth": n["depth"], "parent": n["parent"]} for n in row["nodes"]],
        }
        for row in full
    ]
    assert read_shard(shard, ["seed", "trace_id"]).schema.names == ["trace_id", "seed"]
    for column in ("smell", "usage.smell", "nodes.smell", "seed.smell"):
        with pytest.raises(KeyError, match="no "):
            read_shard(shard, [column])


def test_a_filter_need_not_be_among_the_columns(shard: Path) -> None:
    where = parse_where("nodes > 3 and not won")
    want = [r["trace_id"] for r in iter_rows(shard) if len(r["nodes"]) > 3 and r["verdict"] != "correct"]
    assert 0 < len(want) < 130
    assert [t.trace_id for t in iter_traces(shard, where, ["trace_id"])] == want


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("seed"), "check seed"),
        (lambda row: row.update(smell=1), "check smell"),
        (lambda row: row.update(prompt=None), "column prompt is null"),
        (lambda row: row.update(iteration="one"), "column iteration cannot be written"),
        (lambda row: row["nodes"][1].update(depth=None), r"column nodes\.depth is null"),
        (lambda row: row["usage"].update(calls=None), r"column usage\.calls is null"),
        (lambda row: row["nodes"].append(None), "column nodes is null"),
        (lambda row: row.update(seed=2**63), "column seed cannot be written"),
    ],
)
def test_rows_outside_the_format_are_not_written(tmp_path: Path, change: Any, message: str) -> None:
    (row,) = rows_of(1)
    change(row)
    with pytest.raises(ValueError, match=message):
        write_pending(tmp_path / "a.arrow", [row], METADATA)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_must_say_which_run_and_settings_made_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run_id"):
        write_pending(tmp_path / "a.arrow", [], {"config_hash": "x"})


def test_the_replay_window_holds_the_last_iterations_in_a_fixed_order(tmp_path: Path) -> None:
    for iteration, part in [(10, 0), (2, 1), (9, 2), (9, 0), (100000, 0), (9, 10)]:
        pending = tmp_path / "pending" / "x.arrow"
        write_pending(pending, rows_of(1, iteration=iteration), METADATA)
        commit(pending, shard_path(tmp_path, iteration, part))
    window = ReplayWindow(tmp_path, 2)
    assert window.shards(10) == [shard_path(tmp_path, i, p) for i, p in [(9, 0), (9, 2), (9, 10), (10, 0)]]
    assert [t.iteration for t in window.traces(10, columns=["iteration"])] == [9, 9, 9, 10]
    assert window.shards(9)[-1] == shard_path(tmp_path, 9, 10)
    assert window.shards(8) == []
    assert list_shards(tmp_path)[-1] == shard_path(tmp_path, 100000, 0)
    with pytest.raises(ValueError, match="at least one iteration"):
        ReplayWindow(tmp_path, 0)


def test_content_is_all_but_timing_and_cache_luck(tmp_path: Path) -> None:
    def digest(name: str, *changes: Any, metadata: dict[str, str] = METADATA) -> str:
        rows = rows_of(70)
        for change in changes:
            change(rows[66])
        pending = tmp_path / name / "pending" / "a.arrow"
        write_pending(pending, rows, metadata)
        commit(pending, shard_path(tmp_path / name, 1, 0))
        return content_digest(tmp_path / name)

    base = digest("a")
    same = digest(
        "b",
        lambda row: row.update(seconds=99.0),
        lambda row: row["usage"].update(prompt=1, cached=2, calls=3, uncounted_calls=4, uncounted_tokens=5),
        metadata={"run_id": "another", "config_hash": "c0ffee"},
    )
    assert base == same
    assert base != digest("c", lambda row: row["usage"].update(sampled=1))
    assert base != digest("d", lambda row: row["nodes"][1]["token_ids"].append(1))
    assert base != digest("e", lambda row: row["nodes"][1].update(prior=0.1))
    assert base != digest("f", lambda row: row.update(answer=None))


def test_content_of_rows_drops_the_same_columns() -> None:
    rows = [to_row(won_search(seconds=1.0), context()), to_row(won_search(seconds=2.0), context())]
    rows[1]["usage"] = {**rows[1]["usage"], "prompt": 1, "cached": 2, "calls": 3}
    assert rows[0] != rows[1]
    first, second = content(rows)
    assert first == second
    assert set(rows[0]) - set(first) == {"seconds"}
    assert set(first["usage"]) == {"sampled", "discarded", "scored"}
    assert content([to_row(lost_search(), context())]) != [first]


def test_uncommitted_files_are_no_traces(tmp_path: Path) -> None:
    small_run(tmp_path)
    write_pending(tmp_path / "pending" / "x.arrow", rows_of(1), METADATA)
    assert len(list(iter_rows(tmp_path))) == 6
    (tmp_path / "traces").rename(tmp_path / "other")
    assert len(list(iter_rows(tmp_path))) == 6


def test_reading_imports_neither_torch_nor_ray() -> None:
    code = "import sys, selfplay.shards, selfplay.inspect; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
