"""Search and learning of a Qwen2 with random weights on a GPU: speed against its memory and arithmetic, memory against
the plan.

    python scripts/bench_gpu.py --data GSM8K_FOLDER [--model 1.5b] [--rows 128] [--out bench/gpu.json]

The run is that of configs/gsm8k_qwen2.5-1.5b.yaml: MCTS over GSM8K's training questions with a policy in bfloat16, then
learning on the traces with float32 weights under bfloat16 arithmetic. Weights are random, so almost nothing is won and
the objective is AlphaZero's, which learns from the searches themselves. A byte-pair tokenizer as large as Qwen's is
made from the questions; one token in forty ends a line, so that steps have forty tokens as GSM8K's lines do.

Bounds: a forward must read the weights once, and the keys and values of each row's sequence; the copy bandwidth is
measured here. Learning must do 6 operations per parameter and token; the rate of a large bfloat16 product is measured
here. Each process's peak is compared with its part of the plan.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from gpu_model import SHAPES, random_model
from gpu_tables import decode_table, learn_table, machine_table, play_table, trees_table
from rich.console import Console
from rich.table import Table

from mcts.engines import torch_probe
from mcts.engines.model import load_policy
from mcts.engines.torch_forward import Forward
from mcts.engines.value_head import ValueHead
from mcts.tree import Tree
from mcts.types import Problem
from selfplay.config import Config, load_config
from selfplay.cutting import split_paths
from selfplay.forward import batches, fit, forward
from selfplay.items import ValueRule, from_tree, policy_groups, value_labels, winners
from selfplay.objectives.loss import Coefficients, Totals, composite_loss
from selfplay.packing import Item, pack
from selfplay.plan import make_plan
from selfplay.run_folder import RunFolder
from selfplay.shards import iter_traces, shard_path
from selfplay.trainer import Trainer
from selfplay.worker import Worker, units_of

ROOT = Path(__file__).resolve().parent.parent
TREES = 16
ROWS, LENGTH = (16, 128), 500
"""Of the decode forwards that are timed."""
LOSS = Coefficients(policy=1.0, nll=1.0, value=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--model", choices=SHAPES, default="1.5b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=128, help="sequences decoded at once")
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the config")
    arguments = parser.parse_args()
    console = Console(width=120)
    found: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        for part, facts, table in measure(arguments, Path(folder)):
            found[part] = facts
            console.print(table)
            if arguments.out is not None:  # after each part: a machine may be lent for less time than all take
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(found, indent=1))


def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, Any], Table]]:
    """All measurements of one model, part by part: its name, figures and table."""
    device = arguments.device
    say("building the model")
    model = random_model(folder / "model", SHAPES[arguments.model], arguments.data / "train.jsonl")
    config = config_of(arguments, model)
    plan = make_plan(config)
    bandwidth, rate = ceilings(device)
    name = torch.cuda.get_device_name() if device != "cpu" else "CPU"
    about = {"device": name, "torch": torch.__version__, "model": plan.lines()[0], "bandwidth": bandwidth, "rate": rate}
    yield "machine", about, machine_table(about)
    say("one decode forward")
    decoded = decode(config, model, bandwidth)
    yield "decode", decoded, decode_table(decoded)
    run = RunFolder.create(folder / "run", config)
    try:
        say("writing a checkpoint")
        trainer = Trainer(config, run.place)
        trainer.warm_up(lambda _done, _total, _facts: None)
        checkpoint = trainer.save(0, {})
        del trainer
        say("playing")
        played = play(config, run, checkpoint, bandwidth)
        yield "play", played, play_table(played, plan.loads[1])
        shards = [shard_path(Path(), 1, part) for part in range(played["units"])]
        say("training trees and paths")
        traces = itertools.islice((trace for shard in shards for trace in iter_traces(run.path / shard)), TREES)
        items = [item for trace in traces if (item := item_of(trace.tree)) is not None]
        packed = trees(config, model, items)
        yield "trees", packed, trees_table(packed)
        say("learning")
        learned = learn(config, run, checkpoint, shards, plan.shape.parameters, rate)
        yield "learn", learned, learn_table(learned, plan.loads[0])
    finally:
        run.close()


def say(what: str) -> None:
    print(f"{time.strftime('%X')} {what}", file=sys.stderr, flush=True)


def config_of(arguments: argparse.Namespace, model: Path) -> Config:
    """The shipped config with this model, one iteration, and an objective that needs no wins."""
    facts = yaml.safe_load((model / "config.json").read_text())
    return load_config(
        ROOT / "configs" / "gsm8k_qwen2.5-1.5b.yaml",
        [
            f"model.path={model}",
            f"model.device={arguments.device}",
            f"task.path={arguments.data}",
            f"engine.rows={arguments.rows}",
            f"engine.compile={str(arguments.device != 'cpu').lower()}",
            f"play.open_searches={arguments.rows}",
            f"play.problems={arguments.problems}",
            "play.search.temperature=1.0",
            f"learn.steps={arguments.steps}",
            "learn.objective={name: alphazero, policy: 1.0, value: 0.5}",
            "iterations=1",
            f"plan.architecture={json.dumps(facts)}",
            *arguments.overrides,
        ],
    )


def ceilings(device: str) -> tuple[float, float]:
    """(bytes read and written per second by a large copy, operations per second of a large bfloat16 product)."""
    size = 1 << (30 if device != "cpu" else 24)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * size / seconds_of(lambda: target.copy_(source), device)
    side = 8192 if device != "cpu" else 256
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    return copied, 2 * side**3 / seconds_of(lambda: left @ right, device)


def seconds_of(work: Callable[[], Any], device: str, rounds: int = 10, warm: int = 3) -> float:
    """Median seconds of `work` after some warm-ups."""
    spent = []
    for turn in range(rounds + warm):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        if turn >= warm:
            spent.append(time.perf_counter() - began)
    return median(spent)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


class Peak:
    """Bytes of the device that a process's tensors took at most, and that its allocator held."""

    def __init__(self, device: str) -> None:
        self.device = device
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> dict[str, int]:
        if self.device == "cpu":
            return {"allocated": 0, "reserved": 0}
        return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


