"""Tokens per second of the torch engine against a bare decode loop around the same model; prints one JSON line.

Example: OMP_NUM_THREADS=1 taskset -c 0 python scripts/bench_engine.py --rows 256 --searches 256
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedTokenizerFast

from mcts.engines import torch_probe
from mcts.engines.counters import Counters
from mcts.engines.model import Policy, cache_name, load_policy
from mcts.engines.sampling import draw
from mcts.engines.torch_engine import TorchEngine
from mcts.engines.torch_forward import Forward
from mcts.engines.value_head import ValueHead
from mcts.types import Int32, Request

CLOCK = time.process_time
"""CPU seconds: a shared core does not disturb them. Equal to wall time on a free core with one thread."""


def tiny_policy(seed: int = 0) -> Policy:
    """A Llama of 3 layers, width 96, 4 heads, 0.46M random parameters, over 430 words."""
    words = ["<pad>", "<eos>", "<unk>", "->", ":", "|", ";", "=", "+", "-", "*", "/", *map(str, range(418))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=96, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True, eos_token_id=1,
        bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return Policy(AutoModelForCausalLM.from_config(config).eval(), tokenizer, ValueHead(96, seed=seed))


@torch.inference_mode()
def bare_loop(policy: Policy, rows: int, prompt: int, tokens: int, rounds: int) -> dict[str, float]:
    """A plain batch loop on Hugging Face's forward and DynamicCache: `rows` prompts of `prompt` tokens are
    prefilled and decoded for `tokens` tokens, `rounds` times, drawing from the softmax at temperature 1.

    No steps, no stops, no trees, no values: what an engine could reach at best on this forward.
    Returns tokens drawn per second and the seconds inside the model.
    """
    size = policy.model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    inside = 0.0
    began = CLOCK()
    for _ in range(rounds):
        ids = torch.randint(2, size, (rows, prompt), generator=generator)
        cache = DynamicCache()
        for _ in range(tokens):
            entered = CLOCK()
            logits = policy.model(ids, use_cache=True, logits_to_keep=1, **{cache_name(policy.model): cache}).logits[
                :, -1
            ]
            inside += CLOCK() - entered
            cdf = torch.softmax(logits, -1).cumsum(-1)
            x = torch.rand((rows, 1), generator=generator) * cdf[:, -1:]
            ids = torch.searchsorted(cdf, x, right=True)
    seconds = CLOCK() - began
    return {"tokens_per_second": rows * tokens * rounds / seconds, "seconds": seconds, "forward": inside}


@torch.inference_mode()
def bare_rows(policy: Policy, rows: int, prompt: int, tokens: int, rounds: int) -> dict[str, float]:
    """As `bare_loop`, on the engine's own forward and draw: the same kernels without queues, steps and copies."""
    (layers, heads, size), _ = torch_probe.examine(policy, prompt + tokens)
    torch_probe.use_attention(policy)
    forward = Forward(policy, layers, heads, size, rows, 1, prompt + tokens)
    vocabulary = policy.model.config.vocab_size
    generator = np.random.default_rng(0)
    ones = np.ones(rows, dtype=np.float32)
    inside = 0.0
    began = CLOCK()
    for _ in range(rounds):
        given = generator.integers(2, vocabulary, (prompt, rows))
        current = given[0]
        for t in range(prompt + tokens - 1):
            forward.fit(t + 1)
            entered = CLOCK()
            logits = policy.unembed(forward.decode(current, np.full(rows, t)))
            inside += CLOCK() - entered
            ahead = t + 1 < prompt
            current = given[t + 1] if ahead else draw(logits, generator.random(rows), ones, ones).tokens
    seconds = CLOCK() - began
    return {"tokens_per_second": rows * tokens * rounds / seconds, "seconds": seconds, "forward": inside}


