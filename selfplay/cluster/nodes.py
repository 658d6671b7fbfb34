"""The Ray that a run lives in: one of its own on this machine, or a cluster that it joins; its nodes and their room."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from selfplay.config import Config
from selfplay.run_folder import RunError

log = logging.getLogger(__name__)
LOOK_SECONDS = 2.0
"""Between two looks at which nodes there are."""
REACH_SECONDS = 10.0
"""How long the cluster's head may take to accept a connection."""
ANSWER_SECONDS = 120.0
"""How long a node may take to answer whether it sees the run; a worker that starts there later looks again."""


def connect(config: Config) -> None:
    """Start a Ray of our own without dashboard, whose processes end with this one, or join the one at
    `cluster.address`, if this process has not yet. Raises RunError where that cannot be reached."""
    cluster = config.cluster
    threads = str(cluster.worker_threads)
    environment = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **_passed_on()}
    if cluster.address is None:
        ray.init(
            num_cpus=math.ceil(_own_workers(config) * cluster.worker_cpus + cluster.learners * cluster.learner_cpus),
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _system_config={"worker_niceness": 0},  # ours is the job that this machine is for
            runtime_env={"env_vars": environment},
        )
        return
    if ray.is_initialized():
        return
    _reach(cluster.address)
    try:
        ray.init(
            address=cluster.address, log_to_driver=False, configure_logging=False, runtime_env={"env_vars": environment}
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(
            f"cannot join the Ray cluster at {cluster.address}: {str(error).splitlines()[0]}; start it with "
            "`ray start`, or leave out --address to run on this machine alone"
        ) from error


def _reach(address: str) -> None:
    """Raises RunError where nothing listens at HOST:PORT; Ray itself tries for minutes. Other forms are Ray's to
    judge."""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in address or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"nothing answers at {address} ({reason}): start the cluster with `ray start`, mend --address, or leave it "
            "out to run on this machine alone"
        ) from error


def _passed_on() -> dict[str, str]:
    """Settings of this process that those on other nodes need."""
    names = [name for name in os.environ if name.startswith(("AWS_", "SELFPLAY_")) or name == "PYTHONPATH"]
    return {name: os.environ[name] for name in names}


def _own_workers(config: Config) -> int:
    """Workers on a Ray of our own: `fit` leaves room for the learners."""
    cluster = config.cluster
    if cluster.workers != "fit":
        return cluster.workers
    cores = os.cpu_count() or 1
    return max(1, int((cores - cluster.learners * cluster.learner_cpus) // cluster.worker_cpus))


def own_error(error: RayTaskError) -> Exception:
    """What a call raised itself, without Ray's wrapping."""
    return error.cause if isinstance(error.cause, Exception) else error


class Nodes:
    """Which nodes there are and how many workers they have room for."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._looked = -math.inf
        self._fit = -1

    def alive(self) -> list[dict[str, Any]]:
        return [node for node in ray.nodes() if node["Alive"]]

    def workers_wanted(self) -> int:
        """So many as the config says, but no more than there is room for beside the learners: one that waited for room
        would take the place of a learner that has to start again."""
        workers = self._config.cluster.workers
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            found = self._room()
            if found != self._fit:
                short = found < (1 if workers == "fit" else workers)
                log.log(
                    logging.WARNING if short else logging.INFO,
                    "the cluster has room for %d workers beside the learners (wanted: %s)", found, workers,
                )  # fmt: skip
            self._fit = found
        return self._fit if workers == "fit" else min(workers, self._fit)

    def _room(self) -> int:
        """Workers that fit on all nodes beside the learners, which are taken to sit where most room is."""
        cluster = self._config.cluster
        rooms = []
        for node in self.alive():
            has = node["Resources"]
            rooms.append([has.get("CPU", 0.0), has.get("GPU", 0.0)])
        for _ in range(cluster.learners):
            rooms.sort(reverse=True)
            if rooms:
                rooms[0][0] -= cluster.learner_cpus
                rooms[0][1] -= cluster.learner_gpus
        return sum(_fits(cpus, gpus, cluster.worker_cpus, cluster.worker_gpus) for cpus, gpus in rooms)

    def place_worker(self, actor_class: Any) -> Any:
        """`actor_class` with the resources of a worker, spread over the nodes (Ray packs otherwise)."""
        cluster = self._config.cluster
        strategy = "SPREAD" if cluster.address is not None else "DEFAULT"
        return actor_class.options(
            num_cpus=cluster.worker_cpus,
            num_gpus=cluster.worker_gpus,
            scheduling_strategy=strategy,
            max_restarts=0,
        )

    def on_each(self, task: Any, *arguments: Any) -> dict[str, tuple[str, Any]]:
        """Run a Ray task once on every living node: node id -> (address, its result or the error that it raised).

        Only an answer counts. A node that gives none is asked again until it answers or is known to be dead, which
        takes Ray a while; after ANSWER_SECONDS it is left out.
        """
        found: dict[str, tuple[str, Any]] = {}
        deadline = time.monotonic() + ANSWER_SECONDS
        while silent := {n["NodeID"]: n["NodeManagerAddress"] for n in self.alive() if n["NodeID"] not in found}:
            calls = {node: self._on(node, task, *arguments) for node in silent}
            for node, call in calls.items():
                try:
                    found[node] = (silent[node], ray.get(call, timeout=max(1.0, deadline - time.monotonic())))
                except RayTaskError as error:
                    found[node] = (silent[node], own_error(error))
                except RayError as error:
                    log.info("node %s gives no answer yet: %s", silent[node], error)
            unheard = [address for node, address in silent.items() if node not in found]
            if unheard and time.monotonic() > deadline:
                log.warning("no answer from node %s within %.0f s; the run begins", ", ".join(unheard), ANSWER_SECONDS)
                break
            if unheard:
                time.sleep(LOOK_SECONDS)
        return found

    def _on(self, node: str, task: Any, *arguments: Any) -> Any:
        pinned = NodeAffinitySchedulingStrategy(node, soft=False)
        return task.options(num_cpus=0, scheduling_strategy=pinned, max_retries=0).remote(*arguments)


def _fits(cpus: float, gpus: float, worker_cpus: float, worker_gpus: float) -> int:
    by_cpu = int((cpus + 1e-6) // worker_cpus)
    return max(0, by_cpu if not worker_gpus else min(by_cpu, int((gpus + 1e-6) // worker_gpus)))
