"""A unit that was cut into parts becomes one shard again."""

from __future__ import annotations

from selfplay.config import Config
from selfplay.pieces import Complete
from selfplay.shards import iter_rows, write_pending
from selfplay.store import Store, guard
from selfplay.worker import Played


def join(store: Store, config: Config, complete: Complete) -> Played:
    """The unit with one pending shard, its rows in the order of its problems. Raises StoreError, ShardError."""
    if len(complete.parts) == 1:
        return complete.parts[0]
    rows = [row for part in complete.parts for row in iter_rows(store.pull(part.pending))]
    scratch = store.scratch(complete.unit.name)
    with guard(store):
        metadata = {"run_id": store.place.run_id, "config_hash": config.hash()}
        write_pending(scratch, rows, metadata, make_folder=False)
    pending = store.offer(scratch)
    for part in complete.parts:
        store.remove(part.pending)
    return Played(complete.unit, pending, complete.seconds)
