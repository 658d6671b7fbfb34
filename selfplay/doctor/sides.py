"""The side files under reanalysis/: whole, by weights of this run, and each row that of a trace of their shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from selfplay import checkpoint as checkpoints
from selfplay.doctor.documents import Documents
from selfplay.doctor.findings import Fault, Finding, ShardFaults
from selfplay.doctor.traces import progress_of, reason, schema_problem
from selfplay.doctor.trees import Floats, Ints, Nodes
from selfplay.schema import MAX_BATCH_ROWS
from selfplay.shards import ShardError, iter_batches, read_metadata, shard_path
from selfplay.side_rows import KIND, SIDE_SCHEMA, side_key, side_path

AGAIN = "delete it: `selfplay reanalyse`, or a learning phase that needs it, makes it again"


class Played(NamedTuple):
    """What a side row must fit, of a trace with N nodes."""

    version: int
    """Policy version that played it."""
    tokens: Ints  # [N]
    visits: Ints  # [N]


@dataclass
class Versions:
    """What is known of the weights that side files name."""

    documents: Documents
    _digests: dict[int, str | None] = field(default_factory=dict)

    @property
    def newest(self) -> int:
        return self.documents.finished

    def digest(self, version: int) -> str | None:
        """Of a checkpoint's weights; None where it is gone, or damaged, which is said elsewhere."""
        if version not in self._digests:
            folder = checkpoints.path_of(self.documents.run / "checkpoints", version)
            try:
                self._digests[version] = checkpoints.weights_digest(folder)
            except checkpoints.CheckpointError:
                self._digests[version] = None
        return self._digests[version]

    @cached_property
    def returned_to(self) -> set[int]:
        """Versions that the run went back to after a collapse: they learned from what newer ones had played."""
        good = {iteration: self.documents.good(iteration) for iteration in range(1, self.newest + 2)}
        return {version for iteration, version in good.items() if version != iteration - 1}


def side_faults(documents: Documents, note: Callable[[str], None]) -> Iterator[Finding]:
    """Everything about the files under reanalysis/. One whose shard retention may have deleted is no finding: it goes
    with the shard, or the next time that retention looks."""
    run, config = documents.run, documents.config
    if config is None:
        return  # without a config nothing can be expected; that it is missing was said
    progress, versions = progress_of(documents, config), Versions(documents)
    units: dict[tuple[int, int], list[tuple[int, Path]]] = {}
    for path in sorted((run / KIND).rglob("*")) if (run / KIND).is_dir() else []:
        where = path.relative_to(run).as_posix()
        version, iteration, part = side_key(where)
        if version >= 0 and path == side_path(shard_path(run, iteration, part), version):
            units.setdefault((iteration, part), []).append((version, path))
        elif not path.is_dir():
            yield Finding("side files", where, "is no name of a side file", "move it out of the run")
    for number, ((iteration, part), sides) in enumerate(sorted(units.items()), start=1):
        note(f"side files of {number} of {len(units)} shards")
        shard = shard_path(run, iteration, part)
        if shard.exists():
            played = played_in(shard)
            for version, path in sides:
                yield from file_faults(path, version, played, versions)
        elif not progress.may_lack(iteration):
            for _, path in sides:
                what = f"belongs to {shard.relative_to(run).as_posix()}, which is not there"
                yield Finding("side files", path.relative_to(run).as_posix(), what, "restore that one, or delete this")


def played_in(shard: Path) -> dict[str, Played] | None:
    """By trace id; None for a shard that cannot be trusted, which is said elsewhere."""
    found = {}
    try:
        for batch in iter_batches(shard):
            if schema_problem(batch.schema):
                return None
            nodes = Nodes(batch)
            tokens = np.asarray(pc.list_value_length(nodes.column("token_ids")), dtype=np.int64)
            visits = nodes.ints("visits")
            ids, by = batch.column("trace_id").to_pylist(), batch.column("policy_version").to_pylist()
            for row, start in enumerate(nodes.starts):
                here = slice(start, start + nodes.lengths[row])
                found[ids[row]] = Played(by[row], tokens[here], visits[here])
    except ShardError:
        return None
    return found


def file_faults(path: Path, version: int, played: Mapping[str, Played] | None, versions: Versions) -> Iterator[Finding]:
    """One side file of a shard that holds `played`."""
    where = path.relative_to(versions.documents.run).as_posix()
    faults, seen = ShardFaults(), set[str]()
    try:
        metadata = read_metadata(path)
        if metadata.get("kind") != KIND:
            yield Finding("schema", where, "is no side file by its metadata", "move it out of the run")
            return
        yield from _name_faults(where, metadata, version, versions)
        for batch in iter_batches(path):
            problem = schema_problem(batch.schema, SIDE_SCHEMA, whole=True)
            if batch.num_rows > MAX_BATCH_ROWS:
                problem = problem or f"has a batch of {batch.num_rows} rows, more than {MAX_BATCH_ROWS}"
            if problem:
                yield Finding("schema", where, problem, AGAIN)
                return
            ids = batch.column("trace_id").to_pylist()
            for fault in (*row_faults(batch, version, played, versions, seen), *node_faults(batch, played or {})):
                faults.add(fault, ids)
    except ShardError as error:
        if path.exists():  # else retention deleted it meanwhile
            yield Finding("checksum", where, reason(error, path), AGAIN)
        return
    yield from faults.findings(where, AGAIN)
    missing = set() if played is None else played.keys() - seen
    if missing:
        yield Finding("rows", where, f"lacks {len(missing)} of the {len(played or ())} traces of its shard", AGAIN)


