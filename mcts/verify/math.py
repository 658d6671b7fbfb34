"""Mathematical answers in LaTeX or plain text, judged by math-verify's parser in workers that can be killed."""

from __future__ import annotations

import importlib.util
import os
import re
import threading
from collections import OrderedDict
from typing import Any

from mcts.types import Status, Verdict
from mcts.verify.base import VerifierSettingError, check_partial, refuse
from mcts.verify.bounds import beyond
from mcts.verify.number import Number, difference, read_number
from mcts.verify.pool import Limits, Pool, PoolError

_OVER = {
    "cpu": (Status.TIMEOUT, "it took more than {cpu_seconds:g} CPU seconds"),
    "wall": (Status.TIMEOUT, "twice it took more than {wall_seconds:g} seconds of wall time"),
    "memory": (Status.ERROR, "it needed more than {memory_bytes} bytes of memory"),
    "died": (Status.ERROR, "its worker died twice"),
}
_LOAD_DEPENDENT = ("wall", "died")
"""Ends that say something of the machine and nothing of the pair: they are not remembered."""
_TWO_WHOLES = re.compile(r"\s*-?\d+,\d+\s*")


class MathVerifier:
    """`math`: the same mathematical object. What is the same and what is not stands in docs/VERIFIERS.md.

    Two plain numbers are compared here, exactly; everything else goes to a pool of processes in which every pair gets a
    fresh child: its verdict depends on the pair alone. The processes start with the first pair that needs one.

    partial: reward of a WRONG answer that is a well-formed number where gold is one (ReFT's 0.1), in [0, 1).
    workers: pairs judged at a time; 0 means as many as there are cores, at most 4.
    cpu_seconds, wall_seconds, memory_mb: limits of one pair, from when its work starts. Over the CPU limit: TIMEOUT;
        over the wall limit twice: TIMEOUT; over the memory limit: ERROR.
    cache_size: pairs remembered.
    """

    name = "math"

    def __init__(
        self,
        partial: float = 0.0,
        workers: int = 0,
        cpu_seconds: float = 5.0,
        wall_seconds: float = 60.0,
        memory_mb: int = 1024,
        cache_size: int = 20_000,
    ) -> None:
        self.partial = check_partial(partial)
        for key, given, least in (
            ("workers", workers, 0),
            ("cpu_seconds", cpu_seconds, 0.1),
            ("wall_seconds", wall_seconds, 0.1),
            ("memory_mb", memory_mb, 256),
            ("cache_size", cache_size, 0),
        ):
            if isinstance(given, bool) or not isinstance(given, int | float) or not given >= least:
                raise VerifierSettingError(f"{key} must be a number of at least {least}, not {given!r}")
        if importlib.util.find_spec("math_verify") is None:
            raise VerifierSettingError("the verifier 'math' needs the package math-verify: pip install math-verify")
        self._settings = (partial, workers, cpu_seconds, wall_seconds, memory_mb, cache_size)
        self._limits = Limits(cpu_seconds, wall_seconds, int(memory_mb) << 20)
        self._pool = Pool("mcts.verify.compare", int(workers) or min(4, os.cpu_count() or 1), self._limits)
        self._cache_size = int(cache_size)
        self._cache: OrderedDict[tuple[str, str], Verdict] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies in other processes get workers of their own."""
        return type(self), self._settings

    def close(self) -> None:
        """End the idle worker processes now rather than with this object; a later pair starts new ones."""
        self._pool.close()

    def verify(self, gold: str, prediction: str) -> Verdict:
        objection = refuse(gold, prediction)
        if objection is not None:
            return objection
        wanted = read_number(gold)
        given = read_number(prediction, loose=wanted is not None)
        if wanted is not None and given is None and _TWO_WHOLES.fullmatch(prediction):
            given = read_number(prediction, comma=True)  # 1,22 for 1.22; a list would be wrong all the same
        if wanted is not None and given is not None:
            return self._numbers(wanted, given, prediction)
        for name, text in (("gold", gold), ("the prediction", prediction)):
            bound = beyond(text)
            if bound:
                return Verdict(Status.UNPARSABLE, 0.0, prediction, f"{name} {bound}")
        return self._in_worker(gold, prediction)

    def _numbers(self, wanted: Number, given: Number, prediction: str) -> Verdict:
        why = wanted.sameness(given)
        if why:
            return Verdict(Status.CORRECT, 1.0, prediction, why)
        return Verdict(Status.WRONG, self.partial, prediction, difference(wanted, given))

    def _in_worker(self, gold: str, prediction: str) -> Verdict:
        key = (gold, prediction)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        try:
            reply = self._pool.judge({"gold": gold, "prediction": prediction})
        except PoolError as error:
            return Verdict(Status.ERROR, 0.0, prediction, str(error))
        verdict = self._verdict(reply, prediction)
        if reply["end"] not in _LOAD_DEPENDENT:
            with self._lock:
                self._cache[key] = verdict
                while len(self._cache) > self._cache_size:
                    self._cache.popitem(last=False)
        return verdict

    def _verdict(self, reply: dict[str, Any], prediction: str) -> Verdict:
        if reply["end"] != "judged":
            status, why = _OVER[reply["end"]]
            limits = {name: getattr(self._limits, name) for name in Limits.__slots__}
            return Verdict(status, 0.0, prediction, why.format(**limits))
        judged = reply["verdict"]
        status = Status(judged["status"])
        reward = (
            1.0 if status is Status.CORRECT else self.partial if judged["numbers"] and status is Status.WRONG else 0.0
        )
        return Verdict(status, reward, prediction, judged["why"])
