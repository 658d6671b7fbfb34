"""Chaos: a self-play job on a real cluster of this machine, with faults at random moments.

    python scripts/chaos.py --faults 200 --every 10                 as many runs as 200 faults take
    python scripts/chaos.py --minutes 40 --every 20 --iterations 400   a soak

Builds a cluster (tests/cluster_net.py), launches tests/chaos.yaml on it, kills, stops and cuts off workers, the
learner, the driver and whole nodes, resumes and replaces what a user or a cluster manager would, and waits for the
run to get over it. After each run every unit must be there exactly once, `selfplay doctor` must find nothing, and
content, weights and metrics must equal those of the same run played inline without any fault.

A fault has recovered once the run is further than it was and as many workers live as before. "Lost" is the time from
the fault to the next progress (a committed unit, a step of learning, an iteration), minus the usual gap between two of
them in that run; it includes what the tool itself waits before it resumes, heals or replaces. Where faults overlap,
the time counts for each. "Whole again" is the time from the fault until all workers were back.

Ends only what it started. Exit code 0 if every fault has recovered and every check passed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from chaos_check import curve, doctor, finished_iterations, rises, same_as, undisturbed, units_once  # noqa: E402
from chaos_faults import KINDS  # noqa: E402
from chaos_job import Options  # noqa: E402
from chaos_storm import Outcome, Storm, weights_of  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from selfplay.config import load_config  # noqa: E402
from tests.cluster_net import namespaces_permitted  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key.path=value of the config")
    parser.add_argument("--config", type=Path, default=ROOT / "tests" / "chaos.yaml")
    parser.add_argument("--out", type=Path, help="folder for runs and logs; default runs/chaos-<time>")
    parser.add_argument("--json", type=Path, help="write all figures here; default OUT/chaos.json")
    parser.add_argument("--faults", type=int, default=20, help="in all runs together")
    parser.add_argument("--runs", type=int, help="most runs; default: as many as the faults take")
    parser.add_argument("--every", type=float, default=15.0, help="seconds between faults, on average")
    parser.add_argument("--minutes", type=float, help="of one run, which then is asked to end; faults have no limit")
    parser.add_argument("--hours", type=float, help="the same in hours")
    parser.add_argument("--iterations", type=int, help="of each run")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="of faults: NAME or NAME=WEIGHT each")
    parser.add_argument("--seed", type=int, default=0, help="of the faults; each further run has the next one")
    parser.add_argument("--nodes", type=int, default=3, help="of the cluster, its head included")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds without progress that count as hung")
    parser.add_argument("--slow-to-notice", action="store_true", help="Ray's own health check: a minute until death")
    parser.add_argument("--no-compare", action="store_true", help="do not play the undisturbed run")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if arguments.hours is not None:
        arguments.minutes = 60 * arguments.hours
    overrides = list(arguments.overrides)
    if arguments.iterations is not None:
        overrides.append(f"iterations={arguments.iterations}")
    out = (arguments.out or Path("runs") / f"chaos-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    if out.exists() and any(out.iterdir()):
        sys.exit(f"{out} is not empty; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    kinds = weights_of(arguments.kinds)
    if not namespaces_permitted():
        kinds.pop("cut", None)
        print("namespaces are not permitted: nodes share this host, and no network is cut")
    config = load_config(arguments.config, overrides)
    faults_left, runs = (10**9 if arguments.minutes else arguments.faults), []
    compare = not arguments.no_compare and config.play.max_staleness == 0
    with open(out / "chaos.log", "w", encoding="utf-8") as log:
        while faults_left > 0 and (not runs or arguments.minutes is None) and len(runs) != arguments.runs:
            seed = arguments.seed + len(runs)
            options = Options(
                config, arguments.config, tuple(overrides), arguments.nodes, arguments.every, faults_left,
                arguments.minutes, kinds, arguments.patience, not arguments.slow_to_notice,
            )  # fmt: skip
            folder = out / f"seed-{seed:04d}"
            folder.mkdir()
            outcome = Storm(options, folder, seed, log).go()
            checks = check(folder / "run", out / "undisturbed", options, compare)
            runs.append((outcome, checks))
            faults_left -= len(outcome.faults)
            report = report_of(runs, arguments, compare)
            (arguments.json or out / "chaos.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
            show(runs, log)
            if outcome.hung or not outcome.finished:
                break
    failures = [text for outcome, checks in runs for text in failures_of(outcome, checks)]
    for text in failures:
        print(f"FAILED: {text}")
    print(f"logs and figures: {out}")
    return 1 if failures else 0


def check(run: Path, reference: Path, options: Options, compare: bool) -> dict[str, Any]:
    """Findings by check; each list is empty where all is well."""
    done = finished_iterations(run)
    if done < 1:
        return {"iterations": done, "progress": ["no iteration was finished"]}
    found: dict[str, Any] = {
        "iterations": done,
        "units exactly once": units_once(run, options.config, done),
        "doctor": doctor(run),
    }
    if compare:
        undisturbed(reference, options.source, options.overrides, done)
        found["same as undisturbed"] = same_as(run, reference, done)
    found["curve"] = curve(run)
    return found


def failures_of(outcome: Outcome, checks: dict[str, Any]) -> list[str]:
    found = [f"{fault.kind} ({fault.detail}): {fault.stuck}" for fault in outcome.faults if fault.stuck]
    found += outcome.defects + ([f"hung: {outcome.hung}"] if outcome.hung else [])
    found += [] if outcome.finished else ["the run did not come to its end"]
    found += [f"{name}: {text}" for name, texts in checks.items() if isinstance(texts, list) and name != "curve"
              for text in texts]  # fmt: skip
    return [f"seed {outcome.seed}: {text}" for text in found]


def _figures(values: list[float]) -> dict[str, float | None]:
    return {"median": statistics.median(values) if values else None, "max": max(values, default=None)}


def by_kind(runs: list[tuple[Outcome, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per kind of fault, and one for all."""
    pairs = [(outcome, fault) for outcome, _ in runs for fault in outcome.faults]
    rows = []
    for kind in [*KINDS, "all"]:
        mine = [(outcome, fault) for outcome, fault in pairs if kind in (fault.kind, "all")]
        if not mine:
            continue
        lost = [seconds for outcome, fault in mine if (seconds := outcome.lost(fault)) is not None]
        whole = [fault.whole - fault.at for _, fault in mine if fault.whole is not None]
        rows.append(
            {
                "kind": kind,
                "faults": len(mine),
                "recovered": sum(fault.recovered for _, fault in mine),
                "seconds_lost": _figures(lost),
                "seconds_until_whole": _figures(whole),
            }
        )
    return rows


