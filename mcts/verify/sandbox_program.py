"""Judges a program by input-output examples: the model's function runs in the sandbox, the outputs are compared here.

Gold is JSON: a list of {"input": ..., "output": ...} with any JSON values. The prediction is Python text that defines
`solve`, a function of one argument. Only the inputs go into the sandbox, so a program that knows all about its
surroundings still has to compute the outputs. Outputs are compared as canonical JSON text, never parsed here: tuples
count as lists; 1, 1.0 and true are three different values; keys have no order.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

from mcts.types import Status, Verdict
from mcts.verify.sandbox import Limits, Outcome, Run, Sandbox, SandboxError

Pair = Mapping[str, Any]
"""{"input": JSON value, "output": JSON value}"""

HARNESS = """
import json, os, sys
class Nowhere:
    def write(self, text): return len(text)
    def flush(self): pass
given = json.load(sys.stdin)
out = os.fdopen(os.dup(1), "w", encoding="ascii")
sys.stdout = sys.stderr = Nowhere()
def say(word, text=""):
    out.write(word + " " + text.encode("ascii", "backslashreplace").decode().replace("\\n", " ") + "\\n")
    out.flush()
def leave():
    os._exit(0)
def named(error):
    return (type(error).__name__ + ": " + str(error))[:200]
try:
    code = compile(given["program"], "program.py", "exec")
except BaseException as error:
    say("unparsable", named(error))
    leave()
space = {"__name__": "program"}
try:
    exec(code, space)
except MemoryError:
    say("memory")
    leave()
except BaseException as error:
    say("raised", named(error))
    leave()
solve = space.get("solve")
if not callable(solve):
    say("unparsable", "it defines no function solve")
    leave()
for value in given["inputs"]:
    try:
        text = json.dumps(solve(value), sort_keys=True, separators=(",", ":"))
    except MemoryError:
        say("memory")
        leave()
    except BaseException as error:
        say("raised", named(error))
        leave()
    say("value", text)
say("done")
leave()
"""
"""What runs in the sandbox around the model's program; it may lie about outputs, but does not know the right ones."""

DEFAULT_LIMITS = Limits(cpu_seconds=5, wall_seconds=20.0, output_bytes=1 << 18)


def canonical(value: object) -> str:
    """The one way to write a JSON value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


class ProgramVerifier:
    """A `Verifier` of programs. Verdicts: CORRECT (every output is right), WRONG (an output differs, or the program
    raises or crashes), UNPARSABLE (it does not compile, or has no function `solve`), TIMEOUT (CPU seconds, or twice the
    wall clock), ERROR (it met the limit of memory or output, or the sandbox failed: nothing is known of its answer).
    """

    name = "program"

    def __init__(
        self,
        sandbox: str = "namespaces",
        cpu_seconds: int = DEFAULT_LIMITS.cpu_seconds,
        wall_seconds: float = DEFAULT_LIMITS.wall_seconds,
        memory_mb: int = DEFAULT_LIMITS.memory_bytes >> 20,
        output_kb: int = DEFAULT_LIMITS.output_bytes >> 10,
        cache: int = 4096,
        partial: float = 0.0,
    ) -> None:
        """Limits are for all examples of one call together. sandbox: namespaces, or rlimits_only (unsafe, see
        docs/SANDBOX.md). cache: verdicts kept. partial: reward of a wrong program per share of right outputs, in
        [0, 1).

        Raises SandboxError in one sentence for a setting that cannot be."""
        for key, number in (("memory_mb", memory_mb), ("output_kb", output_kb), ("cache", cache)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise SandboxError(f"program: {key} must be a whole number of at least 1, not {number!r}")
        if isinstance(partial, bool) or not isinstance(partial, int | float) or not 0 <= partial < 1:
            raise SandboxError(f"program: partial must be a number from 0 to below 1, not {partial!r}")
        self.partial = float(partial)
        self.sandbox = Sandbox(
            Limits(
                cpu_seconds=cpu_seconds,
                wall_seconds=wall_seconds,
                memory_bytes=memory_mb << 20,
                output_bytes=output_kb << 10,
            ),
            sandbox,
        )
        self._size = cache
        self._cache: OrderedDict[bytes, Verdict] = OrderedDict()
        self._lock = threading.Lock()

    def verify(self, gold: str, prediction: str) -> Verdict:
        """Judge a program by `gold`, a JSON list of pairs. A gold that is none gives ERROR: it says nothing of the
        program."""
        try:
            pairs = json.loads(gold)
        except (ValueError, RecursionError):
            pairs = None
        if not are_pairs(pairs):
            return Verdict(Status.ERROR, 0.0, None, "gold is no JSON list of input-output pairs")
        return self.judge(cast(Sequence[Pair], pairs), prediction)

    def judge(self, pairs: Sequence[Pair], program: str) -> Verdict:
        """Judge a program by at least one pair. Raises SandboxError where the sandbox cannot be had."""
        inputs = [pair["input"] for pair in pairs]
        expected = [canonical(pair["output"]) for pair in pairs]
        key = hashlib.sha256(canonical([program, inputs, expected]).encode()).digest()
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        run = self.sandbox.run(HARNESS, canonical({"program": program, "inputs": inputs}))
        verdict = self._verdict(run, expected)
        if run.outcome is not Outcome.ERROR:
            with self._lock:
                self._cache[key] = verdict
                if len(self._cache) > self._size:
                    self._cache.popitem(last=False)
        return verdict

    def _verdict(self, run: Run, expected: Sequence[str]) -> Verdict:
        if run.outcome is Outcome.TIMEOUT:
            return Verdict(Status.TIMEOUT, 0.0, None, run.why)
        if run.outcome in (Outcome.MEMORY, Outcome.OUTPUT, Outcome.ERROR):
            return Verdict(Status.ERROR, 0.0, None, run.why)
        right = 0
        for line in run.stdout.decode("ascii", "replace").splitlines():
            word, _, text = line.partition(" ")
            if word == "unparsable":
                return Verdict(Status.UNPARSABLE, 0.0, None, text)
            if word == "memory":
                return Verdict(Status.ERROR, 0.0, None, f"it needed more than {self.sandbox.limits.memory_bytes} bytes")
            if word == "raised":
                return self._wrong(right, expected, f"it raised {text}")
            if word == "done" and right == len(expected) and run.outcome is Outcome.OK:
                return Verdict(Status.CORRECT, 1.0)
            if word == "value":
                if right == len(expected) or text != expected[right]:
                    return self._wrong(right, expected, f"output {right + 1} of {len(expected)} differs")
                right += 1
        return self._wrong(right, expected, run.why or "it ended before its last output")

    def _wrong(self, right: int, expected: Sequence[str], why: str) -> Verdict:
        """`right`: outputs that were right before the first that was not."""
        return Verdict(Status.WRONG, self.partial * right / len(expected), None, why)


def are_pairs(pairs: object) -> bool:
    """Whether this is a list of at least one {"input": ..., "output": ...}."""
    return (
        isinstance(pairs, list)
        and bool(pairs)
        and all(isinstance(pair, dict) and {"input", "output"} <= pair.keys() for pair in pairs)
    )
