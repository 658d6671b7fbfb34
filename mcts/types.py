"""The nouns that everything else is about. Frozen values, no behaviour beyond what a field means.

Conventions: token ids are int32, log-probabilities are nats in float32 under the policy at temperature 1,
values and rewards lie in [0, 1] (one player, no sign flip), and a number that was never computed is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from mcts.budget import Usage
    from mcts.tree import Tree

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Message = Mapping[str, str]
"""One chat message: {"role": ..., "content": ...}."""


class Stop(StrEnum):
    """Why a step ended."""

    DELIMITER = "delimiter"
    EOS = "eos"
    LENGTH = "length"


class Status(StrEnum):
    """What a check or a verifier found. Only CORRECT is a win; TIMEOUT and ERROR are never "wrong"."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"
    TIMEOUT = "timeout"
    ERROR = "error"


class Ended(StrEnum):
    """Why a search ended."""

    SOLVED = "solved"
    EXHAUSTED = "exhausted"
    BUDGET = "budget"
    STOPPED = "stopped"
    FAILED = "failed"


class Kind(StrEnum):
    """What a node of a tree is."""

    PROMPT = "prompt"
    STEP = "step"
    ROLLOUT = "rollout"
    REVISION = "revision"
    THOUGHT = "thought"


MIN_UNSEEN = 1e-6
"""Probability of steps not yet drawn below which nothing worth drawing is left (float32 noise of a sum)."""


class SettingError(ValueError):
    """Something that a user named or set and that cannot be; the message is one sentence that says what to do."""


class SearchError(Exception):
    """A search that cannot go on. The driver ends it as FAILED with this text and carries on with the others."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. `id` is stable and unique and never the question text."""

    id: str
    prompt: str | tuple[Message, ...]
    reference: str | None = None
    """The gold answer; never shown to the policy."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able facts of the task (for Countdown: numbers and target)."""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One reasoning step: one edge of the tree. Token ids are kept as drawn and never re-tokenised."""

    text: str
    """The decoded step, delimiter and EOS included as the tokenizer writes them (special tokens left out)."""
    token_ids: Int32  # [T]
    logprobs: Float32  # [T] nats, of the drawn tokens under the policy at temperature 1
    stop: Stop
    value: float = math.nan
    """Value head at the step's last token, in [0, 1]; NaN where the engine has none."""
    behavior_logprobs: Float32 | None = None  # [T] nats, where sampling differed from temperature 1, top_p 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check or a verifier says of one answer."""

    status: Status
    reward: float
    """In [0, 1]."""
    extracted: str | None = None
    why: str = ""

    @property
    def won(self) -> bool:
        return self.status is Status.CORRECT


class Drawn(NamedTuple):
    """A step that was drawn after a prefix, as a request to draw another one needs it."""

    token_ids: tuple[int, ...]  # [T]
    rest: tuple[float, ...]
    """[T] `rest[t]`: probability of tokens t to T - 1 given those before them, under the policy at temperature 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Ask an engine for `n` next steps after `prefix`. Requests of one search share keys and values along
    common prefixes; that is the engine's private business (DESIGN.md, decision 8)."""

    id: int
    """Unique within the engine's life."""
    search: int
    """The search it belongs to; opened with `Engine.open`, forgotten with `Engine.close`."""
    prefix: Int32  # [P] prompt tokens, then the tokens of every step on the path
    n: int
    max_tokens: int
    """Longest step, in tokens, delimiter or EOS included."""
    seed: int
    """Unsigned 64-bit key of the request's own random stream; sample i, token t draws number (i, t) of it."""
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    exclude: tuple[Drawn, ...] = ()
    """Steps not to be drawn again: every sample comes from the policy conditioned on being none of them (sampling
    without replacement). Needs temperature 1 and top_p 1, and an engine that `excludes`. Where they leave less than
    MIN_UNSEEN of the probability, samples are drawn as if nothing was excluded."""


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """What came back for one request."""

    request: Request
    steps: tuple[Step, ...]  # [n], in sample order
    prefix_value: float = math.nan
    """Value head at the last token of the prefix, in [0, 1]."""
    prompt: int = 0
    """Prefix tokens that had to be forwarded for this request (not found in the search's cache)."""
    cached: int = 0
    """Prefix tokens whose keys and values were already there."""
    error: str | None = None
    """Set if the engine gave up on the request; then `steps` is empty."""
    uncounted_calls: int = 0
    """Calls to a server whose drawn tokens are not in `steps`: cut off, timed out, refused or dropped."""
    uncounted_tokens: int = 0
    """The most that these can have drawn; the server never says how many it did."""


@dataclass(frozen=True, slots=True, eq=False)
class SearchResult:
    """A finished search."""

    problem: Problem
    strategy: str
    settings: Mapping[str, Any]
    """JSON-able settings that determine the trace."""
    tree: Tree
    candidates: tuple[int, ...]
    """Terminal nodes that carry an answer, in order of creation."""
    chosen: int | None
    """The terminal node that the strategy answers with; None where it has no answer."""
    answer: str | None
    verdict: Verdict | None
    """Verdict of the chosen answer (in `evaluate` given once, after the choice)."""
    usage: Usage
    seed: int
    policy_version: int
    ended: Ended
    oracle: bool = False
    """True where gold was used to choose."""
    error: str | None = None
    seconds: float = 0.0
