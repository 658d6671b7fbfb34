"""The shards of a run, one record batch in memory at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from selfplay.config import Config
from selfplay.doctor.documents import Documents
from selfplay.doctor.findings import RESTORE, Finding, ShardFaults
from selfplay.doctor.rows import Iteration, row_faults
from selfplay.doctor.trees import tree_faults
from selfplay.doctor.units import REPLAY, Expected, Progress, by_iteration, expected_units, folder_of, unit_faults
from selfplay.schema import MAX_BATCH_ROWS, SCHEMA
from selfplay.shards import ShardError, iter_batches, list_shards, read_metadata, shard_key

SAME = 1e-9
"""Two ways of dividing the same whole numbers."""


def trace_faults(documents: Documents, note: Callable[[str], None]) -> Iterator[Finding]:
    """Everything about the shards under traces/."""
    run, config = documents.run, documents.config
    if config is None:
        return  # without a config nothing can be expected; that it is missing was said
    shards = list_shards(run / "traces") if (run / "traces").is_dir() else []
    iterations, others = by_iteration(shards, run)
    yield from others
    progress = progress_of(documents, config)
    configs = {known.hash(): known for known in documents.configs}
    pool = documents.pool
    expected = {
        number: expected_units(_played_with(paths, configs) or config, pool) for number, paths in iterations.items()
    }
    yield from unit_faults(iterations, expected, progress)
    done = 0
    newest: dict[int, int] = {}
    for number, paths in sorted(iterations.items()):
        at = Iteration(number, versions_of(documents, number))
        whole = True
        units = [path for path in paths if shard_key(path)[1] < expected[number].parts]  # of others it was said
        for path in units:
            note(f"traces of iteration {number}: shard {done + 1} of {len(shards)}")
            found = list(shard_faults(path, run, at, expected[number], configs, documents, progress))
            whole = whole and not any(finding.check in ("checksum", "schema", "rows") for finding in found)
            yield from found
            done += 1
        if whole and len(units) == expected[number].parts:
            yield from metric_faults(documents, at)
        if at.rows:
            newest[number] = at.newest
    yield from order_faults(newest, documents.rolled_back)


def progress_of(documents: Documents, config: Config) -> Progress:
    return Progress(
        finished=max(documents.finished, 0),
        ahead=1 + max(known.play.max_staleness for known in documents.configs),
        needed=max(documents.finished, 0) - config.play.max_staleness - config.learn.window + 1,
        deletes=any(c.keep.iterations is not None or c.keep.days is not None for c in documents.configs),
    )


def versions_of(documents: Documents, iteration: int) -> set[int]:
    """The policy versions that may play `iteration`: the newest checkpoint, or the last good one after a rollback, as
    of when it or one of the iterations began that staleness lets it run ahead of."""
    staleness = max(known.play.max_staleness for known in documents.configs)
    if not staleness:
        return {documents.good(iteration)}
    newest = range(max(0, iteration - 1 - staleness), iteration)
    known = range(max(1, iteration - 2 * staleness), iteration + 1)  # an evaluation may end so much later
    return {*newest, *(documents.good(at) for at in known if documents.good(at) != at - 1)}


def order_faults(newest: Mapping[int, int], rolled_back: Callable[[int], bool]) -> Iterator[Finding]:
    """Versions that go back without a rollback; `newest` holds the newest one that played each iteration."""
    for before, number in itertools.pairwise(sorted(newest)):
        if newest[number] < newest[before] and not rolled_back(number):
            what = f"was played by version {newest[number]} at most, and iteration {before} by {newest[before]}"
            yield Finding("versions", folder_of(number), what, f"do not train on it, {RESTORE}")


def _played_with(shards: list[Path], configs: Mapping[str, Config]) -> Config | None:
    """The config of the first shard that names a known one."""
    for path in shards:
        try:
            known = configs.get(read_metadata(path)["config_hash"])
        except (ShardError, KeyError):
            continue  # said where the shard itself is looked at
        if known is not None:
            return known
    return None


def shard_faults(
    path: Path,
    run: Path,
    at: Iteration,
    expected: Expected,
    configs: Mapping[str, Config],
    documents: Documents,
    progress: Progress,
) -> Iterator[Finding]:
    """One shard: checksums, schema, who wrote it, and every row."""
    where = path.relative_to(run).as_posix()
    cure = REPLAY if at.number >= progress.needed else RESTORE
    faults = ShardFaults()
    rows, schema = 0, None
    try:
        metadata = read_metadata(path)
        hashed = metadata.get("config_hash", "")
        known = configs.get(hashed)
        if documents.id is not None and metadata.get("run_id") != documents.id:
            what = f"belongs to run {metadata.get('run_id')}, and this is run {documents.id}"
            yield Finding("run id", where, what, "move it out of the run")
        if known is None:
            yield Finding("config", where, "was played with a config that is not kept here", "restore config*.yaml")
        for batch in iter_batches(path):
            if schema is None:
                schema = schema_problem(batch.schema)
                if schema:
                    yield Finding("schema", where, schema, cure)
                    return
            if batch.num_rows > MAX_BATCH_ROWS:
                what = f"has a batch of {batch.num_rows} rows, more than {MAX_BATCH_ROWS}"
                yield Finding("schema", where, what, "write it again in smaller batches")
            rows += batch.num_rows
            ids = batch.column("trace_id").to_pylist()
            for fault in (*row_faults(batch, at, hashed, None if known is None else known.seed), *tree_faults(batch)):
                faults.add(fault, ids)
    except ShardError as error:
        yield Finding("checksum", where, reason(error, path), cure)
        return
    yield from faults.findings(where)
    if rows != (wanted := expected.rows(shard_key(path)[1])):
        yield Finding("rows", where, f"has {rows} rows, and its unit has {wanted} problems", cure)


def reason(error: ShardError, path: Path) -> str:
    """What is wrong, without the file's name and the cure that the finding gives itself."""
    text = str(error).removeprefix(f"shard {path} ").removeprefix(f"{path} ")
    return text.partition("; ")[0]


