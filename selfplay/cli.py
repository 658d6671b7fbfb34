"""The commands. Each parses its arguments, calls one function of the library and prints; heavy imports wait."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="selfplay",
    help="A language model improves its reasoning by tree search and self-play.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
USAGE = 2
MOST_SEED = (1 << 64) - 1


def main() -> None:
    """Run a command; turn the errors that a user can mend into one sentence and an exit code."""
    try:
        app()
    except Exception as error:
        from selfplay.errors import SettingError, known_errors, out_of_memory

        said = str(error) if isinstance(error, known_errors()) else out_of_memory(error)
        if not said:
            raise
        print(f"error: {said}", file=sys.stderr)
        sys.exit(USAGE if isinstance(error, SettingError) else 1)


@app.command(epilog="Example: selfplay launch configs/countdown3.yaml --run-dir runs/first seed=1")
def launch(
    config: Annotated[Path, typer.Argument(help="YAML config")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value ...")] = None,
    run_dir: Annotated[
        str | None, typer.Option(help="run folder, or s3://BUCKET/PREFIX; default runs/<config>-<time>")
    ] = None,
    or_resume: Annotated[
        bool, typer.Option("--or-resume", help="continue the run that --run-dir holds, if any, with its own config")
    ] = False,
    address: Annotated[str | None, typer.Option(help="join this Ray cluster: HOST:PORT or auto")] = None,
    submit: Annotated[str | None, typer.Option(help="send it as a Ray job to this dashboard: http://HOST:8265")] = None,
    python: Annotated[str | None, typer.Option(help="--submit: Python on the cluster; default this one's path")] = None,
    runtime_env: Annotated[Path | None, typer.Option(help="--submit: YAML of a Ray runtime environment")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="load nothing; say what the run needs, if it fits")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="with --dry-run: print JSON")] = False,
) -> None:
    """Start a self-play run and see it to its end."""
    from selfplay.config import load_config
    from selfplay.errors import UserError

    resolved = load_config(config, _joining(address, overrides))
    if dry_run:
        _show_plan(resolved, as_json)
        return
    if as_json:
        raise UserError("launch prints JSON with --dry-run only; add it, or leave --json out")
    if submit is None and (python is not None or runtime_env is not None):
        raise UserError(
            "--python and --runtime-env say how a Ray job starts; add --submit DASHBOARD, or leave them out"
        )
    if submit is not None and address is not None:
        raise UserError("a job joins the cluster that it is sent to: leave out --address, or --submit")
    if submit is not None:
        from selfplay.cluster.submit import run_as_job

        raise typer.Exit(run_as_job(resolved, submit, run_dir, python=python, runtime_env=runtime_env))
    from selfplay.executor import check_parts, join_cluster
    from selfplay.run_folder import RunFolder
    from selfplay.store import holds_run

    folder = run_dir or f"runs/{config.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    if or_resume and holds_run(folder):
        print(f"{folder} holds a run: it goes on with its own config", file=sys.stderr)
        _drive(RunFolder.open(folder, _joining(address, None), check_parts))
        return
    check_parts(resolved)
    join_cluster(resolved)
    _drive(RunFolder.create(folder, resolved))


def _joining(address: str | None, overrides: list[str] | None) -> list[str]:
    """The overrides, with the cluster to join."""
    return [*(overrides or []), *([] if address is None else [f"cluster.address={json.dumps(address)}"])]


def _show_plan(config: Any, as_json: bool) -> None:
    """Print the plan of a run, then refuse what cannot fit."""
    from rich.console import Console

    from selfplay.plan import PlanError, make_plan
    from selfplay.rules import check_rules

    check_rules(config)
    plan = make_plan(config)
    if as_json:
        print(json.dumps(plan.data()))
    else:
        console = Console()
        console.print(plan.table())
        for line in plan.lines():
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    if plan.refusal is not None:
        raise PlanError(plan.refusal)


@app.command(epilog="Example: selfplay resume runs/first iterations=20")
def resume(
    run: Annotated[str, typer.Argument(help="run folder, or s3://BUCKET/PREFIX")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, from the next iteration on")] = None,
    address: Annotated[str | None, typer.Option(help="join this Ray cluster: HOST:PORT or auto")] = None,
) -> None:
    """Continue a run as if nothing had happened."""
    from selfplay.executor import check_parts
    from selfplay.run_folder import RunFolder

    _drive(RunFolder.open(run, _joining(address, overrides), check_parts))


def _drive(run: Any) -> None:
    """Run the loop on an open run folder, showing what it does."""
    from selfplay.drive import drive

    code = drive(run)
    if code:
        raise typer.Exit(code)


@app.command(epilog="Example: selfplay inspect runs/first --where \"verdict == 'correct' and sampled > 200\"")
def inspect(
    path: Annotated[str, typer.Argument(help="a run, a folder of shards, or one shard; s3://... too")],
    trace: Annotated[str | None, typer.Option(help="draw the tree of this trace (a prefix of its id will do)")] = None,
    where: Annotated[str | None, typer.Option(help="filter, e.g. \"verdict == 'correct' and sampled > 200\"")] = None,
    sort: Annotated[str | None, typer.Option(help="column to sort traces by; -column for descending")] = None,
    limit: Annotated[int, typer.Option(help="most traces listed", min=1)] = 20,
    sample: Annotated[int, typer.Option(help="show this many random wins in full", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="of --sample")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """See what the model did and why the search preferred it."""
    from rich.console import Console

    from selfplay.inspect import inspect_path
    from selfplay.store import local_copy

    folder = local_copy(path, "traces", "reanalysis")
    view = inspect_path(folder, trace=trace, where=where, sort=sort, limit=limit, sample=sample, seed=seed)
    if as_json:
        print(json.dumps(view.data))
    else:
        Console().print(view.renderable)


@app.command(epilog="Example: selfplay evaluate runs/first --strategy greedy --strategy mcts --budget 100 --budget 400")
def evaluate(
    model: Annotated[str, typer.Argument(help="a run, a checkpoint, or a model folder")],
    task: Annotated[str | None, typer.Option(help="task; default the run's")] = None,
    problems: Annotated[Path | None, typer.Option(help="JSONL of problems instead of the task's held-out set")] = None,
    strategy: Annotated[list[str] | None, typer.Option(help="strategy name or name:key=value,...; repeatable")] = None,
    budget: Annotated[list[int] | None, typer.Option(help="sampled tokens per problem; repeatable", min=1)] = None,
    limit: Annotated[int | None, typer.Option(help="at most this many problems", min=1)] = None,
    split: Annotated[str, typer.Option(help="heldout or dev")] = "heldout",
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED)] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the figures here")] = None,
) -> None:
    """Accuracy against the tokens really spent, per strategy and budget, with 95% intervals."""
    from rich.console import Console

    from selfplay.evaluate import evaluate_model

    if json_file is not None:
        _check_writable(json_file)
    report = evaluate_model(
        model,
        task=task,
        problems=problems,
        strategies=strategy or None,
        budgets=budget or None,
        limit=limit,
        split=split,
        seed=seed,
        progress=_plain_progress(),
    )
    Console().print(report.table())
    if json_file is not None:
        json_file.write_text(json.dumps(report.data(), indent=1), encoding="utf-8")


def _check_writable(file: Path) -> None:
    """Refuse, before the work, a file that could not be written after it."""
    from selfplay.errors import UserError

    if file.is_dir() or not file.parent.is_dir():
        state = "it is a folder" if file.is_dir() else f"there is no folder {file.parent}"
        raise UserError(f"cannot write {file}: {state}; choose another --json")


def _plain_progress() -> Callable[[str], None]:
    return lambda text: print(text, file=sys.stderr, flush=True)


@app.command(epilog="Example: selfplay solve runs/first '3 7 12 -> 33 :' --strategy mcts --show-tree")
def solve(
    model: Annotated[str, typer.Argument(help="a run, a checkpoint, or a model folder")],
    problem: Annotated[str, typer.Argument(help="the problem as the task writes it")],
    strategy: Annotated[str, typer.Option(help="strategy name or name:key=value,...")] = "mcts",
    budget: Annotated[int, typer.Option(help="sampled tokens", min=1)] = 400,
    task: Annotated[str | None, typer.Option(help="task; default the run's")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED)] = 0,
    show_tree: Annotated[bool, typer.Option("--show-tree", help="draw the search tree at the end")] = False,
) -> None:
    """Solve one problem, showing the reasoning step by step as it comes."""
    from rich.console import Console

    from selfplay.solve import solve_problem

    solved = solve_problem(
        model, problem, strategy=strategy, budget=budget, task=task, seed=seed, show_tree=show_tree, console=Console()
    )
    if not solved:
        raise typer.Exit(1)


@app.command(epilog="Example: selfplay reanalyse runs/first --last 3")
def reanalyse(
    run: Annotated[str, typer.Argument(help="run folder, or s3://BUCKET/PREFIX")],
    checkpoint: Annotated[int | None, typer.Option(help="whose weights; default the newest", min=0)] = None,
    last: Annotated[int | None, typer.Option(help="iterations, counted from the newest; default all", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Score stored trees again with newer weights, into side files beside the shards."""
    from dataclasses import asdict

    from selfplay.reanalyse import reanalyse_path

    shown = _plain_progress()
    report = asdict(
        reanalyse_path(
            run, checkpoint=checkpoint, last=last, progress=lambda done, total: shown(f"{done} of {total} shards")
        )
    )
    if as_json:
        print(json.dumps(report))
    else:
        for key, figure in report.items():
            print(f"{key}: {figure}")


