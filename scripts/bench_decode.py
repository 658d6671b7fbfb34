"""Tokens per second of the engine against a bare decode loop on the same model's forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from bench_rows import Row
from bench_subject import Subject
from transformers import DynamicCache, StaticCache

from mcts.engines.model import Policy, cache_name
from mcts.engines.torch_engine import TorchEngine
from mcts.types import Int32, Request, Stop

WIDTH = 4
"""Chains per prompt: what tree search draws at a node."""


class Chains:
    """Chains drawn step by step through the engine's own interface, without any search code."""

    def __init__(self, engine: TorchEngine, subject: Subject, prompts: Sequence[Int32]) -> None:
        self.engine = engine
        self.prompts = prompts
        self.steps = subject.task.max_steps
        self.longest = subject.task.max_step_tokens
        self.limit = subject.config.play.open_searches
        self.tokens = 0
        self._requests = 0
        self._depth: dict[int, int] = {}
        self._open: dict[int, int] = {}

    def _ask(self, search: int, prefix: Int32, n: int, depth: int) -> None:
        self._depth[self._requests] = depth
        self.engine.submit(Request(self._requests, search, prefix, n, self.longest, seed=self._requests))
        self._requests += 1

    def run(self) -> None:
        """Draw WIDTH chains after every prompt, until EOS, a step that is too long, or the most steps."""
        following = 0
        while following < len(self.prompts) or self._open:
            while following < len(self.prompts) and len(self._open) < self.limit:
                prompt = self.prompts[following]
                if not self.engine.open(following, prompt, WIDTH * self.steps * self.longest):
                    break
                self._open[following] = WIDTH
                self._ask(following, prompt, WIDTH, 1)
                following += 1
            for reply in self.engine.poll():
                search, depth = reply.request.search, self._depth.pop(reply.request.id)
                for step in reply.steps:
                    self.tokens += len(step.token_ids)
                    if step.stop is Stop.DELIMITER and depth < self.steps:
                        self._ask(search, np.concatenate((reply.request.prefix, step.token_ids)), 1, depth + 1)
                    else:
                        self._open[search] -= 1
                if not self._open[search]:
                    del self._open[search]
                    self.engine.close(search)


@torch.inference_mode()
def bare(policy: Policy, prompts: torch.Tensor, tokens: int, *, static: bool) -> None:
    """Prefill [B, P] prompts once, decode WIDTH chains of `tokens` tokens after each, drawn by inverse CDF.

    No steps, no stops, no trees, no values, and all chains equally long: no row ever idles.
    """
    generator = torch.Generator().manual_seed(0)
    rows = len(prompts) * WIDTH
    model = policy.model
    if static:
        cache: Any = StaticCache(config=model.config, max_cache_len=prompts.shape[1] + tokens)
        ids, repeat = prompts.repeat_interleave(WIDTH, 0), 1
    else:
        cache, ids, repeat = DynamicCache(), prompts, WIDTH
    for token in range(tokens):
        logits = model(ids, use_cache=True, logits_to_keep=1, **{cache_name(model): cache}).logits[:, -1]
        if token == 0 and repeat > 1:
            cache.batch_repeat_interleave(repeat)
            logits = logits.repeat_interleave(repeat, 0)
        cdf = torch.softmax(logits, -1).cumsum(-1)
        ids = torch.searchsorted(cdf, torch.rand((rows, 1), generator=generator) * cdf[:, -1:], right=True)
        ids.clamp_(max=cdf.shape[-1] - 1)


def measure(subject: Subject, clock: Callable[[], float], *, searches: int, rounds: int) -> Row:
    """The engine against the fastest of the bare loops (two attentions, two caches), taking turns."""
    engine = subject.engine(clock)
    prompts = [engine.encode(problem.prompt) for problem in subject.problems(searches)]
    load = Chains(engine, subject, prompts[:64])
    load.run()
    length = max(2, round(load.tokens / (64 * WIDTH)))
    batch = subject.config.engine.rows // WIDTH
    same = [p for p in prompts if len(p) == len(prompts[0])]
    batches = [torch.from_numpy(np.stack(same[i : i + batch])).long() for i in range(0, len(same), batch)]
    batches = [b for b in batches if len(b) == batch] or batches[:1]

    def seconds(work: Callable[[], None]) -> float:
        began = clock()
        work()
        return clock() - began

    loops: dict[str, Callable[[torch.Tensor, int], None]] = {}  # of prompts [B, P] and tokens to draw
    for attention in ("sdpa", "eager"):
        policy = subject.policy(attention)
        for static in (False, True):
            loops[f"{attention}, {'static' if static else 'dynamic'} cache"] = partial(bare, policy, static=static)
    tried: dict[str, float] = {}
    for name, one in loops.items():
        one(batches[0], 2)
        tried[name] = min(seconds(partial(one, batches[0], length)) for _ in range(3))
    best = min(tried, key=lambda name: tried[name])

    ours, theirs = [], []
    drawn = 0
    for _ in range(rounds):
        load = Chains(engine, subject, prompts)
        spent = seconds(load.run)
        drawn = load.tokens
        ours.append(drawn / spent)
        length = max(2, round(drawn / (len(prompts) * WIDTH)))
        spent = sum(seconds(partial(loops[best], ids, length)) for ids in batches)
        theirs.append(sum(map(len, batches)) * WIDTH * length / spent)
    return Row(
        "engine throughput",
        median(ours),
        median(theirs),
        "tokens/s",
        "bare decode loop",
        at_least=0.8,
        details={
            "engine": ours,
            "bare": theirs,
            "bare_loop": best,
            "bare_loops_seconds": tried,
            "mean_chain_tokens": drawn / (len(prompts) * WIDTH),
            "prompt_tokens": len(prompts[0]),
            "rows": subject.config.engine.rows,
            "bit_exact": engine.exact,
        },
    )