def report_of(
    runs: list[tuple[Outcome, dict[str, Any]]], arguments: argparse.Namespace, compare: bool
) -> dict[str, Any]:
    return {
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
        "compared_with_undisturbed": compare,
        "table": by_kind(runs),
        "runs": [
            {**asdict(outcome), "checks": checks, "failures": failures_of(outcome, checks)} for outcome, checks in runs
        ],
    }


def show(runs: list[tuple[Outcome, dict[str, Any]]], log: Any) -> None:
    """The tables so far, on the terminal and in the log."""

    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    table = Table(title="Faults")
    for heading in ("kind", "faults", "recovered", "s lost: median", "max", "s until whole: median", "max"):
        table.add_column(heading, justify="right" if heading != "kind" else "left")
    for row in by_kind(runs):
        lost, whole = row["seconds_lost"], row["seconds_until_whole"]
        table.add_row(
            row["kind"], str(row["faults"]), str(row["recovered"]),
            *map(text, (lost["median"], lost["max"], whole["median"], whole["max"])),
        )  # fmt: skip
    memory = Table(title="Resident memory of the last run, MB")
    for heading in ("", "minutes", "first quarter", "last quarter", "most", "slope per hour"):
        memory.add_column(heading, justify="right" if heading else "left")
    outcome, checks = runs[-1]
    for group, figures in sorted(outcome.memory.items()):
        names = ("minutes", "first_quarter_mb", "last_quarter_mb", "most_mb", "slope_mb_per_hour")
        memory.add_row(group, *(f"{figures[name]:.1f}" for name in names))
    points = checks.get("curve", [])
    line = " ".join(f"{100 * p['heldout_pass1']:.0f}" for p in points)
    for console in (Console(width=120), Console(file=log, width=120)):
        console.print(table)
        console.print(memory)
        console.print(f"seed {outcome.seed}: {outcome.seconds:.0f} s, {checks['iterations']} iterations", end="; ")
        console.print(f"held-out % {line}: {'rises' if rises(points) else 'does not rise'}")
        for failure in failures_of(outcome, checks):
            console.print(f"FAILED: {failure}", style="red", markup=False)
    log.flush()


if __name__ == "__main__":
    sys.exit(main())
