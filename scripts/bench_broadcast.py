"""What handing weights to workers costs: seconds from the published checkpoint to the file loaded on every node.

    python scripts/bench_broadcast.py [--megabytes 1 10 100] [--workers 2] [--repetitions 3] [--json FILE]

Two Ray nodes on this machine (network namespaces where permitted), on each of which several workers ask for each
version at the same time; checked: every node fetches it once. Random weights, so nothing compresses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray
from bench_rows import Row
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors.numpy import load_file, save_file

from selfplay.cluster.weights import Fetched, Weights, fetch, forget, publish

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.cluster_net import MIB, Cluster  # noqa: E402

RUN_ID = "bench-broadcast"
SIZES = (1, 10, 100)


class Reader:
    """What a worker does with weights, without the engine."""

    def __init__(self) -> None:
        self._node: str = ray.get_runtime_context().get_node_id()

    def load(self, weights: Weights) -> tuple[Fetched, str]:
        """What it cost this worker, and the digest of what it loaded."""
        folder, fetched = fetch(weights, self._node)
        return fetched, digest(folder)

    def forget(self) -> None:
        forget(RUN_ID, self._node)


def digest(checkpoint: Path) -> str:
    """Of the weights in a checkpoint's policy."""
    return hashlib.sha256(load_file(checkpoint / "policy" / "model.safetensors")["weight"].data).hexdigest()


def checkpoint_of(folder: Path, megabytes: int, seed: int) -> Path:
    (folder / "policy").mkdir(parents=True)
    values = np.random.default_rng(seed).integers(0, 256, megabytes * 1_000_000, dtype=np.uint8)
    save_file({"weight": values}, folder / "policy" / "model.safetensors")
    return folder


def measure_here(address: str, sizes: Sequence[int], workers: int, repetitions: int) -> list[dict[str, Any]]:
    """In a process on the head node: all figures."""
    ray.init(address=address, log_to_driver=False, configure_logging=False)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    own = ray.get_runtime_context().get_node_id()
    nodes.sort(key=lambda node: node != own)
    kind = ray.remote(num_cpus=0.01)(Reader)
    readers = []
    for node in nodes:
        pinned = kind.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        readers.append([pinned.remote() for _ in range(workers)])
    ray.get([reader.forget.remote() for of_node in readers for reader in of_node])
    found, version = [], 0
    with TemporaryDirectory(prefix="bench-") as name:
        for megabytes in sizes:
            for count in range(1, len(nodes) + 1):
                chosen = [reader for of_node in readers[:count] for reader in of_node]
                publishing, whole, nbytes = [], [], 0
                for _ in range(repetitions):
                    version += 1
                    checkpoint = checkpoint_of(Path(name) / str(version), megabytes, version)
                    began = time.perf_counter()
                    weights = publish(checkpoint, version, RUN_ID)
                    publishing.append(time.perf_counter() - began)
                    answers = ray.get([reader.load.remote(weights) for reader in chosen])
                    whole.append(time.perf_counter() - began)
                    check(answers, weights, digest(checkpoint), nodes[:count])
                    nbytes = sum(fetched.bytes for fetched, _ in answers)
                found.append(
                    {
                        "megabytes": megabytes,
                        "nodes": count,
                        "workers_per_node": workers,
                        "bytes_fetched": nbytes,
                        "publish_seconds": publishing,
                        "seconds": whole,
                        "load": os.getloadavg()[0],
                    }
                )
    ray.get([of_node[0].forget.remote() for of_node in readers])
    ray.shutdown()
    return found


def check(answers: list[tuple[Fetched, str]], weights: Weights, wanted: str, nodes: list[str]) -> None:
    """Raise AssertionError unless each node fetched the whole version once and every worker loaded what was saved."""
    fetches = Counter(fetched.node for fetched, _ in answers if fetched.bytes)
    if fetches != Counter(nodes) or any(fetched.bytes not in (0, weights.bytes) for fetched, _ in answers):
        raise AssertionError(f"nodes fetched version {weights.version} so often: {dict(fetches)}; wanted: once each")
    if {loaded for _, loaded in answers} != {wanted}:
        raise AssertionError(f"version {weights.version} was not loaded as it was saved")


def measure(folder: Path, *, sizes: Sequence[int] = SIZES, workers: int = 2, repetitions: int = 3) -> list[Row]:
    """Seconds until the weights are loaded on two nodes, against one node."""
    out = folder / "broadcast.json"
    with Cluster(folder / "cluster", nodes=2, object_store_bytes=400 * MIB) as cluster:
        command = [sys.executable, str(Path(__file__).resolve()), "--inside", cluster.address, "--json", str(out)]
        command += ["--workers", str(workers), "--repetitions", str(repetitions), "--megabytes", *map(str, sizes)]
        path = f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"
        done = cluster.head.run(command, environment={"PYTHONPATH": path})
        if done.returncode != 0:
            raise RuntimeError(f"the broadcast could not be measured: {done.stdout}")
    found = {(f["megabytes"], f["nodes"]): f for f in json.loads(out.read_text(encoding="utf-8"))}
    rows = []
    for megabytes in sizes:
        one, two = found[megabytes, 1], found[megabytes, 2]
        figures = [statistics.median(f["seconds"]) for f in (two, one)]
        rows.append(
            Row(f"broadcast of {megabytes} MB to 2 nodes", *figures, "s", "1 node", details={"one": one, "two": two})
        )
    return rows


def show(rows: Sequence[Row]) -> None:
    for row in rows:
        for facts in (row.details["one"], row.details["two"]):
            whole, publishing = (statistics.median(facts[name]) for name in ("seconds", "publish_seconds"))
            each = " ".join(f"{seconds:.2f}" for seconds in facts["seconds"])
            print(
                f"{facts['megabytes']:>4} MB, {facts['nodes']} nodes x {facts['workers_per_node']} workers: "
                f"{facts['bytes_fetched'] / 1e6:.1f} MB fetched, {whole:.3f} s from publish to loaded ({each}), "
                f"publish {publishing:.3f} s (load {facts['load']:.1f})"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--workers", type=int, default=2, help="on each node")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--inside", metavar="ADDRESS", help="measure on the cluster that this node is part of")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chosen = (arguments.megabytes, arguments.workers, arguments.repetitions)
    if arguments.inside is not None:
        found = measure_here(arguments.inside, *chosen)
    else:
        with TemporaryDirectory(prefix="bench-") as name:
            sizes, workers, repetitions = chosen
            rows = measure(Path(name), sizes=sizes, workers=workers, repetitions=repetitions)
        show(rows)
        found = [row.to_json() for row in rows]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