def schema_problem(schema: pa.Schema, wanted: pa.Schema = SCHEMA, *, whole: bool = False) -> str:
    """Which column differs from the format; empty where none does. Unknown columns are no fault, nor is a nullable one
    that is missing, unless the `whole` format is asked for: minor versions add those."""
    for field in wanted:
        at = schema.get_field_index(field.name)
        if at < 0 and (whole or not field.nullable):
            return f"lacks the column {field.name}"
        if at >= 0 and not _covers(schema.field(at).type, field.type):
            return f"has column {field.name} of another type than the format's"
    return ""


def _covers(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether `found` is `wanted`, or a struct (or list of structs) with more fields, or without nullable ones."""
    if pa.types.is_list(wanted) and pa.types.is_list(found):
        return _covers(found.value_type, wanted.value_type)
    if pa.types.is_struct(wanted) and pa.types.is_struct(found):
        have = {field.name: field.type for field in found}
        return all(_covers(have[f.name], f.type) if f.name in have else f.nullable for f in wanted)
    return bool(found == wanted)


def metric_faults(documents: Documents, at: Iteration) -> Iterator[Finding]:
    """What metrics.jsonl says of an iteration against its shards, which are all there and whole."""
    for row in documents.metrics:
        if row["iteration"] != at.number:
            continue
        solved = at.won / at.rows if at.rows else None
        for name, said, counted in (
            ("problems", row.get("problems"), at.rows),
            ("sampled_tokens", row.get("sampled_tokens"), at.sampled),
            ("solved", row.get("solved"), solved),
        ):
            equal = isinstance(said, int | float) and counted is not None and abs(said - counted) <= SAME
            if not equal:
                what = f"says {name} {said} of iteration {at.number}, and its shards {counted}"
                yield Finding("metrics", "metrics.jsonl", what, RESTORE)
