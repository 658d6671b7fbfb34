"""Against what a user would run instead: TRL's GRPOTrainer from the same warm-up checkpoint on the same problems.

Our side is read from a finished run; TRL then trains for the same minutes on as many cores, in an environment of
its own (`.venv-trl`, made here if missing). Both clocks start after the warm-up and stand still during evaluations;
both are scored by greedy decoding on the run's held-out problems, by this project's verifier.

Example: python scripts/bench_peers.py --run runs/countdown3 --minutes 8
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mcts.tasks import load_task
from mcts.tasks.countdown import Countdown
from mcts.types import Problem
from selfplay.config import ConfigError, load_config
from selfplay.errors import UserError
from selfplay.run_folder import read_metrics
from selfplay.stats import wilson

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-trl"
TORCH = "torch>=2.10,<2.14"
PACKAGES = (TORCH, "trl>=1.16,<1.17", "transformers>=5.0,<6", "accelerate>=1.15", "datasets>=5")

SETTINGS: dict[str, Any] = {
    "batch": 512,
    "num_generations": 8,
    "steps_per_generation": 1,
    "num_iterations": 1,
    "learning_rate": 1.5e-4,
    "schedule": "constant",
    "adam_beta2": 0.999,
    "max_grad_norm": 1.0,
    "beta": 0.0,
    "epsilon_high": 0.2,
    "temperature": 1.0,
    "loss_type": "dapo",
    "scale_rewards": "none",
    "attention": "eager",
    "bf16": True,
}
"""The peer's settings, by GRPOConfig's names where it has one. `batch`: completions per optimiser step, over all
processes."""

LEVELS = (0.55, 0.60, 0.65, 0.70, 0.80)
PROBE_MINUTES = 0.4
START_SECONDS = 300
"""Most that TRL may take to start, above the time that training and evaluations take."""
STOP_SECONDS = 90


@dataclass(frozen=True, slots=True)
class Point:
    """A score of the held-out problems after so many seconds of training, evaluations left out."""

    seconds: float
    pass1: float


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How the peer uses the cores: data-parallel processes, and threads in each."""

    processes: int
    threads: int

    def __str__(self) -> str:
        return f"{self.processes} process(es) x {self.threads} thread(s)"


# --- our side ---


def our_curve(run: Path) -> list[Point]:
    """The run's curve; its clock starts after the warm-up and its evaluation. Raises UserError where there is none."""
    rows = read_metrics(run)
    if not rows or rows[0]["iteration"] != 0:
        raise UserError(f"{run} has no metrics of a warm-up and the iterations after it; make one with `make selfplay`")
    curve: list[Point] = []
    evaluating, before = 0.0, 0.0
    for row in rows:
        if row["wall_seconds"] < before:
            raise UserError(f"{run} was resumed, so its clock is in pieces; give a run that was not interrupted")
        before = row["wall_seconds"]
        evaluating += row["evaluate_seconds"] if row["iteration"] > 0 else 0.0
        if row.get("heldout_pass1") is not None:
            curve.append(Point(before - rows[0]["wall_seconds"] - evaluating, row["heldout_pass1"]))
    return curve


def is_solved(task: Countdown, problem: Problem, text: str | None) -> bool:
    """Whether finished `text` solves the problem, by the project's own checks; None: unfinished."""
    if text is None:
        return False
    steps = task.split_steps(text)
    if any(task.check_step(problem, steps[: i + 1]) is not None for i in range(len(steps))):
        return False
    answer = task.answer(problem, steps)
    return answer is not None and task.check(problem, answer).won


# --- the peer's environment ---


def ready_environment() -> Path:
    """The interpreter of the peer's environment, made on the first call (minutes). Raises UserError."""
    python = ENVIRONMENT / "bin" / "python"
    stamp = ENVIRONMENT / ".installed"
    wanted = "\n".join(PACKAGES)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"Installing TRL into {ENVIRONMENT.name} ...", flush=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch by itself first: a CPU wheel that pip knows of then satisfies everything that comes later
    for command in ([sys.executable, "-m", "venv", str(ENVIRONMENT)], [*pip, TORCH], [*pip, *PACKAGES]):
        if subprocess.run(command, check=False).returncode != 0:
            raise UserError(f"`{' '.join(command)}` failed; mend what it says above and run this again")
    stamp.write_text(wanted, encoding="utf-8")
    return python


def versions(python: Path) -> dict[str, str]:
    """Versions of the peer's packages."""
    names = ["trl", "transformers", "accelerate", "datasets", "torch"]
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    found: dict[str, str] = json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True).stdout)
    return found


