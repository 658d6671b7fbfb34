"""See a run to its end on a terminal: its executor, its loop, what is shown meanwhile, and how it ends."""

from __future__ import annotations

import shlex
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from selfplay.config import Config
from selfplay.errors import Interrupted
from selfplay.executor import make_executor
from selfplay.heartbeat import State
from selfplay.loop import Event, Loop
from selfplay.report import TensorBoard, Watch, draw_curve, final_table
from selfplay.run_folder import RunFolder
from selfplay.signals import EXIT_CODES, Grace, Stopped, graceful


def drive(run: RunFolder) -> int:
    """The exit code: 0, or that of the signal which ended it (130, 143), after saving. Closes `run`."""
    state: State = "failed"
    rows: list[dict[str, Any]] = []
    grace = Grace(run.config.cluster.grace_seconds)
    try:
        with ExitStack() as stack:
            board = TensorBoard(run.path / "tensorboard", purge_from=len(run.metrics()))
            stack.callback(board.close)
            executor = make_executor(run.config, run.place)
            stack.callback(executor.close)
            watch = stack.enter_context(Watch())

            def both(event: Event) -> None:
                watch(event)
                board(event)
                if event.phase == "iteration":
                    run.store.push("tensorboard")

            loop = Loop(run, executor, both)
            stack.enter_context(graceful(loop, grace))
            rows = loop.go()
        run.store.put("curve.png", draw_curve(rows))
        state = "ended"
    except (KeyboardInterrupt, Stopped, Interrupted, SystemError) as stop:
        if isinstance(stop, SystemError) and grace.asked is None:
            raise  # otherwise it is what a late Stopped becomes inside Ray's compiled code
        state = "interrupted"
        command = f"selfplay resume {shown(run.place.url)}"
        print(f"interrupted; everything committed so far is kept, go on with: {command}", file=sys.stderr)
        number = stop.number if isinstance(stop, Stopped) else grace.asked
        return EXIT_CODES[number or signal.SIGINT]
    finally:
        run.close(state)
        grace.over()
    _tell(run, rows)
    return 0


def _tell(run: RunFolder, rows: list[dict[str, Any]]) -> None:
    """The table, the curve, and what to try next."""
    console = Console()
    name = shown(run.place.url)
    console.print(final_table(rows))
    console.print(f"curve: {name}/curve.png\nnext:", highlight=False, soft_wrap=True)
    solve = f"solve {name} {shlex.quote(_example(run.config))}"
    for command in (f"inspect {name} --sample 3", solve, f"evaluate {name}"):
        console.print(f"  selfplay {command}", highlight=False, soft_wrap=True, markup=False)


def shown(url: str) -> str:
    """The run as a user would type it."""
    path = Path(url)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else url


def _example(config: Config) -> str:
    """A held-out problem of the run's task, as `solve` takes it."""
    from mcts.tasks import load_task

    task: Any = load_task(config.task.name, **config.task.settings)
    problem = task.problems("heldout")[0]
    if hasattr(task, "typed"):  # a task whose prompt is more than what a user types
        return str(task.typed(problem))
    prompt = problem.prompt
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