@torch.inference_mode()
def decode(config: Config, model: Path, bandwidth: float) -> dict[str, Any]:
    """Milliseconds of one forward of some rows at one length, launched kernel by kernel, captured, and captured with
    small kernels compiled."""
    device, context = config.model.device, config.engine.max_context
    policy = load_policy(model, device=device, dtype=config.engine.dtype or config.model.dtype)
    shape, _ = torch_probe.examine(policy, context)
    torch_probe.use_attention(policy)
    found: dict[str, Any] = {}
    weights = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    for name, fuse in (("captured", False), ("captured, fused", True)):
        forward = Forward(policy, *shape, ROWS[-1], context, context, fuse=fuse)
        for rows in ROWS:
            length = min(LENGTH, context - 1)
            kv = rows * (length + 1) * 2 * shape[0] * shape[1] * shape[2] * forward.cache.kv.element_size()
            case = found.setdefault(f"{rows} rows of {length} tokens", {"bound": 1000 * (weights + kv) / bandwidth})
            tokens, positions = np.arange(rows) + 3, np.full(rows, length)
            forward.fit(length + 1)
            if forward.graphs is not None:
                case[name] = 1000 * seconds_of(lambda: forward.decode(tokens, positions), device)  # noqa: B023
                forward.graphs = None
            case["launched"] = 1000 * seconds_of(lambda: forward.decode(tokens, positions), device)  # noqa: B023
            forward = Forward(policy, *shape, ROWS[-1], context, context, fuse=fuse)
    return found


def play(config: Config, run: RunFolder, checkpoint: Path, bandwidth: float) -> dict[str, Any]:
    """Play the iteration's units twice, first to capture the forwards; speed of the second."""
    device = config.model.device
    peak = Peak(device)
    worker = Worker(config, run.place)
    began = time.perf_counter()
    worker.load(checkpoint, 0)
    ready = time.perf_counter() - began
    problems = worker.task.problems("train")[: config.play.problems]
    first = time.perf_counter()
    play_units(worker, run, problems[: config.engine.rows], iteration=0)
    warm = time.perf_counter() - first
    engine = worker.engine
    counters = engine.batch.counters
    before = asdict(counters)
    began = time.perf_counter()
    units, results = play_units(worker, run, problems, iteration=1)
    seconds = time.perf_counter() - began
    gained = {name: value - before[name] for name, value in asdict(counters).items()}
    shape = make_plan(config)
    read = sum(kv_read(trace.tree) for trace in results) * shape.kv_token
    bound = (gained["forwards"] * weights_bytes(config, shape.shape.parameters) + read) / bandwidth
    full = gained["forwarded"] / config.engine.rows
    found = {
        "units": units,
        "load_seconds": ready,
        "first_pass_seconds": warm,
        "seconds": seconds,
        "drawn": gained["drawn"],
        "forwarded": gained["forwarded"],
        "forwards": gained["forwards"],
        "rows_per_forward": gained["forwarded"] / gained["forwards"],
        "tokens_per_second": gained["drawn"] / seconds,
        "forward_seconds": gained["forward_seconds"],
        "poll_seconds": gained["poll_seconds"],
        "bound_seconds": bound,
        "of_bound": bound / seconds,
        "bound_seconds_full_rows": (full * weights_bytes(config, shape.shape.parameters) + read) / bandwidth,
        "searches": len(results),
        "steps": sum(len(trace.tree) - 1 for trace in results),
        "peak": peak.read(),
    }
    worker.rest()
    return found


def weights_bytes(config: Config, parameters: int) -> int:
    return parameters * (4 if (config.engine.dtype or config.model.dtype) == "float32" else 2)


def play_units(worker: Worker, run: RunFolder, problems: Sequence[Problem], iteration: int) -> tuple[int, list[Any]]:
    """Play and commit the units of an iteration; their number and traces."""
    units = list(units_of(problems, size=worker.config.play.unit, iteration=iteration, policy_version=0))
    for unit in units:
        worker.enqueue(unit)
    for _ in units:
        done = worker.finish()
        run.store.commit(done.pending, shard_path(Path(), iteration, done.unit.part).as_posix())
    shards = [run.path / shard_path(Path(), iteration, unit.part) for unit in units]
    return len(units), [trace for shard in shards for trace in iter_traces(shard)]


