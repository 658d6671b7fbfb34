"""Before a run begins: every node proves that it sees the run's folder, or launch refuses."""

from __future__ import annotations

import ray

from selfplay.cluster.nodes import Nodes
from selfplay.run_folder import RunError
from selfplay.store import Answer, Place, Store, answer, ask, check_answer


@ray.remote  # type: ignore[untyped-decorator]
def _answer(place: Place) -> Answer:
    """Raises RunError where this node does not see the run."""
    return answer(place.open(), ray.util.get_node_ip_address())


def prove(nodes: Nodes, store: Store) -> None:
    """Raises RunError naming the first node that does not see the run that this process sees, or sees another."""
    token = ask(store)
    for address, given in nodes.on_each(_answer, store.place).values():
        if not isinstance(given, Answer):
            raise RunError(
                f"node {address} does not see the run at {store.place.url}: {str(given).splitlines()[0]}; mount the "
                "same folder there, or keep the run in object storage (--run-dir s3://...)"
            )
        check_answer(store, token, address, given)
