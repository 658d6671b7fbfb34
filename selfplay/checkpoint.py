"""What a run needs to continue, one folder per iteration; `state.json`, written last, makes it exist.

Everything is written into a temporary folder beside the final one, synced, and renamed. `state.json` lists every
other file with its size and sha256.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from selfplay.disk import sync_path

if TYPE_CHECKING:
    from mcts.engines.model import Policy

STATE = "state.json"
OPTIMIZER = "optimizer.pt"
FORMAT = 1
MEND = "restore the file, or delete the checkpoint's folder and `selfplay resume` goes on from the one before"
_NAME = re.compile(r"\d{5,}")
_CHUNK = 1 << 20


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or trusted; the message is one sentence that says what to do."""


def name_of(iteration: int) -> Path:
    """Of a checkpoint within the run: each node has its own path to the run."""
    return path_of(Path("checkpoints"), iteration)


def path_of(checkpoints: Path, iteration: int) -> Path:
    """The folder of a checkpoint, whether it exists or not."""
    return checkpoints / f"{iteration:05d}"


def write(
    building: Path, iteration: int, policy: Policy, optimizer: dict[str, Any] | None, state: dict[str, Any]
) -> None:
    """Write the checkpoint of `iteration` into the new folder `building`, whole and synced; `Store.publish` gives it
    its name in a run.

    `optimizer` is a state dict of tensors and plain values; `state` is plain JSON. Raises CheckpointError where it
    cannot be written; nothing is left then.
    """
    from mcts.engines.model import save_policy

    try:
        building.mkdir()
        save_policy(policy, building)
        if optimizer is not None:
            torch.save(optimizer, building / OPTIMIZER)
        names = _files(building)
        listed = {name: _entry(building / name) for name in names}
        for name in names:
            sync_path(building / name)
        with open(building / STATE, "w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, "iteration": iteration, "state": state, "files": listed}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        for folder in sorted({(building / name).parent for name in [*names, STATE]}):
            sync_path(folder)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:  # torch has no OSError of its own
        shutil.rmtree(building, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of iteration {iteration} cannot be written into {building}: {_reason(error)}; free space "
            "or fix the folder, then `selfplay resume`"
        ) from error


def _reason(error: Exception) -> str:
    """In one line, as short as it comes."""
    strerror = getattr(error, "strerror", None)
    return str(strerror or str(error).split("\n")[0].rstrip("."))


def latest(checkpoints: Path) -> int | None:
    """Number of the newest checkpoint that exists (has a `state.json`); None where there is none."""
    return max(existing(checkpoints), default=None)


def existing(checkpoints: Path) -> list[int]:
    """Numbers of all checkpoints, ascending."""
    if not checkpoints.is_dir():
        return []
    return sorted(int(p.name) for p in checkpoints.iterdir() if _NAME.fullmatch(p.name) and (p / STATE).is_file())


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The `state` that `save` was given. Checks no file."""
    state: dict[str, Any] = _manifest(checkpoint)["state"]
    return state


def read_files(checkpoint: Path) -> dict[str, Any]:
    """Size and sha256 of every file of a checkpoint, by name. Checks no file."""
    files: dict[str, Any] = _manifest(checkpoint)["files"]
    return files


def weights_digest(checkpoint: Path) -> str:
    """Sha256 over the names and digests of a checkpoint's files, optimiser left out, in hex. Checks no file."""
    files = _manifest(checkpoint)["files"]
    listed = sorted((name, entry["sha256"]) for name, entry in files.items() if name != OPTIMIZER)
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def verify(checkpoint: Path) -> None:
    """Raise CheckpointError naming the first file that is missing, has another size, or another content."""
    for name, entry in _manifest(checkpoint)["files"].items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {checkpoint} lacks {name}; {MEND}")
        found = _entry(path)
        for what in ("size", "sha256"):
            if found[what] != entry[what]:
                raise CheckpointError(
                    f"checkpoint {checkpoint} is damaged: {name} has {what} {found[what]} instead of {entry[what]}; "
                    f"{MEND}"
                )


def load(
    checkpoint: Path, device: str = "cpu", dtype: str = "float32", attn: str = "sdpa", *, merge: bool = True
) -> tuple[Policy, dict[str, Any] | None, dict[str, Any]]:
    """(policy, optimiser state or None, state) of a checkpoint, after `verify`. Raises CheckpointError.

    A LoRA checkpoint holds the adapter and its base's name: it is merged unless `merge` is false."""
    from mcts.engines.model import load_policy

    verify(checkpoint)
    try:
        policy = load_policy(checkpoint, device=device, dtype=dtype, attn=attn, merge=merge)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the policy of checkpoint {checkpoint} cannot be loaded: {error}") from error
    return policy, load_optimizer(checkpoint, device), read_state(checkpoint)


def load_optimizer(checkpoint: Path, device: str = "cpu") -> dict[str, Any] | None:
    """The optimiser state; None where the checkpoint was saved without one. Read without running any code."""
    path = checkpoint / OPTIMIZER
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; {MEND}") from error
    return state


def _manifest(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / STATE
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {checkpoint}: it has no {STATE}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; {MEND}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not of format {FORMAT}; use the version that wrote it")
    return manifest


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _entry(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}
