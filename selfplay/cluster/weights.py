"""Weights to every node: one object per version in Ray's object store, which each node fetches once.

The first worker of a node that wants a version writes the object's files into a folder of the node and the others
load from there, so the policy is read as from any other Hugging Face folder.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

KEPT = 4
"""Versions that stay on a node: the newest, and those that late work may still ask for."""
PARTS = ("policy", "value_head.safetensors")
"""What playing needs of a checkpoint."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A published version. Small; travels with the calls that need it."""

    version: int
    run_id: str
    bytes: int
    held: tuple[Any, ...]
    """The object's reference, inside a tuple so that Ray passes it on and does not fetch it."""
    folder: Path | None = None
    """Where nothing is sent: a checkpoint folder that the reader sees itself."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What bringing a version to a node cost; nothing for all but the first worker of that node."""

    node: str
    bytes: int
    seconds: float


def publish(checkpoint: Path, version: int, run_id: str) -> Weights:
    """Put what playing needs of `checkpoint` into the object store of this node."""
    files: dict[str, Any] = {}
    for part in PARTS:
        path = checkpoint / part
        for file in sorted(path.rglob("*")) if path.is_dir() else [path] * path.is_file():
            if file.is_file():
                files[str(file.relative_to(checkpoint))] = np.fromfile(file, dtype=np.uint8)
    size = sum(content.nbytes for content in files.values())
    return Weights(version, run_id, size, (ray.put(files),))


def fetch(weights: Weights, node: str) -> tuple[Path, Fetched]:
    """The folder with a version's files on this node, fetched by whoever comes first."""
    if weights.folder is not None:
        return weights.folder, Fetched(node, 0, 0.0)
    began = time.perf_counter()
    home = cache_folder(weights.run_id, node)
    home.mkdir(parents=True, exist_ok=True)
    folder = home / f"{weights.version:05d}-{weights.held[0].hex()}"  # a resumed driver publishes anew
    with open(home / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder, Fetched(node, 0, 0.0)
        building = home / f".{uuid.uuid4().hex}"
        try:
            for name, content in ray.get(weights.held[0]).items():
                (building / name).parent.mkdir(parents=True, exist_ok=True)
                content.tofile(building / name)
            building.rename(folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        _prune(home)
    return folder, Fetched(node, weights.bytes, time.perf_counter() - began)


def _prune(home: Path) -> None:
    folders = [path for path in home.iterdir() if path.is_dir()]
    for old in sorted(folders, key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def cache_folder(run_id: str, node: str) -> Path:
    """Where a node keeps a run's weights. Nodes may share a disk, so the node has a part in the name."""
    home = os.environ.get("SELFPLAY_CACHE") or str(Path(tempfile.gettempdir()) / f"selfplay-{os.getuid()}")
    return Path(home) / "weights" / run_id / node[:16]


def forget(run_id: str, node: str) -> None:
    """Delete what a node keeps of a run's weights."""
    shutil.rmtree(cache_folder(run_id, node), ignore_errors=True)
