"""TRL's GRPOTrainer on a number game, against a clock: the peer of `scripts/bench_peers.py`, which starts it.

Runs in an environment of its own (torch, trl) and imports nothing of this project: it reads a Hugging Face folder
and JSON lines, and judges texts by a small verifier of its own. With `torch.distributed.run` the processes share
the work by data parallelism. Evaluations stop the clock.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

LR_WARMUP_STEPS = 10
EVALUATION_BATCH = 256
ENDLESS = 1_000_000
"""Optimiser steps that no run reaches: the clock ends it."""


# --- the game ---


def is_solution(text: str, numbers: list[int], target: int, max_value: int) -> bool:
    """Whether finished `text` is a legal play of `numbers` that ends at `target`.

    Steps read `7 * 3 = 21 | 12 21 ;`, the last one `21 + 12 = 33`; every result is an integer in 1..max_value.
    """
    words = text.split()
    left = [str(number) for number in numbers]
    while len(left) > 1:
        last = len(left) == 2
        length = 5 if last else len(left) + 6
        step, words = words[:length], words[length:]
        if len(step) < length or step[3] != "=":
            return False
        first, sign, second, _, result = step[:5]
        for operand in (first, second):
            if operand not in left:
                return False
            left.remove(operand)
        value = combine(int(first), sign, int(second))
        if value is None or not 1 <= value <= max_value or result != str(value):
            return False
        left.append(result)
        if not last and (step[5] != "|" or step[-1] != ";" or sorted(step[6:-1]) != sorted(left)):
            return False
    return not words and left == [str(target)]


def combine(a: int, sign: str, b: int) -> int | None:
    """`a sign b` where that is an integer and `sign` one of + - * /, else None. Operands are positive."""
    if sign == "+":
        return a + b
    if sign == "-":
        return a - b
    if sign == "*":
        return a * b
    if sign == "/" and a % b == 0:
        return a // b
    return None


class Reward:
    """1 for a finished solution, 0 for all else."""

    __name__ = "solved"

    def __init__(self, eos: int, max_value: int) -> None:
        self.eos = eos
        self.max_value = max_value

    def __call__(
        self,
        completions: list[str],
        completion_ids: list[list[int]],
        numbers: list[list[int]],
        target: list[int],
        **_: Any,
    ) -> list[float]:
        return [
            float(ids[-1] == self.eos and is_solution(text, drawn, wanted, self.max_value))
            for text, ids, drawn, wanted in zip(completions, completion_ids, numbers, target, strict=True)
        ]


# --- the clock ---


class Clock:
    """Seconds of training of process 0, as every process sees them; stopped during evaluations."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.seconds = 0.0
        self._since = 0.0

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Add what passed since `start`. Processes agree, so that all of them stop at the same step."""
        passed = torch.tensor([time.perf_counter() - self._since], dtype=torch.float64)
        if dist.is_initialized():
            dist.broadcast(passed, src=0)
        self.seconds += float(passed)

    @property
    def share(self) -> float:
        return min(1.0, self.seconds / self.limit)


class Timekeeper(TrainerCallback):
    """Runs the clock, evaluates whenever `every` more seconds were trained, and ends training at the limit."""

    def __init__(self, clock: Clock, every: float, evaluate: Any) -> None:
        self.clock = clock
        self.every = every
        self.evaluate = evaluate
        self.due = every

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.evaluate(0)
        self.clock.start()

    def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        self.clock.stop()
        over = self.clock.seconds >= self.clock.limit
        if over or self.clock.seconds >= self.due:
            self.evaluate(state.global_step)
            self.due += self.every
        control.should_training_stop = over
        self.clock.start()


# --- evaluation ---


@torch.no_grad()
def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> list[str | None]:
    """The greedy completion of each prompt as text, None where it does not end by itself."""
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts: list[str | None] = []
    for start in range(0, len(prompts), EVALUATION_BATCH):
        batch = tokenizer(
            prompts[start : start + EVALUATION_BATCH], return_tensors="pt", padding=True, padding_side="left"
        )
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        rows = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :].tolist()
        for row in rows:
            if tokenizer.eos_token_id in row:
                texts.append(tokenizer.decode(row[: row.index(tokenizer.eos_token_id)]))
            else:
                texts.append(None)
    return texts


class Evaluation:
    """Greedy pass@1 on the held-out problems; process 0 appends each result to `out` as a line of JSON."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        problems: list[dict[str, Any]],
        clock: Clock,
        facts: dict[str, Any],
        out: Path,
    ) -> None:
        self.model = model
        # a copy of its own: the trainer may put the model's forward under bf16 autocast, evaluation stays in fp32
        self.judged = copy.deepcopy(model).eval()
        self.tokenizer = tokenizer
        self.problems = problems
        self.clock = clock
        self.facts = facts
        self.out = out
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.processes = dist.get_world_size() if dist.is_initialized() else 1

    def __call__(self, step: int) -> None:
        mine = self.problems[self.rank :: self.processes]
        self.judged.load_state_dict(self.model.state_dict())
        prompts = [problem["prompt"] for problem in mine]
        texts = greedy(self.judged, self.tokenizer, prompts, self.facts["max_completion"]) if mine else []
        answers = dict(zip([problem["id"] for problem in mine], texts, strict=True))
        if dist.is_initialized():
            shares: list[Any] = [None] * self.processes
            dist.all_gather_object(shares, answers)
            answers = {key: text for share in shares for key, text in share.items()}
        if self.rank == 0:
            self.report(step, answers)

    def report(self, step: int, answers: dict[str, str | None]) -> None:
        limit = self.facts["max_value"]
        won = 0
        for problem in self.problems:
            text = answers[problem["id"]]
            won += text is not None and is_solution(text, problem["numbers"], problem["target"], limit)
        line = {
            "seconds": self.clock.seconds,
            "steps": step,
            "completions": step * self.facts["completions_per_step"],
            "won": won,
            "problems": len(self.problems),
            "answers": answers,
        }
        with open(self.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = f"{won / len(self.problems):.3f}" if self.problems else "-"
        print(f"{self.clock.seconds:7.1f} s  {step:6d} steps  held-out greedy pass@1 {shown}", flush=True)


# --- training ---


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def schedule(name: str, clock: Clock) -> Any:
    """Learning-rate factor by scheduler step: a short rise, then as long as the clock runs `constant` or `linear`."""

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / LR_WARMUP_STEPS)
        return rise * (1.0 - 0.9 * clock.share if name == "linear" else 1.0)

    return factor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path, help="JSON file that bench_peers.py wrote")
    job = json.loads(parser.parse_args().job.read_text(encoding="utf-8"))
    settings = job["settings"]
    torch.set_num_threads(job["threads"])
    torch.set_flush_denormal(True)
    processes = int(os.environ.get("WORLD_SIZE", "1"))

    config = GRPOConfig(
        output_dir=job["folder"],
        use_cpu=True,
        ddp_backend="gloo" if processes > 1 else None,
        ddp_find_unused_parameters=False,
        bf16=settings["bf16"],
        gradient_checkpointing=False,
        seed=job["seed"],
        max_steps=ENDLESS,
        per_device_train_batch_size=settings["batch"] // processes,
        steps_per_generation=settings["steps_per_generation"],
        num_iterations=settings["num_iterations"],
        num_generations=settings["num_generations"],
        max_completion_length=job["max_completion"],
        temperature=settings["temperature"],
        learning_rate=settings["learning_rate"],
        adam_beta2=settings["adam_beta2"],
        max_grad_norm=settings["max_grad_norm"],
        beta=settings["beta"],
        epsilon_high=settings["epsilon_high"],
        loss_type=settings["loss_type"],
        scale_rewards=settings["scale_rewards"],
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, attn_implementation=settings["attention"]
    )
    model.generation_config.max_length = None
    clock = Clock(60 * job["minutes"])
    facts = {
        "max_completion": job["max_completion"],
        "max_value": job["max_value"],
        "completions_per_step": settings["batch"] / settings["num_iterations"],
    }
    evaluation = Evaluation(model, tokenizer, read_lines(Path(job["heldout"])), clock, facts, Path(job["out"]))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings["learning_rate"],
        betas=(0.9, settings["adam_beta2"]),
        weight_decay=0.0,
        fused=True,
    )
    trainer = GRPOTrainer(
        model=model,
        args=config,
        processing_class=tokenizer,
        reward_funcs=Reward(tokenizer.eos_token_id, job["max_value"]),
        train_dataset=Dataset.from_list(read_lines(Path(job["train"]))),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(settings["schedule"], clock))),
        callbacks=[Timekeeper(clock, job["evaluate_every"], evaluation)],
    )
    trainer.train()
    if dist.is_initialized():
        dist.barrier()
        # all is written; the interpreter's own end would wait for gloo's threads for ever
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