class Chains:
    """A load without search code: every search draws `width` first steps and continues each for `depth` steps."""

    def __init__(self, engine: TorchEngine, searches: int, prompt: int, width: int, depth: int, step: int) -> None:
        self.engine, self.width, self.depth, self.step = engine, width, depth, step
        rng = np.random.default_rng(0)
        size = engine.policy.model.config.vocab_size
        self.waiting = deque((i, rng.integers(12, size, prompt).astype(np.int32)) for i in range(searches))
        self.open_chains: dict[int, int] = {}
        self.level: dict[int, int] = {}
        self.requests = 0
        self.tokens = 0
        self.prompts = 0

    def submit(self, search: int, prefix: Int32, n: int, level: int) -> None:
        """Ask for n steps of at most `step` tokens."""
        self.level[self.requests] = level
        self.engine.submit(Request(self.requests, search, prefix, n, self.step, seed=self.requests))
        self.requests += 1

    def run(self, limit: int = 1024) -> float:
        """Run to the end with at most `limit` searches open; seconds."""
        began = CLOCK()
        while self.waiting or self.open_chains:
            while self.waiting and len(self.open_chains) < limit:
                search, prompt = self.waiting[0]
                if not self.engine.open(search, prompt, self.width * self.depth * self.step):
                    break
                self.waiting.popleft()
                self.prompts += len(prompt)
                self.open_chains[search] = self.width
                self.submit(search, prompt, self.width, 1)
            for reply in self.engine.poll():
                search, level = reply.request.search, self.level.pop(reply.request.id)
                for one in reply.steps:
                    self.tokens += len(one.token_ids)
                    if one.stop != "eos" and level < self.depth:
                        self.submit(search, np.concatenate((reply.request.prefix, one.token_ids)), 1, level + 1)
                    else:
                        self.open_chains[search] -= 1
                if not self.open_chains[search]:
                    del self.open_chains[search]
                    self.engine.close(search)
        return CLOCK() - began


def bench_engine(
    policy: Policy, rows: int, searches: int, prompt: int, width: int, step: int, depth: int
) -> dict[str, Any]:
    """The engine on `Chains`: tokens per second, time outside the model, forwarded tokens over the least possible."""
    engine = TorchEngine(policy, ";", rows=rows, kv_slots=1 << 18)
    engine.batch.clock = CLOCK
    Chains(engine, 8, prompt, 2, 2, step).run()
    engine.batch.counters = Counters()
    load = Chains(engine, searches, prompt, width, depth, step)
    seconds = load.run()
    counters = engine.counters
    return {
        "tokens_per_second": load.tokens / seconds,
        "seconds": seconds,
        "forward": counters.forward_seconds,
        "poll": counters.poll_seconds,
        "outside_forward": 1 - counters.forward_seconds / seconds,
        "forwarded_ratio": counters.forwarded / (load.prompts + load.tokens),
        "padding": counters.padded / (counters.padded + counters.forwarded),
        "forwards": counters.forwards,
        "exact": engine.exact,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder; default: a random Llama of 0.46M parameters")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--searches", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=8, help="prompt tokens")
    parser.add_argument("--width", type=int, default=4, help="chains per search")
    parser.add_argument("--depth", type=int, default=3, help="steps per chain")
    parser.add_argument("--step", type=int, default=9, help="longest step in tokens")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    policy = load_policy(arguments.model) if arguments.model else tiny_policy()
    drawn = arguments.depth * arguments.step
    rounds = max(1, arguments.searches * arguments.width // arguments.rows)
    bare_loop(policy, arguments.rows, arguments.prompt, 4, 1)
    bare = bare_loop(policy, arguments.rows, arguments.prompt, drawn, rounds)
    engine = bench_engine(
        policy,
        arguments.rows,
        arguments.searches,
        arguments.prompt,
        arguments.width,
        arguments.step,
        arguments.depth,
    )
    rowwise = bare_rows(policy, arguments.rows, arguments.prompt, drawn, rounds)
    best = max(bare["tokens_per_second"], rowwise["tokens_per_second"])
    result = {"bare": bare, "bare_rows": rowwise, "engine": engine, "ratio": engine["tokens_per_second"] / best}
    print(json.dumps({"bench": "engine", **result, **vars(arguments)}))


if __name__ == "__main__":
    main()