@app.command(epilog="Example: selfplay grade answers.jsonl --verifier math")
def grade(
    file: Annotated[Path, typer.Argument(help="JSONL of rows with the texts gold and prediction")],
    verifier: Annotated[str, typer.Option(help="math, number, choice, exact, program, or a dotted path to your own")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Verdicts for a file of gold and prediction rows, each with its reason, and the totals."""
    from selfplay.grade import grade_file, totals

    graded = []
    for one in grade_file(file, verifier):
        graded.append(one)
        if not as_json:
            note = "" if one.agrees is not False else "  (not as expected)"
            print(f"{one.row}\t{one.verdict.status.value}\t{one.verdict.extracted!r}\t{one.verdict.why}{note}")
    summary = totals(graded)
    if as_json:
        print(json.dumps({"rows": [one.data() for one in graded], "totals": summary}))
    else:
        print(", ".join(f"{name} {count}" for name, count in summary.items()))


@app.command(epilog='Example: selfplay export runs/first --format sft --where "iteration >= 3" --out data/sft.parquet')
def export(
    path: Annotated[
        str,
        typer.Argument(help="a run, a folder of shards, a shard (s3://... too); prm-model: a run or checkpoint"),
    ],
    form: Annotated[str, typer.Option("--format", help="sft, preference, stepwise, prm, or prm-model")],
    out: Annotated[Path, typer.Option(help="FILE.parquet or FILE.jsonl; prm-model: a new folder")],
    where: Annotated[str | None, typer.Option(help="filter, as inspect takes it")] = None,
    gap: Annotated[float, typer.Option(help="preference: least difference in value between siblings")] = 0.5,
    value: Annotated[str, typer.Option(help="preference, prm: verified (judged chains below) or search (its Q)")] = (
        "verified"
    ),
    joiner: Annotated[str | None, typer.Option(help="what the task puts between steps; default: found out")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="folder of the tokenizer that sent chat prompts")] = None,
    approximate: Annotated[bool, typer.Option(help="prm-model: a linear head, fitted, for stock classes")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Traces for other trainers, in TRL's columns, or the value head as a Hugging Face reward model."""
    from selfplay.errors import UserError
    from selfplay.store import local_copy

    if form == "prm-model":
        from selfplay.export_prm import export_prm

        for name, given in (("--where", where), ("--joiner", joiner), ("--tokenizer", tokenizer)):
            if given is not None:
                raise UserError(f"{name} is for traces and prm-model exports weights; leave it out")
        found = export_prm(local_copy(path, "checkpoints"), out, approximate=approximate)
    else:
        from selfplay.export import export_path

        if approximate:
            raise UserError(f"--approximate is for prm-model, and {form} exports traces; leave it out")
        source = local_copy(path, "traces", "tokenizer")
        found = export_path(
            source, form, out, where=where, gap=gap, value=value, joiner=joiner, tokenizer=tokenizer
        ).data()
    if as_json:
        print(json.dumps(found))
    else:
        for key, figure in found.items():
            print(f"{key}: {figure}")


@app.command(epilog="Example: selfplay status runs/first")
def status(
    run: Annotated[str, typer.Argument(help="run folder, or s3://BUCKET/PREFIX")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Where a run stands, from its folder alone; also while its driver is dead."""
    from selfplay.status import read_status
    from selfplay.store import local_copy

    found = read_status(local_copy(run, "heartbeat.json", "metrics.jsonl", "traces"))
    print(json.dumps(found.data()) if as_json else "\n".join(found.lines()))


@app.command(epilog="Example: selfplay doctor runs/first")
def doctor(
    run: Annotated[str, typer.Argument(help="run folder, or s3://BUCKET/PREFIX")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Check every promise on a run folder; a line per finding. Exit code 0 where there is none, else 1."""
    from selfplay.doctor import examine
    from selfplay.report import Line
    from selfplay.store import whole_copy

    findings = []
    with Line() as line:
        for finding in examine(whole_copy(run), line.show):
            findings.append(finding)
            if not as_json:
                line.clear()
                print(finding.line, flush=True)
    if as_json:
        print(json.dumps({"run": run, "findings": [finding.data() for finding in findings]}))
    elif not findings:
        print(f"{run} keeps every promise that a folder can show")
    if findings:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
