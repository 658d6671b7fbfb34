# ruff: noqa: E501 - tables of pairs read best in long lines
"""The maths verifier: the leaks and the misses of the library behind it, closed; one table of pairs decides each case."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from mcts.types import Status
from mcts.verify import VerifierSettingError
from mcts.verify.math import MathVerifier
from mcts.verify.pool import PoolError


@pytest.fixture(scope="module")
def math() -> Iterator[MathVerifier]:
    verifier = MathVerifier(workers=2)
    yield verifier
    verifier.close()


EQUAL = [
    ("1000", r"1\,000"), ("1000", "1{,}000"), ("11111111100", r"11,\! 111,\! 111,\! 100"), ("3/2", "1 1/2"),
    (r"\frac{3}{2}", r"1\frac12"), ("-3/2", "-1 1/2"), ("1000", "1e3"), (r"6.02 \times 10^{23}", "6.02e23"),
    (r"\frac13", r"0.\overline{3}"), ("1/6", r"0.1\overline{6}"), ("1/3", "0.333..."), ("1/3", "0.(3)"),
    ("1", "0.999..."), (r"\frac{1}{3}", "0.333333"), (r"\sqrt{17}", "4.123105625617661"), ("1.22", "1,22"),
    ("[-2,7]", r"-2 \le x \le 7"), (r"-2 \le x \le 7", "[-2,7]"), (r"x \in [-2,7]", r"-2 \leq x \leq 7"),
    ("x>5", r"(5,\infty)"), (r"x \ne 3", r"(-\infty,3)\cup(3,\infty)"), (r"1<x<2", "2>x>1"),
    (r"1\leq|z|\leq \frac{3}{2}", r"z \in \left[-\frac{3}{2}, -1\right] \cup \left[1, \frac{3}{2}\right]"),
    (r"\mathbb{R}", r"(-\infty,\infty)"), (r"\emptyset", r"\{\}"),
    ("18", "9+9=18"), ("18", "x=18"), ("x=5", "5"), ("x=11", r"x \approx 11"), (r"\frac13", r"\frac13 \approx 0.333"),
    ("300\\text{ cm}", "3\\text{ m}"), ("125 miles", r"125\textnormal{ miles}"), ("18", "18 dollars"), (r"\$18.90", "18.90"),
    (r"864 \mbox{ inches}^2", r"864\text{ square inches}"), (r"90^\circ", "90"), ("18", "18 apples"),
    ("52_8", "52_{8}"), ("28\\%", "28"), ("28\\%", "0.28"), ("0.5", "50 percent"), ("5000000", "5 million"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"), ("1,2", r"\{2, 1\}"), ("5", r"\{5\}"), ("x=1 or x=2", "1, 2"),
    (r"3\sqrt{13}", r"\sqrt{117}"), (r"\frac{\sqrt3}{3}", r"\frac{1}{\sqrt{3}}"), (r"\frac{1+\sqrt5}{2}", "(1+sqrt(5))/2"),
    ("6-5i", "-5i + 6"), (r"e^{i\pi}", "-1"), (r"\sqrt{-4}", "2i"), ("5!", "120"), (r"\log_2 8", "3"), ("2^{10}", "1024"),
    (r"\tan^2(y)+1", r"\sec^2(y)"), ("(x+1)(x-1)", "x^2-1"), (r"\frac{x+2}{7}", r"\frac{x}{7}+\frac{2}{7}"), ("3x", "3*x"),
    ("2x+4y-3=0", r"y=-\frac{1}{2}x+\frac{3}{4}"), ("34x+45y-20z+100=0", "-34x-45y+20z-100=0"), ("y=2x+3", "2x+3"),
    (r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}", r"\begin{bmatrix} 0.5 \\ 2 \end{bmatrix}"), ("12:00", "12:00"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"), (r"(-\infty, 0]", r"\left(-\infty,0\right]"), ("4", "four"),
    (r"\text{(C)}", "C"), (r"\text{even}", "Even."), (r"\text{Evelyn}", "Evelyn"), (r"\boxed{7}", "$7$"), ("a_3=2, a_{37}=19", "a_{37}=19, a_3=2"),
    ("-18", "negative 18"), ("18", r"\text{18}"), ("18", r"\mathbf{18}"), ("6.02e23", "6.02 × 10²³"), ("2 N", "2 N"),
    (r"\\frac{1}{5}", r"\frac{1}{5}"), ("2007 + \\frac\\pi 2", r"2007+\pi/2"),
]  # fmt: skip

DIFFERENT = [
    ("18", "17=18"), ("18", "x=17=18"), ("18", r"18 \approx 17"), ("18", "2x=18"), ("18", r"17 \ne 18"), ("18", "17<18"),
    ("18", "18=18=17"), ("2^{-98}", "2^{-99}"), ("1", "1+2^{-99}"), ("x", "x+10^{-99}"), ("0", "2^{-1000}"),
    ("0.0000002", "0.0000001"), ("1", "0.9999999999"), ("1/3", "0.33"), (r"\sqrt2", "1.41"), (r"\pi", "22/7"), ("16386.16", "16386.2"),
    ("52_8", "52_9"), ("52_8", "52"), ("52_8", "42"), ("3 cm", "3 m"), (r"3\text{ cm}", r"3\text{ m}"), ("$5", r"5\text{ cents}"),
    (r"3\text{ cm}^2", r"3\text{ cm}"), (r"3\pi\text{ cm}", r"3\pi\text{ m}"), ("5 p.m.", "5 a.m."), (r"90^\circ", r"\frac{\pi}{2}"),
    ("(1,3)", r"\{1,3\}"), ("(1,3)", r"\{3,1\}"), ("(1,3)", "{1,3}"), ("(1,3)", "(3,1)"), (r"\{1,3\}", "(1,3)"), ("(1,3)", "1,3"),
    ("[1,2)", "(1,2)"), ("[1,2)", "(1,2]"), ("[0,1)", "0<x<1"), ("x>5", "x<5"), (r"x \ge 5", "x>5"), ("x<1", "x>-1"),
    ("5", "5, 6"), ("5", "5 or 6"), ("5", r"\{5,6\}"), ("1,2", "1"), ("1,2,3", "1,2"), (r"\pm 2021", "2021"), ("7", r"7 \pm 1"),
    ("x=5", "y=5"), ("x", "y"), ("3R^2", "3r^2"), ("x_1", "x_2"), (r"\sqrt{x^2}", "x"), ("11a+c=7", "11a+c"), ("a+3z=0", "0"),
    ("x^3+3x-6", "x^3+3x+6"), ("(a+5)(b+2)", "(+5)(b+2)"), ("x+2n+1", "x+1"), ("i", "-i"), (r"1\sqrt{19}", "1"), ("18", "18!"),
    (r"1 - \frac{1}{\mathrm{e}}", r"1 + \frac{1}{\mathrm{e}}"), ("12:00", "1:00"), ("18", "18 million"), ("2", r"2\pi"), ("18", "18%3"),
    (r"\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}", r"\begin{pmatrix}1 & 2 \\ 3 & 5\end{pmatrix}"), (r"\text{E}", "d"), ("18", "eighty"),
    ("|x-3|", "3-x"), ("|x+5|", "x+5"), (r"\sqrt{(x-100)^2}", "100-x"), (r"\max(x,-2)", "x"), ("x<5", "y<5"), ("x+3", "x=x+3"),
    (r"\emptyset", r"\{\emptyset\}"), (r"\{1,2\}", r"\{\{1,2\}\}"), ("2", "2 k"), ("5", "5 M"), ("18", "18 dozens"), ("18", "18 millions"),
    ("200", "2 hundred thousand"), ("3", "3 sixteenths"), ("18", "18 below zero"), ("18", "negative 18"), ("18", r"18\text{ is wrong}"),
    ("18", r"18\ldots"), (r"1+2+10", r"1+2+\ldots+10"), ("2025-01-02", "2025-02-01"), ("10^{8}", "10²³"),
    ("x_1=1, x_2=2", "2, 1"), (r"(0,9) \cup (9,36)", "(0,36)"), ("2k", "2"), ("32349", "32, 349"), ("3", "3 squared"), ("5x", "5"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "prediction"), EQUAL)
def test_the_same_is_correct(math: MathVerifier, gold: str, prediction: str) -> None:
    verdict = math.verify(gold, prediction)
    assert verdict.status is Status.CORRECT, verdict.why
    assert verdict.reward == 1.0


@pytest.mark.parametrize(("gold", "prediction"), DIFFERENT)
def test_what_differs_is_not_a_win(math: MathVerifier, gold: str, prediction: str) -> None:
    verdict = math.verify(gold, prediction)
    assert verdict.status in (Status.WRONG, Status.UNPARSABLE), verdict
    assert verdict.reward == 0.0
    assert verdict.why


@pytest.mark.parametrize(
    "text", ["", " ", r"\frac{", "??", r"\frac{0}{0}", "1/0", r"\left(", "3 +", "17=18", "}{", "$$", r"\zzz"]
)
def test_an_unreadable_gold_never_gives_a_win(math: MathVerifier, text: str) -> None:
    verdict = math.verify(text, text)
    assert verdict.status is Status.UNPARSABLE
    assert verdict.why.startswith("gold")


def test_prose_is_unparsable_and_not_wrong(math: MathVerifier) -> None:
    assert math.verify("$x >= 5$", r"Therefore $x \geq 5$ is the solution.").status is Status.UNPARSABLE


def test_a_slow_pair_is_a_timeout_and_the_next_is_judged() -> None:
    quick = MathVerifier(workers=1, cpu_seconds=0.3)
    verdict = quick.verify("1", "9^{9^{9}}")
    assert (verdict.status, verdict.reward) == (Status.TIMEOUT, 0.0)
    assert "0.3 CPU seconds" in verdict.why
    assert quick.verify("x^2", "x \\cdot x").won
    quick.close()


def test_verdicts_are_remembered_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    small = MathVerifier(cache_size=2)
    asked: list[dict[str, str]] = []

    def judge(case: dict[str, str]) -> dict[str, object]:
        asked.append(case)
        return {"end": "judged", "verdict": {"status": "correct", "why": "", "numbers": False}}

    monkeypatch.setattr(small._pool, "judge", judge)
    for gold in ("x", "y", "x", "z", "y"):  # y was asked for longest ago when z came
        small.verify(gold, "w")
    assert [case["gold"] for case in asked] == ["x", "y", "z", "y"]
    assert len(small._cache) == 2


@pytest.mark.parametrize(
    ("end", "status", "times"),
    [("wall", "timeout", 2), ("died", "error", 2), ("cpu", "timeout", 1), ("memory", "error", 1)],
)
def test_what_the_machine_caused_is_not_remembered(
    monkeypatch: pytest.MonkeyPatch, end: str, status: str, times: int
) -> None:
    verifier = MathVerifier()
    asked = []
    monkeypatch.setattr(verifier._pool, "judge", lambda case: asked.append(case) or {"end": end})
    verdicts = [verifier.verify("x", "y") for _ in range(2)]
    assert [verdict.status.value for verdict in verdicts] == [status, status]
    assert len(asked) == times


def test_workers_that_cannot_start_are_an_error_and_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = MathVerifier()

    def judge(case: dict[str, str]) -> dict[str, object]:
        raise PoolError(f"a worker for verification cannot start: {len(case)}")

    monkeypatch.setattr(verifier._pool, "judge", judge)
    assert verifier.verify("x", "y").status is Status.ERROR


@pytest.mark.parametrize(
    ("gold", "prediction", "reward"),
    [
        ("18", "17", 0.1),
        ("18", "18", 1.0),
        ("18", "seventeen", 0.0),
        (r"\text{even}", "17", 0.0),
        ("x", "17", 0.0),
        ("18", "17=18", 0.0),
    ],
)
def test_partial_reward_is_for_a_number_where_gold_is_one(gold: str, prediction: str, reward: float) -> None:
    generous = MathVerifier(partial=0.1, workers=1)
    verdict = generous.verify(gold, prediction)
    assert verdict.reward == reward
    assert verdict.won == (reward == 1.0)
    generous.close()


@pytest.mark.parametrize(
    "settings",
    [{"partial": 1.0}, {"partial": "a"}, {"partial": True}, {"workers": -1}, {"cpu_seconds": 0}, {"memory_mb": 8}],
)
def test_settings_are_checked(settings: dict[str, object]) -> None:
    with pytest.raises(VerifierSettingError):
        MathVerifier(**settings)  # type: ignore[arg-type]


def test_threads_get_the_same_verdicts_as_one_caller(math: MathVerifier) -> None:
    pairs = (EQUAL + DIFFERENT)[::6]
    with Alone() as alone, ThreadPoolExecutor(6) as threads:
        fresh = list(threads.map(lambda pair: alone.verify(*pair), pairs))
    assert fresh == [math.verify(*pair) for pair in pairs]


class Alone:
    def __enter__(self) -> MathVerifier:
        self.verifier = MathVerifier(workers=2)
        return self.verifier

    def __exit__(self, *_: object) -> None:
        self.verifier.close()


def test_a_pickled_copy_has_the_same_settings_and_workers_of_its_own(math: MathVerifier) -> None:
    copy = pickle.loads(pickle.dumps(MathVerifier(partial=0.1, cpu_seconds=2.0)))  # noqa: S301 - our own bytes
    assert copy._settings == (0.1, 0, 2.0, 60.0, 1024, 20_000)
    assert copy.verify("x", "x").won
    copy.close()
    assert math.verify("x", "x").won
