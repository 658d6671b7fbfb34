"""Verdicts per second of the maths verifier, idle and under load, and whether load changes a verdict.

    python scripts/bench_verify.py [--pairs 10000] [--formulas 0.15] [--threads 4] [--out bench/verify.json]

Pairs are made from a fixed seed: numbers, formulas, intervals, lists, wrong ones among them, and a few that run into
the CPU limit. Each pass has a verifier and workers of its own and remembers nothing. The loaded pass runs beside two
processes per core that do nothing but compute.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mcts.verify.math import MathVerifier


def make_pairs(count: int, formulas: float) -> list[tuple[str, str]]:
    """`count` different pairs of gold and prediction, from seed 0; the share `formulas` needs a worker."""
    draw = random.Random(0)
    pairs = []
    for number in range(count):
        a, b, c = (draw.randrange(2, 99) for _ in range(3))
        off = draw.choice((0, 0, 1))
        if draw.random() >= formulas:
            pairs.append(
                draw.choice(((f"{number}", f"{number + off}"), (f"{a}/{b}", rf"\frac{{{a * c + off}}}{{{b * c}}}")))
            )
            continue
        pairs.append(
            draw.choice(
                (
                    (rf"{a}\sqrt{{{b}}}+{number}", rf"{number + off}+\sqrt{{{a * a * b}}}"),
                    (f"{a}x^2+{b}x+{number}", f"x({a}x+{b + off})+{number}"),
                    (f"({a},{b},{number})", f"({a}, {b}, {number + off})"),
                    (f"[{-a},{number}]", rf"{-a} \le x \le {number + off}"),
                    (f"{a},{b},{number}", f"{number}, {b + off}, {a}"),
                    (rf"\frac{{{a}\pi}}{{{b}}}", rf"\pi \cdot {a + off} / {b}"),
                    (f"{number}", f"{number - c}+{c + off}"),
                    (rf"\sin({number}y)", rf"\cos(\pi/2 - {number + off}y)"),
                )
            )
        )
    for number in range(0, count, 2500):
        pairs[number] = ("1", f"9^{{9^{{9}}}} + {number}")
    return pairs


def measure(pairs: list[tuple[str, str]], threads: int) -> tuple[dict[str, Any], list[str]]:
    verifier = MathVerifier(workers=2, cpu_seconds=1.0, cache_size=0)
    verifier.verify("x", "x")  # the workers are up

    def one(pair: tuple[str, str]) -> tuple[str, float]:
        start = time.perf_counter()
        status = verifier.verify(*pair).status.value
        return status, time.perf_counter() - start

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(one, pairs))
    seconds = time.perf_counter() - start
    verifier.close()
    statuses = [status for status, _ in found]
    times = sorted(spent for _, spent in found)
    figures = {
        "verdicts_per_second": round(len(pairs) / seconds, 1),
        "p50_ms": round(times[len(times) // 2] * 1000, 1),
        "p99_ms": round(times[len(times) * 99 // 100] * 1000, 1),
        "peak_mb_of_a_worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
        "peak_mb_of_the_caller": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "load_average": round(os.getloadavg()[0], 2),
        "statuses": dict(Counter(statuses)),
    }
    return figures, statuses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--formulas", type=float, default=0.15, help="share of pairs that are no plain numbers")
    arguments = parser.parse_args()
    pairs = make_pairs(arguments.pairs, arguments.formulas)
    idle, first = measure(pairs, arguments.threads)
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        loaded, second = measure(pairs, arguments.threads)
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
    changed = sum(a != b for a, b in zip(first, second, strict=True))
    report = {"pairs": len(pairs), "idle": idle, "loaded": loaded, "changed_verdicts": changed}
    for key in idle:
        print(f"{key:24} idle {idle[key]!s:32} loaded {loaded[key]}")
    print(f"changed verdicts: {changed} of {len(pairs)}")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
