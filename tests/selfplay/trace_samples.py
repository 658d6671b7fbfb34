"""Searches, real and random, for the tests of the trace store."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mcts.budget import Usage
from mcts.tree import Tree
from mcts.types import Ended, Kind, Problem, SearchResult, Status, Step, Stop, Verdict
from selfplay.seal import FILE, metadata_digest
from selfplay.seal import METADATA as METADATA_DIGEST
from selfplay.shards import commit, shard_path, write_pending
from selfplay.traces import TraceContext, to_row

METADATA = {"run_id": "run-1", "config_hash": "c0ffee"}
TEXTS = ["7 * 3 = 21 | 12 21 ;", "", "é½ 漢字 🙂", "line\nbreak\x1b[2J", 'say "no"', "lone \ud800 surrogate"]


def context(**changes: Any) -> TraceContext:
    facts: dict[str, Any] = {"config_hash": "c0ffee", "task": "countdown", "split": "train", "iteration": 1}
    return TraceContext(**{**facts, **changes})


def step(text: str, value: float = float("nan"), stop: Stop = Stop.DELIMITER) -> Step:
    """A step with one token and log-probability -0.5 per word."""
    n = len(text.split())
    return Step(text, np.arange(n, dtype=np.int32), np.full(n, -0.5, dtype=np.float32), stop, value)


def won_search(problem: str = "q0", *, sampled: int = 40, seconds: float = 1.5) -> SearchResult:
    """Two steps under the prompt, one leading to a win and one to a loss."""
    tree = Tree(np.arange(6, dtype=np.int32), "3 7 12 -> 33 :")
    good = tree.add(0, step("7 * 3 = 21 | 12 21 ;", 0.75), prior=0.5, draws=3)
    bad = tree.add(0, step("12 - 3 = 9 | 7 9 ;", 0.25), prior=0.25)
    win = tree.add(good, step("21 + 12 = 33", 0.875, Stop.EOS), prior=0.5)
    tree.close(win, Verdict(Status.CORRECT, 1.0, "33"), "33")
    loss = tree.add(bad, step("7 + 9 = 16", 0.125, Stop.EOS), prior=0.5)
    tree.close(loss, Verdict(Status.WRONG, 0.0, "16"), "16")
    for node, value in ((win, 1.0), (loss, 0.0), (good, 0.75), (bad, 0.25)):
        tree.backup(node, value)
    tree.target[good], tree.target[bad] = 0.75, 0.25
    return SearchResult(
        problem=Problem(problem, "3 7 12 -> 33 :", "33", {"numbers": [3, 7, 12], "target": 33}),
        strategy="mcts",
        settings={"temperature": 1.0, "budget": 200},
        tree=tree,
        candidates=(win, loss),
        chosen=win,
        answer="33",
        verdict=Verdict(Status.CORRECT, 1.0, "33"),
        usage=Usage(sampled=sampled, discarded=3, prompt=6, cached=11, scored=0, calls=4),
        seed=2**64 - 1,
        policy_version=1,
        ended=Ended.SOLVED,
        seconds=seconds,
    )


def lost_search(problem: str = "p0", *, sampled: int = 200, status: Status = Status.WRONG) -> SearchResult:
    """One chain with a single finished answer that did not win."""
    tree = Tree(np.arange(6, dtype=np.int32), "3 7 12 -> 33 :")
    first = tree.add(0, step("12 + 7 = 19 | 3 19 ;", 0.5), prior=0.25)
    verdict = Verdict(status, 0.0, "22")
    last = tree.add(first, step("19 + 3 = 22", 0.25, Stop.EOS), prior=1.0)
    tree.close(last, verdict, "22")
    tree.backup(last, 0.0)
    return SearchResult(
        problem=Problem(problem, "3 7 12 -> 33 :", None, {"target": 33}),
        strategy="best_of_n",
        settings={"temperature": 0.5},
        tree=tree,
        candidates=(last,),
        chosen=last,
        answer="22",
        verdict=verdict,
        usage=Usage(sampled=sampled),
        seed=7,
        policy_version=1,
        ended=Ended.BUDGET,
    )


def random_search(seed: int, size: int) -> SearchResult:
    """A search over a random tree of up to `size` nodes that uses every column, nulls and odd text included."""
    rng = random.Random(seed)

    def maybe(value: float) -> float:
        return value if rng.random() < 0.5 else float("nan")

    def verdict() -> Verdict | None:
        return rng.choice([None, *(Verdict(s, rng.random(), "a") for s in Status)])

    tree = Tree(np.array([rng.randrange(2**31) for _ in range(rng.randrange(1, 5))]), rng.choice(TEXTS))
    for _ in range(size):
        parent = rng.randrange(len(tree))
        if tree.terminal[parent]:
            continue
        n = rng.randrange(4)
        ids = np.array([rng.randrange(2**31) for _ in range(n)], dtype=np.int32)
        logprobs = np.array([maybe(-rng.random()) for _ in range(n)], dtype=np.float32)
        behavior = None if rng.random() < 0.5 else -np.ones(n, dtype=np.float32)
        drawn = Step(rng.choice(TEXTS), ids, logprobs, rng.choice(list(Stop)), maybe(rng.random()), behavior)
        node = tree.add(
            parent, drawn, prior=maybe(rng.random()), kind=rng.choice(list(Kind)), draws=rng.randrange(1, 9)
        )
        tree.target[node] = maybe(rng.random())
        tree.context[node] = rng.choice([None, (), (0, node)])
        tree.backup(node, rng.random())
        if rng.random() < 0.3:
            tree.close(node, verdict(), rng.choice([None, *TEXTS]))
    ends = [n for n in range(len(tree)) if tree.terminal[n]]
    chosen = rng.choice([None, *ends])
    prompt = rng.choice([*TEXTS, ({"role": "user", "content": "ü"},)])
    return SearchResult(
        problem=Problem(f"p{seed}", prompt, rng.choice([None, *TEXTS]), {"ключ": [1, None, "x"]}),
        strategy="mcts",
        settings={"temperature": rng.random()},
        tree=tree,
        candidates=tuple(n for n in ends if tree.answer[n] is not None),
        chosen=chosen,
        answer=rng.choice([None, *TEXTS]),
        verdict=verdict(),
        usage=Usage(*(rng.randrange(2**40) for _ in range(6))),
        seed=rng.randrange(2**64),
        policy_version=rng.randrange(9),
        ended=rng.choice(list(Ended)),
        oracle=rng.random() < 0.5,
        error=rng.choice([None, "engine gave up"]),
        seconds=rng.random(),
    )


def rows_of(n: int, **changes: Any) -> list[dict[str, Any]]:
    """`n` rows of won searches on different problems."""
    return [to_row(won_search(f"q{i}"), context(**changes)) for i in range(n)]


def shard(folder: Path, results: Sequence[SearchResult], part: int = 0, **changes: Any) -> Path:
    """One committed shard with these searches, steps joined by a space."""
    pending, final = folder / "pending" / f"{part}.arrow", shard_path(folder, 1, part)
    write_pending(pending, [to_row(r, context(**{"joiner": " ", **changes})) for r in results], METADATA)
    commit(pending, final)
    return final


def small_run(run: Path) -> Path:
    """A run with two iterations of three searches: one win in the first, two in the second."""
    played = {
        1: [won_search("q0"), lost_search("p0"), lost_search("p1", status=Status.TIMEOUT)],
        2: [won_search("q0", sampled=20), won_search("q1", sampled=60), lost_search("p0")],
    }
    for iteration, results in played.items():
        pending = run / "pending" / f"{iteration}.arrow"
        write_pending(pending, [to_row(r, context(iteration=iteration)) for r in results], METADATA)
        commit(pending, shard_path(run, iteration, 0))
    return run


def unsealed(metadata: Mapping[bytes, bytes], **changes: str) -> dict[str, str]:
    """A shard's file metadata, changed, without a checksum over all bytes, for a file that is forged in a test."""
    entries = {name.decode(): text.decode() for name, text in metadata.items()} | changes
    entries = {name: text for name, text in entries.items() if name not in (FILE, METADATA_DIGEST)}
    return {**entries, METADATA_DIGEST: metadata_digest(entries)}
