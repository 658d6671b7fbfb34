"""TorchEngine: hundreds of searches share the batch of one Hugging Face causal LM, without a barrier.

A step starts at a cached prefix: its first token is drawn from the prefix's hidden state, so that n samples forward
nothing of their parent. It then takes a row, which decodes until the delimiter, EOS or the length limit, and hands
the row to the next step in the queue. Each drawn token is forwarded once: the last one for its value and for the
hidden state that its children start from. EOS is not forwarded at all; such a step has no value (NaN), since its
reward is known by other means.

Bits (CPU, float32, fixed threads): the tokens, log-probabilities and values of a request depend on the weights, the
search's prompt, the prefix and the request alone. Prompt tokens are forwarded in chunks of fixed shape as long as
more than a whole chunk is left, all other tokens one by one in the decode batch; that includes a prefix that has to be
recomputed. Row counts per forward come from a fixed set that was seen to give equal bits (`exact`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch

from mcts.engines.base import EngineFull
from mcts.engines.counters import Counters
from mcts.engines.kv import PrefixCache, SlotPool
from mcts.engines.model import Policy, copy_weights, load_policy
from mcts.engines.text import Codec
from mcts.engines.torch_batch import Batch
from mcts.engines.torch_rows import Active, Search
from mcts.types import Int32, Message, Reply, Request

_PATIENCE = 64
"""Forwards after which `poll` returns even if nothing has finished."""


class TorchEngine:
    """An Engine (mcts.engines.base) for any Hugging Face causal LM with full attention. It owns the policy's model.

    `delimiter`: text that ends a step, as the tokenizer encodes it; one or several tokens, and also any single
        token whose text ends with it.
    `rows`: sequences decoded at once, a multiple of 16.   `kv_slots`: tokens kept for open searches altogether.
    `context`: longest sequence in tokens; None: what the model allows.   `threads`: torch's; None: as they are.
    `fuse`: on a GPU, compile the small kernels of a decode into few; takes seconds at start.
    """

    name = "torch"
    excludes = True

    def __init__(
        self,
        policy: Policy,
        delimiter: str,
        rows: int = 256,
        kv_slots: int = 65536,
        context: int | None = None,
        threads: int | None = None,
        version: int = 0,
        *,
        fuse: bool = False,
    ) -> None:
        if rows < 16 or rows % 16:
            raise ValueError(f"rows must be a positive multiple of 16, not {rows}")
        if threads is not None:
            torch.set_num_threads(threads)
        self.version = version
        self.policy = policy
        allowed = getattr(policy.model.config, "max_position_embeddings", None) or context
        if allowed is None:
            raise ValueError("the model's config states no longest context: give the engine one")
        if context is not None and context > allowed:
            raise ValueError(f"the model reads at most {allowed} tokens: lower context from {context}")
        self.context = context or int(allowed)
        self.codec = Codec(policy, delimiter)
        self._pool = SlotPool(kv_slots)
        self._searches: dict[int, Search] = {}
        self._requests: dict[int, Active] = {}
        self._failed: list[Reply] = []
        self.batch = Batch(policy, self.codec, self._pool, rows, self.context, fuse=fuse)
        promised = policy.device.type == "cpu" and policy.model.dtype == torch.float32
        self.exact = promised and self.batch.steady
        """Whether a request's bits are promised to be independent of its batch."""
        if promised and not self.exact:
            warnings.warn(
                "on this machine a row's bits depend on its place in the batch: traces will not be bit-equal",
                stacklevel=2,
            )

    @property
    def counters(self) -> Counters:
        """What the engine did since it was built."""
        return self.batch.counters

    # ---- text

    def encode(self, prompt: str | Sequence[Message]) -> Int32:
        """Token ids of a prompt (text, or chat messages through the chat template), int32 [P]."""
        return self.codec.encode(prompt)

    def decode(self, token_ids: Int32) -> str:
        """The text of token ids, special tokens left out."""
        return self.codec.decode(token_ids)

    # ---- searches

    def open(self, search: int, prompt_ids: Int32, max_new_tokens: int) -> bool:
        """Reserve slots for the prompt and `max_new_tokens`; False: no room before another search closes."""
        prompt = np.ascontiguousarray(prompt_ids, dtype=np.int32)
        need = len(prompt) + max_new_tokens
        if search in self._searches:
            raise ValueError(f"search {search} is open already: give every search its own number")
        if len(prompt) < 1 or max_new_tokens < 1:
            raise ValueError("a search needs a prompt of at least one token and a budget of at least one token")
        if len(prompt) >= self.context:
            raise EngineFull(
                f"a prompt of {len(prompt)} tokens leaves no room in a context of {self.context}: raise max_context"
            )
        if need > self._pool.size:
            raise EngineFull(
                f"the search may need {need} KV slots and the engine has {self._pool.size}: raise kv_slots or "
                "lower the search's budget"
            )
        if not self._pool.reserve(need):
            return False
        self._searches[search] = Search(PrefixCache(prompt, need))
        return True

    def close(self, search: int) -> None:
        """Forget a search; its open requests are cancelled."""
        found = self._search(search)
        for request in list(found.requests):
            self.cancel(request)
        self.batch.drop_feeds(found)
        self._pool.give(found.cache.drain())
        self._pool.release(found.cache.limit)
        del self._searches[search]

    def load(self, path: str, version: int) -> None:
        """Swap in the weights of a checkpoint or model folder of the same shape and tokenizer."""
        if self._searches:
            raise RuntimeError(f"{len(self._searches)} searches are open: close them before loading new weights")
        new = load_policy(path, "cpu", str(self.policy.model.dtype).removeprefix("torch."))
        if new.tokenizer.get_vocab() != self.policy.tokenizer.get_vocab():
            raise ValueError(f"{path} has another vocabulary than the policy in use: start a new engine for it")
        if (new.head is None) != (self.policy.head is None):
            raise ValueError(f"{path} and the policy in use differ in having a value head: start a new engine")
        copy_weights(new.model, self.policy.model, "policy")
        if new.head is not None and self.policy.head is not None:
            copy_weights(new.head, self.policy.head, "value head")
        self.version = version

    def _search(self, search: int) -> Search:
        if search not in self._searches:
            raise ValueError(f"search {search} is not open: call open first")
        return self._searches[search]

    # ---- requests

    def submit(self, request: Request) -> None:
        """Queue a request. ValueError where it breaks the search's reservation or its prompt."""
        search = self._search(request.search)
        if request.id in self._requests:
            raise ValueError(f"request {request.id} is under way already: give every request its own number")
        if request.n < 1 or request.max_tokens < 1:
            raise ValueError("a request needs n >= 1 and max_tokens >= 1")
        if not (request.temperature >= 0.0 and 0.0 < request.top_p <= 1.0):
            raise ValueError("a request needs temperature >= 0 and 0 < top_p <= 1")
        if request.exclude and (request.temperature != 1.0 or request.top_p != 1.0):
            raise ValueError("a request excludes steps at temperature 1 and top_p 1 only")
        prefix, cache = request.prefix, search.cache
        if prefix.dtype != np.int32:
            raise ValueError(f"request {request.id}: the prefix must be int32, not {prefix.dtype}")
        prompt, key = len(cache.prompt), prefix.tobytes()
        if not key.startswith(cache.prompt_key):
            raise ValueError(f"request {request.id}: the prefix does not start with the prompt of its search")
        room = self.context - len(prefix)
        if room < 1:
            error = f"the prefix of {len(prefix)} tokens leaves no room in a context of {self.context}"
            self._failed.append(Reply(request, (), error=error))
            return
        cost = request.n * request.max_tokens
        node = cache.find(key)
        if node is None and key not in search.feeds:
            longest = cache.longest(prefix)
            cost += len(prefix) - (longest.length if longest is not None else prompt)
        held = cache.used if cache.prefixes else prompt
        if held + cache.pending + cost > cache.limit:
            raise ValueError(
                f"request {request.id} may draw {cost} tokens but search {request.search} has "
                f"{cache.limit - held - cache.pending} left of its reservation: open it with more max_new_tokens"
            )
        cache.pending += cost
        active = Active(
            request,
            search,
            key,
            cost,
            min(request.max_tokens, room),
            [None] * request.n,
            request.n,
        )
        self._requests[request.id] = search.requests[request.id] = active
        self.batch.place(active)

    def cancel(self, request_id: int) -> None:
        """Drop a request; no reply will come."""
        active = self._requests.get(request_id)
        if active is None:
            self._failed = [reply for reply in self._failed if reply.request.id != request_id]
            return
        self._forget(active)
        self.batch.drop(active)

    def _forget(self, active: Active) -> None:
        active.search.cache.pending -= active.cost
        del self._requests[active.request.id]
        del active.search.requests[active.request.id]

    def poll(self) -> list[Reply]:
        """Forward until some request finishes (at most 64 times); the requests that finished."""
        batch = self.batch
        began = batch.clock()
        replies, self._failed = self._failed, []
        for _ in range(_PATIENCE):
            batch.work()
            if batch.finished or replies or not batch.busy:
                break
        for active in batch.finished:
            self._forget(active)
            replies.append(self._reply(active))
        batch.finished.clear()
        batch.counters.poll_seconds += batch.clock() - began
        return replies

    @staticmethod
    def _reply(active: Active) -> Reply:
        request, node = active.request, active.node
        assert node is not None
        steps = tuple(filter(None, active.steps))
        return Reply(request, steps, node.value, active.prompt, len(request.prefix) - active.prompt)