# --- running the peer ---


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """One JSON object per line: id, prompt, numbers, target."""
    rows = ({"id": p.id, "prompt": p.prompt, **{key: p.meta[key] for key in ("numbers", "target")}} for p in problems)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The peer's evaluations so far; a line that is still being written is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def run_peer(
    python: Path, job: Mapping[str, Any], folder: Path, name: str, arrangement: Arrangement, *, show: bool
) -> list[dict[str, Any]]:
    """Train to the end of the clock; the evaluations, oldest first. Raises UserError where the peer failed."""
    out, log = folder / f"{name}.jsonl", folder / f"{name}.log"
    out.unlink(missing_ok=True)
    job_file = folder / f"{name}.json"
    whole = {**job, "out": str(out), "folder": str(folder / "trainer"), "threads": arrangement.threads}
    job_file.write_text(json.dumps(whole, indent=1), encoding="utf-8")
    command = [str(python)]
    if arrangement.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arrangement.processes}"]
    command += [str(ROOT / "scripts" / "trl_grpo.py"), str(job_file)]
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "OMP_NUM_THREADS": str(arrangement.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # keeps large blocks with the process between steps instead of handing them back to the system
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**30),
    }
    deadline = time.monotonic() + START_SECONDS + 3 * 60 * job["minutes"]
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        try:
            shown = 0
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(1)
                for line in read_curve(out)[shown:] if show else ():
                    print(f"  {line['seconds']:6.0f} s  {line['won'] / line['problems']:.3f}", flush=True)
                    shown += 1
        finally:
            if process.poll() is None:
                process.terminate()  # not kill: the launcher of several processes must still end them
                process.wait(STOP_SECONDS)
    if process.returncode != 0:
        raise UserError(f"TRL ended with code {process.returncode} before its time was up; see {log}")
    return read_curve(out)


def choose_arrangement(python: Path, job: Mapping[str, Any], folder: Path, cores: int) -> Arrangement:
    """The faster of one process with `cores` threads and `cores` processes with one thread, by a short trial."""
    if cores == 1:
        return Arrangement(1, 1)
    empty = folder / "empty.jsonl"
    write_problems(empty, [])
    trial = {**job, "heldout": str(empty), "minutes": PROBE_MINUTES, "evaluate_every": 60 * PROBE_MINUTES}
    speeds: dict[Arrangement, float] = {}
    for arrangement in (Arrangement(1, cores), Arrangement(cores, 1)):
        name = f"probe-{arrangement.processes}x{arrangement.threads}"
        last = run_peer(python, trial, folder, name, arrangement, show=False)[-1]
        speeds[arrangement] = last["completions"] / last["seconds"]
        print(f"  {arrangement}: {speeds[arrangement]:.0f} completions per second", flush=True)
    return max(speeds, key=lambda arrangement: speeds[arrangement])


