"""Before a run begins: every node proves that it sees the run's folder, or launch refuses."""

from __future__ import annotations

from typing import Any

import ray

from selfplay.cluster.nodes import Nodes
from selfplay.run_folder import RunError
from selfplay.store import Place, Store


@ray.remote  # type: ignore[untyped-decorator]
def _see(place: Place) -> None:
    """Raises StoreError where this node does not see the run."""
    place.open().check()


def prove(nodes: Nodes, store: Store) -> None:
    """Raises RunError naming the nodes that do not see the run that this process sees."""
    found: dict[str, tuple[str, Any]] = nodes.on_each(_see, store.place)
    blind = {address: error for address, error in found.values() if isinstance(error, BaseException)}
    if blind:
        address, error = next(iter(blind.items()))
        others = f" (and {len(blind) - 1} more)" if len(blind) > 1 else ""
        raise RunError(
            f"node {address}{others} does not see the run at {store.place.url}: {str(error).splitlines()[0]}; mount "
            "the same folder there, or keep the run in object storage (--run-dir s3://...)"
        )
