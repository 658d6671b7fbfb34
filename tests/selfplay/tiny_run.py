"""A run small enough for tests, and a child process that kills itself at a chosen moment of it.

`python -m tests.selfplay.tiny_run MOMENT RUN [CONFIG]` launches (or, where RUN exists, resumes) the tiny run, or that
of a config of one's own; MOMENT is one of MOMENTS or SAVED, or "never".
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from selfplay.config import Config, parse_config

CONFIG = """
seed: 3
iterations: 2
task: {name: countdown, numbers: 3, heldout_problems: 24, dev_problems: 16}
model: {fresh: {width: 32, layers: 1, heads: 2}}
warmup: {steps: 12, examples_per_step: 16, lr_warmup_steps: 2}
engine: {rows: 32, kv_slots: 8192, max_context: 64}
play:
  problems: 24
  unit: 8
  open_searches: 16
  search: {strategy: {name: mcts, commit: never}, budget: 96}
learn: {steps: 4, items_per_step: 16}
evaluate: {samples: 2}
cluster: {executor: inline, learner_threads: 1}
"""

MOMENTS = (
    "building the model",
    "warm-up",
    "play",
    "before commit",
    "during commit",
    "learn",
    "during checkpoint",
    "after checkpoint",
    "evaluate",
)
SAVED = ("saved warm-up", "saved learn")
"""Moments within a phase, just after its state was saved; for a config with a small cluster.save_seconds."""


def tiny_config(*overrides: str) -> Config:
    return parse_config(CONFIG, overrides)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arrange(moment: str) -> None:
    """Patch the product so that this process is killed at `moment` of iteration 1 (warm-up: iteration 0)."""
    from selfplay import loop, report, trainer
    from selfplay.s3 import Bucket
    from selfplay.store_disk import DiskStore

    show = report.Watch.__call__
    link, commit, publish, upload = os.link, DiskStore.commit, DiskStore.publish, Bucket.upload
    finish = loop.Loop._evaluate
    commits = 0

    def watch(self: report.Watch, event: Any) -> None:
        show(self, event)
        if (
            event.phase == moment
            and event.iteration == (0 if moment == "warm-up" else 1)
            and (event.total or moment == "evaluate")
            and 2 * event.done >= event.total
        ):
            _die()

    def counted(self: DiskStore, pending: str, name: str) -> bool:
        nonlocal commits
        commits += 1
        if commits == 2 and moment == "before commit":
            _die()
        if commits == 2 and moment == "during commit":

            def linked(*args: Any, **kwargs: Any) -> None:
                link(*args, **kwargs)
                _die()

            os.link = linked  # type: ignore[assignment]
        return commit(self, pending, name)

    def uploaded(self: Bucket, key: str, path: Path, **how: Any) -> str:
        if moment == "during checkpoint" and key == "checkpoints/00001/state.json":
            _die()
        etag = upload(self, key, path, **how)
        if moment == "during commit" and key == "traces/iteration=00001/part-00001.arrow":
            _die()
        return etag

    def torn(self: DiskStore, folder: Path, name: str) -> Path:
        if name == "checkpoints/00001" and moment == "during checkpoint":
            rename = os.rename

            def last(source: Path, target: Path) -> None:
                # everything is on disk but the name that makes it exist
                _die() if target == self.root / name else rename(source, target)

            os.rename = last  # type: ignore[assignment]
        return publish(self, folder, name)

    def evaluate(self: Any, iteration: int) -> None:
        if iteration == 1 and moment == "after checkpoint":
            _die()
        finish(self, iteration)

    report.Watch.__call__ = watch  # type: ignore[method-assign]
    DiskStore.commit = counted  # type: ignore[method-assign]
    DiskStore.publish = torn  # type: ignore[method-assign]
    Bucket.upload = uploaded  # type: ignore[method-assign]
    loop.Loop._evaluate = evaluate  # type: ignore[method-assign]
    if moment == "building the model":
        trainer.build_fresh_model = lambda folder, *_a, **_k: (folder.mkdir(), _die())  # type: ignore[assignment]
    if moment in SAVED:
        write = trainer.Trainer.save_partial
        saved = 0

        def counted_write(self: Any, partial: Any, phase: Any) -> None:
            nonlocal saved
            write(self, partial, phase)
            saved += partial.iteration == SAVED.index(moment)
            if saved == 3:
                _die()

        trainer.Trainer.save_partial = counted_write  # type: ignore[method-assign]


def main(moment: str, run: str, given: str | None = None) -> None:
    from selfplay import cli

    if moment != "never":
        arrange(moment)
    from selfplay.store import holds_run

    if holds_run(run):
        sys.argv = ["selfplay", "resume", run]
    else:
        config = Path(run).parent / "tiny.yaml" if given is None else Path(given)
        if given is None:
            config.write_text(CONFIG, encoding="utf-8")
        sys.argv = ["selfplay", "launch", str(config), "--run-dir", run]
    cli.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