def kv_read(tree: Tree) -> int:
    """Keys and values that attention reads for the tokens of a tree, each drawn once, in tokens."""
    ends = [len(tree.prompt_ids)]
    read = ends[0]  # prompts are forwarded in chunks, which read what is before them once
    for node in range(1, len(tree)):
        step = tree.steps[node]
        assert step is not None
        start, size = ends[tree.parent[node]], len(step.token_ids)
        ends.append(start + size)
        read += size * start + size * (size + 1) // 2
    return read


def learn(
    config: Config, run: RunFolder, checkpoint: Path, shards: Sequence[Path], parameters: int, rate: float
) -> dict[str, Any]:
    """One learning phase on the traces, after the same phase of two steps."""
    device = config.model.device
    peak = Peak(device)
    trainer = Trainer(config, run.place)
    began = time.perf_counter()
    trainer.restore(checkpoint)
    ready = time.perf_counter() - began
    held = 0 if device == "cpu" else torch.cuda.memory_allocated()
    marks: list[tuple[int, float]] = []

    def progress(done: int, _total: int, _facts: dict[str, Any]) -> None:
        synchronize(device)
        marks.append((done, time.perf_counter()))

    began = time.perf_counter()
    metrics = trainer.learn(1, shards, progress)
    synchronize(device)
    seconds = time.perf_counter() - began
    tokens = metrics["tokens"]
    steady = steady_seconds(marks, config.learn.steps, seconds)
    found = {
        "restore_seconds": ready,
        "held_before": held,
        "seconds": seconds,
        "steps": metrics["steps"],
        "tokens": tokens,
        "tokens_per_second": tokens / steady,
        "bound_seconds": 6 * parameters * tokens / rate,
        "of_bound": 6 * parameters * tokens / rate / steady,
        "policy_loss": metrics["policy_loss"],
        "value_loss": metrics["value_loss"],
        "logprob_gap": metrics["logprob_gap"],
        "tree_mask": not metrics["trained_per_path"],
        "peak": peak.read(),
    }
    del trainer
    Peak(device)
    return found


def steady_seconds(marks: Sequence[tuple[int, float]], steps: int, seconds: float) -> float:
    """Seconds of all steps, reckoned from those between the first report and the last where there are two."""
    if len(marks) < 2 or marks[-1][0] == marks[0][0]:
        return seconds
    (first, began), (last, ended) = marks[0], marks[-1]
    return (ended - began) / (last - first) * steps


def item_of(tree: Tree) -> Item | None:
    labels = value_labels(tree, ValueRule.MEAN)
    return from_tree(tree, wins=winners(tree), groups=policy_groups(tree), values=labels)


def trees(config: Config, model: Path, whole: Sequence[Item]) -> dict[str, Any]:
    """Useful tokens per second of whole trees and of their paths in training, at equal gradients."""
    device, learn = config.model.device, config.learn
    policy = load_policy(model, device=device, dtype=config.model.dtype, attn=config.model.attention)
    policy.head = ValueHead(policy.model.config.hidden_size, config.model.value_width).to(policy.device)
    packed = fit(whole, config.engine.max_context, row_length=int(policy.model.config.hidden_size))
    paths = [split_paths(item) for item in whole]
    useful = sum(map(len, whole))

    def train(items: Sequence[Item], *, tree_mask: bool) -> None:
        policy.model.zero_grad()
        totals = Totals.of(items)
        for batch in batches(items, learn.batch_tokens):
            rows = pack([items[i] for i in batch], share_rows=tree_mask).to(policy.device)
            with torch.autocast(policy.device.type, dtype=torch.bfloat16, enabled=learn.precision != "float32"):
                outputs = forward(policy, rows, tree_mask=tree_mask)
            loss, _ = composite_loss(outputs, rows, totals, LOSS)
            torch.autograd.backward(loss)

    def gradient(items: Sequence[Item], *, tree_mask: bool) -> torch.Tensor:
        train(items, tree_mask=tree_mask)
        return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])

    exact = gradient(packed, tree_mask=True)
    gaps = {}
    for name, tree_mask in (("paths, packed", True), ("paths, a row each", False)):
        other = gradient(paths, tree_mask=tree_mask)
        gaps[name] = float((other - exact).norm() / exact.norm())
        del other
    del exact
    ways: dict[str, Callable[[], None]] = {
        "trees": lambda: train(packed, tree_mask=True),
        "paths, packed": lambda: train(paths, tree_mask=True),
        "paths, a row each": lambda: train(paths, tree_mask=False),
    }
    rates = {name: useful / seconds_of(way, device, rounds=2, warm=1) for name, way in ways.items()}
    return {
        "trees": len(whole),
        "useful_tokens": useful,
        "path_tokens": sum(map(len, paths)),
        "rates": rates,
        "speedup": rates["trees"] / max(rate for name, rate in rates.items() if name != "trees"),
        "gradient_difference": gaps,
    }


if __name__ == "__main__":
    main()