def _name_faults(where: str, metadata: Mapping[str, str], version: int, versions: Versions) -> Iterator[Finding]:
    """Who made it, by its metadata, against its place."""
    run_id, digest = versions.documents.id, versions.digest(version)
    if run_id is not None and metadata.get("run_id") != run_id:
        what = f"belongs to run {metadata.get('run_id')}, and this is run {run_id}"
        yield Finding("run id", where, what, "move it out of the run")
    if metadata.get("version") != str(version):
        yield Finding("versions", where, f"says that version {metadata.get('version')} made it", AGAIN)
    if version > versions.newest:
        what = f"is by version {version}, and the newest that this run made is {versions.newest}"
        yield Finding("versions", where, what, "delete it, or restore that checkpoint")
    elif digest is not None and metadata.get("weights") != digest:
        yield Finding("weights", where, f"was made with other weights than those of checkpoint {version}", AGAIN)


def row_faults(
    batch: pa.RecordBatch, version: int, played: Mapping[str, Played] | None, versions: Versions, seen: set[str]
) -> Iterator[Fault]:
    """Faults of a batch's rows as a whole; their ids are added to those `seen` before."""
    found: dict[tuple[str, str], list[int]] = {}
    columns = [batch.column(name).to_pylist() for name in ("trace_id", "policy_version", "value_version", "error")]
    scored = batch.column("nodes").is_valid().to_pylist()
    lengths = pc.list_value_length(batch.column("nodes")).to_pylist()
    for row, (trace, policy, value, error) in enumerate(zip(*columns, strict=True)):
        said = []
        if trace in seen:
            said.append(("twice", "is there twice"))
        seen.add(trace)
        if policy != version or value not in (None, version):
            said.append(("versions", f"says versions {policy} and {value}, and its folder {version}"))
        if scored[row] == (error is not None):
            said.append(("nodes", "has neither nodes nor a reason why not, or both"))
        fits = None if played is None else played.get(trace)
        if fits is None and played is not None:
            said.append(("traces", "is no trace of its shard"))
        if fits is not None and version < fits.version and version not in versions.returned_to:
            said.append(("versions", f"was scored by version {version}, and a newer one, {fits.version}, played it"))
        if fits is not None and scored[row] and lengths[row] != len(fits.tokens):
            said.append(("nodes", f"has {lengths[row]} nodes, and its shard {len(fits.tokens)}"))
        for fault in said:
            found.setdefault(fault, []).append(row)
    for (check, what), rows in found.items():
        yield Fault(check, rows, what)


def node_faults(batch: pa.RecordBatch, played: Mapping[str, Played]) -> Iterator[Fault]:
    """Rows with as many nodes as their trace that hold numbers which cannot be those of its nodes."""
    ids = batch.column("trace_id").to_pylist()
    lengths = pc.list_value_length(batch.column("nodes")).to_pylist()
    kept = [row for row, trace in enumerate(ids) if trace in played and lengths[row] == len(played[trace].tokens)]
    if not kept:
        return
    nodes = Nodes(batch.take(pa.array(kept, pa.int64())))
    tokens, visits = (
        np.concatenate([getattr(played[ids[row]], name) for row in kept]) for name in ("tokens", "visits")
    )
    for fault in _number_faults(nodes, tokens, visits.astype(np.float64)):
        yield fault._replace(rows=[kept[row] for row in fault.rows])


def _number_faults(nodes: Nodes, tokens: Ints, visits: Floats) -> Iterator[Fault]:
    """`tokens` [N], `visits` [N]: of the trace's nodes."""
    scored = np.asarray(pc.list_value_length(nodes.column("logprobs")).fill_null(-1), dtype=np.int64)
    off = scored != np.where(nodes.own == 0, -1, tokens)
    yield from nodes.fault("logprobs", off, "has node {node} with other numbers of tokens and of logprobs")
    for name in ("raw_value", "prior", "target"):
        column = nodes.floats(name)
        given = np.asarray(nodes.column(name).is_valid().to_numpy(zero_copy_only=False), dtype=np.bool_)
        outside = given & ~((column >= 0.0) & (column <= 1.0))
        yield from nodes.fault("values", outside, f"has node {{node}} with a {name} outside [0, 1]")
    total = nodes.floats("value_sum")
    outside = ~((total >= -1e-9) & (total <= visits + 1e-9))
    yield from nodes.fault("values", outside, "has node {node} with a mean value outside [0, 1]")