def peer_curve(task: Countdown, lines: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Scores of the peer's answers by the project's verifier. Raises UserError where the peer's own disagrees."""
    problems = task.problems("heldout")
    curve = []
    for line in lines:
        won = sum(is_solved(task, problem, line["answers"][problem.id]) for problem in problems)
        if won != line["won"]:
            raise UserError(
                f"at {line['seconds']:.0f} s the peer's verifier counts {line['won']} wins and ours {won}: "
                "scripts/trl_grpo.py no longer judges by the task's rules; mend is_solution there"
            )
        curve.append(Point(line["seconds"], won / len(problems)))
    return curve


# --- comparing ---


def score_at(curve: Sequence[Point], seconds: float) -> float | None:
    """pass@1 at a time, linear between evaluations; None after the last one."""
    for before, after in pairwise(curve):
        if before.seconds <= seconds <= after.seconds:
            part = (seconds - before.seconds) / (after.seconds - before.seconds)
            return before.pass1 + part * (after.pass1 - before.pass1)
    return None


def seconds_to(curve: Sequence[Point], level: float) -> float | None:
    """When the curve first reaches a score, linear between evaluations; None if it never does."""
    if curve[0].pass1 >= level:
        return curve[0].seconds
    for before, after in pairwise(curve):
        if after.pass1 >= level:
            part = (level - before.pass1) / (after.pass1 - before.pass1)
            return before.seconds + part * (after.seconds - before.seconds)
    return None


def compare(ours: Sequence[Point], peer: Sequence[Point]) -> dict[str, Any]:
    """Scores at whole minutes and seconds to levels, of both."""
    minutes = range(int(max(ours[-1].seconds, peer[-1].seconds) // 60) + 1)
    levels = {f"{level:.2f}": level for level in LEVELS}
    levels["peer's final"] = peer[-1].pass1
    levels["peer's best"] = max(point.pass1 for point in peer)
    return {
        "minutes": [{"minute": m, "ours": score_at(ours, 60 * m), "peer": score_at(peer, 60 * m)} for m in minutes],
        "seconds_to": [
            {"level": name, "pass1": level, "ours": seconds_to(ours, level), "peer": seconds_to(peer, level)}
            for name, level in levels.items()
        ],
    }


def show(comparison: Mapping[str, Any], problems: int) -> None:
    low, high = wilson(problems // 2, problems)
    print(f"Held-out greedy pass@1 on {problems} problems (95%: +- {50 * (high - low):.1f} points at 50%)")
    table = Table("minutes after warm-up", "ours", "TRL GRPO")
    for row in comparison["minutes"]:
        table.add_row(str(row["minute"]), *("-" if row[s] is None else f"{row[s]:.3f}" for s in ("ours", "peer")))
    Console().print(table)
    print("Seconds to reach it")
    table = Table("pass@1", "ours", "TRL GRPO", "TRL / ours")
    for row in comparison["seconds_to"]:
        ours, peer = row["ours"], row["peer"]
        ratio = f"{peer / ours:.1f}" if peer is not None and ours else "-"
        name = row["level"] if row["level"] == f"{row['pass1']:.2f}" else f"{row['level']} {row['pass1']:.3f}"
        table.add_row(name, *("-" if s is None else f"{s:.0f}" for s in (ours, peer)), ratio)
    Console().print(table)


# --- command line ---


def parse_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """SETTINGS with `key=value` overrides, values in JSON or bare words. Raises UserError."""
    settings = dict(SETTINGS)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or key not in settings:
            raise UserError(f"--set {override}: write key=value with one of {', '.join(settings)}")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings


def bench(arguments: argparse.Namespace) -> None:
    run: Path = arguments.run
    settings = parse_settings(arguments.set)
    try:
        config = load_config(run / "config.yaml")
    except ConfigError as error:
        raise UserError(f"--run {run}: {error}") from error
    task = load_task(config.task.name, **config.task.settings)
    if not isinstance(task, Countdown):
        raise UserError(f"{run} plays {config.task.name}; give a run of countdown, which the peer's verifier judges")
    model = run / "checkpoints" / "00000" / "policy"
    if not model.is_dir():
        raise UserError(f"{model} is missing, so the peer has nothing to start from; give another --run")
    ours = our_curve(run)
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < arguments.cores:
        raise UserError(f"--cores {arguments.cores}: this process may use only {len(allowed)}; lower it")
    if settings["batch"] % (arguments.cores * settings["num_generations"]):
        raise UserError("--set batch: it must be a multiple of num_generations times --cores")
    python = ready_environment()

    folder: Path = arguments.work.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "heldout"):
        write_problems(folder / f"{split}.jsonl", task.problems(split))
    job = {
        "model": str(model.absolute()),
        "train": str(folder / "train.jsonl"),
        "heldout": str(folder / "heldout.jsonl"),
        "max_completion": task.max_steps * task.max_step_tokens,
        "max_value": task.rules.max_value,
        "minutes": arguments.minutes,
        "evaluate_every": arguments.evaluate_every,
        "seed": arguments.seed,
        "settings": settings,
    }
    os.sched_setaffinity(0, allowed[: arguments.cores])
    if arguments.processes:
        arrangement = Arrangement(arguments.processes, max(1, arguments.cores // arguments.processes))
    else:
        print("Which arrangement is faster for TRL:", flush=True)
        arrangement = choose_arrangement(python, job, folder, arguments.cores)
    print(f"TRL for {arguments.minutes:g} minutes, {arrangement}:", flush=True)
    lines = run_peer(python, job, folder, "peer", arrangement, show=True)
    peer = peer_curve(task, lines)

    comparison = compare(ours, peer)
    result = {
        "heldout_problems": len(task.problems("heldout")),
        "train_problems": len(task.problems("train")),
        "cores": arguments.cores,
        "ours": {"run": run.name, "workers": config.cluster.workers, "curve": [[p.seconds, p.pass1] for p in ours]},
        "peer": {
            "versions": versions(python),
            "processes": arrangement.processes,
            "threads": arrangement.threads,
            "settings": settings,
            "curve": [[p.seconds, p.pass1] for p in peer],
            "steps": lines[-1]["steps"],
            "completions": lines[-1]["completions"],
        },
        **comparison,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for side, curve in (("ours", ours), ("TRL", peer)):
        print(f"{side}: " + "  ".join(f"{p.seconds:.0f}s {p.pass1:.3f}" for p in curve))
    print("TRL's settings: " + ", ".join(f"{key}={value}" for key, value in settings.items()))
    show(comparison, result["heldout_problems"])
    if abs(ours[0].pass1 - peer[0].pass1) > 0.01:
        print(f"Beware: the starts differ, ours {ours[0].pass1:.3f} and the peer's {peer[0].pass1:.3f}.")
    print(f"Written to {arguments.out}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/countdown3"), help="finished run: our side, the start")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training for the peer")
    parser.add_argument("--cores", type=int, default=2, help="that the peer may use")
    parser.add_argument("--processes", type=int, default=0, help="data-parallel ones; 0: what a short trial favours")
    parser.add_argument("--evaluate-every", type=float, default=30.0, help="seconds of training; the clock stops")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of TRL's")
    parser.add_argument("--work", type=Path, default=Path("runs/peers"), help="folder for problems, answers and logs")
    parser.add_argument("--out", type=Path, default=Path("bench/peers.json"))
    try:
        bench(parser.parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
