# ruff: noqa: E501 - tables of pairs read best in long lines
"""Forms that models give answers in: each promise with pairs that are the same and pairs that are not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mcts.types import Status
from mcts.verify.math import MathVerifier

Pair = tuple[str, str]


@pytest.fixture(scope="module")
def math() -> Iterator[MathVerifier]:
    verifier = MathVerifier(workers=2)
    yield verifier
    verifier.close()


def check(math: MathVerifier, same: list[Pair], other: list[Pair]) -> None:
    """`same` are wins, `other` are understood and differ."""
    verdicts = {pair: math.verify(*pair).status for pair in same + other}
    assert {pair for pair in same if verdicts[pair] is not Status.CORRECT} == set()
    assert {pair for pair in other if verdicts[pair] is not Status.WRONG} == set()


def check_unread(math: MathVerifier, pairs: list[Pair]) -> None:
    verdicts = {pair: math.verify(*pair).status for pair in pairs}
    assert {pair for pair in pairs if verdicts[pair] is not Status.UNPARSABLE} == set()


def test_a_name_on_the_right_is_as_good_as_one_on_the_left(math: MathVerifier) -> None:
    check(
        math,
        [("18", "18=x"), ("18", "18 = f(2)"), ("x=18", "18=x"), ("2x+1", "2x+1=y"), ("5", "5=x+y")],
        [("18", "17=18"), ("18", "18=2x"), ("18", "x=17=18"), ("18", "18=17=x"), ("18", "18=x+1"), ("18", "18<x"), (r"\pi", r"3.14=\pi"), ("x^2", "x^2=x")],
    )  # fmt: skip


def test_a_minus_before_a_variable_is_heard(math: MathVerifier) -> None:
    check(math, [], [("18", "-x=18"), ("18", "18=-x")])


def test_named_values_are_a_tuple_where_their_letters_follow_one_another(math: MathVerifier) -> None:
    check(
        math,
        [("(1,3)", "x=1, y=3"), ("(1,3)", "y=3, x=1"), ("(1,3)", r"x=1 \text{ and } y=3"), ("(1,3)", "1=x, 3=y"), ("(1,2,3)", "a=1,b=2,c=3"), (r"(\frac12,-3)", "x=0.5, y=-3"), ("x=1, y=3", "(1,3)")],
        [("(1,3)", "x=3, y=1"), ("(1,3)", "y=1, x=3"), ("(1,3)", "x=1 or y=3"), ("(1,3)", "x=1, z=3"), ("(1,3)", "x=1, x=3"), ("(1,3)", "x=1"), ("(1,3)", "x=1, y=3, z=5"),
         ("[1,3]", "x=1, y=3"), ("[1,3)", "x=1, y=3"), ("(1,3)", r"\{x=1, y=3\}"), ("(1,3)", r"\{1,3\}"), ("(1,3)", "1,3")],
    )  # fmt: skip


def test_values_with_names_are_no_set_and_no_alternatives(math: MathVerifier) -> None:
    check(
        math,
        [("1,3", "x=1, y=3"), (r"\{1,3\}", "x=1, x=3"), (r"\{1,3\}", "x_1=3, x_2=1"), ("1,3", "x=1 or x=3")],
        [(r"\{1,3\}", "x=1, y=3"), ("1,3", "x=1 or y=3")],
    )


def test_or_joins_conditions_and_and_asks_for_both(math: MathVerifier) -> None:
    check(
        math,
        [("|x|>1", "x<-1 or x>1"), ("|x|>1", r"x<-1 \text{ or } x>1"), ("x<-1 or x>1", "x>1 or x<-1"), (r"(-\infty,-1)\cup(1,\infty)", "x<-1 or x>1"), (r"\{0\}\cup(1,\infty)", "x=0 or x>1"),
         ("(-1,1)", "x>-1 and x<1"), ("|x|<1", "-1<x and x<1"), ("x>0 and y>0", "y>0, x>0"), (r"(-\infty,1)\cup(1,2)\cup(2,\infty)", r"x\ne 1 \text{ and } x\ne 2")],
        [("|x|>1", "x<-1 and x>1"), ("|x|>1", "x<-1, x>1"), ("|x|<1", "x<-1 or x>1"), ("|x|>1", "x<-1 or x>=1"), ("x>0 and y>0", "x>0 or y>0"), (r"\mathbb{R}", "|x|<-1")],
    )  # fmt: skip
    check_unread(math, [("x<-1 or x>1 and y>0", "x>1")])


def test_conditions_on_different_unknowns_differ(math: MathVerifier) -> None:
    check(
        math,
        [(r"(2,\infty)", "y>2"), (r"(2,\infty)", "f(x)>2")],
        [
            ("x>2", "y>2"),
            ("x>2", "f(x)>2"),
            ("x<-1 or x>1", "y<-1 or y>1"),
            ("|x|>1", "x<-1 or y>1"),
            (r"(-\infty,-1)\cup(1,\infty)", "x<-1 or y>1"),
        ],
    )


def test_an_interval_whose_ends_are_the_wrong_way_round_is_no_empty_set(math: MathVerifier) -> None:
    check(
        math,
        [(r"(2,5)\cup(5,12)", r"(5,12)\cup(2,5)"), (r"(2,12)", r"(2,5]\cup(4,12)")],
        [("(2,12)", r"(5,2)\cup(2,12)"), (r"(3,\infty)", r"(3,\infty)\cup(0,-5)")],
    )


def test_a_set_may_be_what_another_leaves(math: MathVerifier) -> None:
    check(
        math,
        [
            (r"(-\infty,2)\cup(2,\infty)", r"\mathbb{R}\setminus\{2\}"),
            (r"x\ne 2", r"\mathbb{R}\setminus\{2\}"),
            (r"A\setminus\{b\}", r"A\setminus\{b\}"),
        ],
        [(r"(-\infty,2)\cup(2,\infty)", r"\mathbb{R}\setminus\{3\}"), (r"\{2\}", r"\mathbb{R}\setminus\{2\}")],
    )


def test_a_base_is_part_of_a_numeral(math: MathVerifier) -> None:
    check(
        math,
        [("101_2", "101_{2}"), ("101_2", "0101_2"), ("52_8", "(52)_8"), ("52_8", r"52_{\text{eight}}"), ("52_8", r"52_\text{eight}"), ("ff_{16}", "FF_{16}"), (r"\text{FF}_{16}", "FF_{16}"), ("2a_{16}", "2A_{16}"),
         ("BEE_{16}", r"\mathrm{BEE}_{16}"), ("5", "5_{10}"), ("24_{10}", "24"), ("AAA_4", "AAA_4")],
        [("52_8", "52_9"), ("52_8", "52"), ("52_8", "42"), ("52_8", "42_{10}"), ("101_2", "5"), ("5", "101_2"), ("AB_{12}", "AB_{13}"), ("1A_{12}", "1B_{12}"), ("52", "52_8"), ("a_{16}", "A_{16}")],
    )  # fmt: skip
    check_unread(math, [("0.75", "0.11_2"), ("0.11", "0.11_2"), ("52_8", "42_8+10_8")])


def test_a_residue_is_compared_as_written_and_with_its_modulus(math: MathVerifier) -> None:
    check(
        math,
        [(r"5 \pmod 7", r"5 \pmod{7}"), (r"5 \bmod 7", r"5 \bmod 7"), (r"5 \pmod 7", "5 (mod 7)"), (r"5 \pmod 7", r"5 \text{ (mod } 7)"), (r"x \equiv 5 \pmod 7", r"x ≡ 5 \mod 7"), (r"x \equiv 5 \pmod 7", r"5 \pmod 7")],
        [(r"5 \pmod 7", r"5 \pmod 8"), (r"5 \pmod 7", r"4 \pmod 7"), (r"5 \pmod 7", r"12 \pmod 7"), (r"5 \pmod 7", "5"), ("5", r"5 \pmod 7"), (r"x \equiv 5 \pmod 7", "x=5"), (r"x \equiv 5 \pmod 7", r"y \equiv 5 \pmod 7")],
    )  # fmt: skip
    check_unread(math, [(r"4 \pmod 7", r"2^5 \equiv 4 \pmod 7")])


def test_infinity_is_no_number_to_calculate_with(math: MathVerifier) -> None:
    check(
        math,
        [(r"\infty", r"+\infty"), (r"\infty", "infinity"), (r"\sum_{n=0}^{\infty} \frac{1}{2^n}", "2")],
        [(r"\infty", r"-\infty"), ("2", r"\infty")],
    )
    check_unread(math, [(r"\infty", r"2\infty"), (r"\infty", r"\infty+1"), ("0", r"\frac{1}{\infty}"), ("2", r"2\infty"), (r"\infty", r"2^\infty")])  # fmt: skip


def test_an_interval_does_not_hold_infinity(math: MathVerifier) -> None:
    check(
        math,
        [(r"[2,\infty)", r"x \ge 2"), (r"[2,\infty)", r"[2,+\infty)")],
        [(r"[2,\infty)", r"[2,\infty]"), (r"x \ge 2", r"[2,\infty]"), (r"(-\infty,2]", r"[-\infty,2]")],
    )


def test_a_product_behind_a_slash_is_not_guessed(math: MathVerifier) -> None:
    check_unread(
        math,
        [("1/(2x)", "1/2x"), ("x/2", "1/2x"), (r"\frac{1}{2\pi}", r"1/2\pi"), (r"\frac{3(x+1)}{2}", "3/2(x+1)"), ("y=x/2+3", "y=1/2x+3"), ("x/(2y)", "x/2y"), ("1/2x", "1/2x")],
    )  # fmt: skip
    check(math, [("x/2", "(1/2)x"), ("x/2", r"1/2 \cdot x"), ("1/(2x)", r"\frac{1}{2x}"), (r"\sqrt{x}y", "x^{1/2}y"), ("1/2", "1/2 cm")], [("x/2", "1/(2x)")])  # fmt: skip


def test_digits_behind_a_prefix_are_not_zero(math: MathVerifier) -> None:
    check_unread(math, [("0", "0x12"), ("18", "0x12"), ("0", "0b101")])
    check(math, [("x^2+1", "x^2+0x+1"), ("10x", "10x")], [("12", "10x")])


def test_degrees_inside_a_function_are_an_angle(math: MathVerifier) -> None:
    check(
        math,
        [(r"\sin 30^\circ", r"\frac{1}{2}"), (r"\tan 15^\circ", r"2-\sqrt3"), (r"\cos^2 30^\circ", "3/4"), (r"\cos(6^\circ)\sin(12^\circ)\csc(18^\circ)", r"\cos 6^\circ \sin 12^\circ \csc 18^\circ")],
        [(r"\sin 15", r"\sin 15^\circ"), (r"60^\circ", r"\frac{\pi}{3}")],
    )  # fmt: skip
    check_unread(math, [(r"\sin x", r"\sin x^\circ")])


def test_a_factor_before_a_matrix_is_one_of_each_cell(math: MathVerifier) -> None:
    gold = r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"
    check(
        math,
        [
            (gold, r"\frac12\begin{pmatrix} 2 \\ 4 \end{pmatrix}"),
            (gold, r"-\begin{bmatrix} -1 \\[2pt] -2 \end{bmatrix}"),
        ],
        [(gold, r"2\cdot\begin{pmatrix} 1 \\ 2 \end{pmatrix}")],
    )


def test_times_of_day_are_read_with_and_without_dots(math: MathVerifier) -> None:
    gold = r"8\!:\!34 \text{ p.m.}"
    check(
        math,
        [(gold, "8:34 PM"), (gold, "8:34 p.m."), (gold, r"8:34\text{ pm}"), ("5 p.m.", "5pm"), ("4:51:06 p.m.", "4:51:06 PM")],
        [(gold, "8:34 a.m."), (gold, "8:43 p.m."), ("5 p.m.", "5 AM")],
    )  # fmt: skip


def test_no_solution_is_the_empty_set_and_none_is_a_word(math: MathVerifier) -> None:
    check(
        math,
        [(r"\emptyset", r"\text{no solution}"), (r"\text{No solution}", r"\{\}"), ("no solutions", "There is no solution.")],
        [(r"\emptyset", "0"), ("no solution", "0"), (r"\{\emptyset\}", "no solution"), (r"\emptyset", "none"), ("no solution", "no real solution")],
    )  # fmt: skip


def test_a_factorial_of_a_variable_is_judged_in_time(math: MathVerifier) -> None:
    check(math, [("n!", "n(n-1)!")], [])


def test_a_number_has_to_be_worked_out(math: MathVerifier) -> None:
    check(
        math,
        [(r"\frac{1}{1024}", r"\left(\frac{1}{2}\right)^{10}"), (r"-\frac34", r"-\left(\frac34\right)"), (r"\frac34", "{3}/{4}"), (r"\frac34", r"\frac{3.0}{4.0}"), ("0.75", r"\frac{1.5}{2}"), ("1024", "2^{10}"), (r"-\frac34", r"\frac{3}{-4}"), (r"\frac{1}{1024}", r"\frac{1}{2^{10}}"), ("3/4", r"{3\over4}"), ("18", "(18)"), ("18", "9+9=18"), ("5!", "120"), (r"\log_2 8", "3"), (r"\binom{5}{2}", "10"),
         (r"\sqrt{17}", "4.123105625617661"), ("4.123105625617661", r"\sqrt{17}")],
        [("120", "5!"), ("70", r"\dbinom{8}{4}"), ("391", r"17 \cdot 23"), ("26000", "513^2 - 487^2"), ("12", r"\sqrt{36 \times \sqrt{16}}"), ("16", "|(1-i)^8|"), ("3", r"\lceil 2.5 \rceil"), ("256", r"2^{16} \div 16^2"),
         ("6", r"\log_264"), (r"\frac{38}{35}", r"\frac{2}{7}+\frac{8}{10}"), (r"\frac12", r"\sin 30^\circ"), ("2", r"\sum_{n=0}^{\infty} \frac{1}{2^n}"), ("10", "(9+1)"), ("(391,1)", r"(17 \cdot 23, 1)"), ("x=391", r"x = 17 \cdot 23"), ("18", "19-1=x")],
    )  # fmt: skip


def test_a_constant_has_no_function_that_gold_is_without(math: MathVerifier) -> None:
    check(
        math,
        [(r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}"), (r"11\sqrt2", r"\sqrt{242}"), (r"\log_2 3", r"\frac{\ln 3}{\ln 2}"), (r"\sin 20^\circ", r"\cos 70^\circ"), ("1-e", "-e+1"), (r"\cot x", r"\frac{\cos x}{\sin x}")],
        [(r"\frac{\sqrt{2}}{2}", r"\sin 45^\circ"), (r"-\frac{\pi}{6}", r"\arcsin(-\frac12)"), ("2i", "|2|i"), (r"24\sqrt2", r"4!\sqrt2")],
    )  # fmt: skip


def test_a_relation_is_no_answer_before_it_is_solved(math: MathVerifier) -> None:
    check(
        math,
        [("x>5", "5<x"), (r"(5,\infty)", "x>5"), ("x=5", "x = 5"), ("x=5", "5"), (r"1\leq|z|\leq 2", r"z \in [-2,-1] \cup [1,2]"), ("2x+4y=6", "x+2y=3"), ("y=2x+3", "2x-y+3=0"), (r"x \ne 3", r"3 \ne x")],
        [("x>5", "3x-2>13"), (r"(5,\infty)", "3x-2>13"), (r"(-\infty,-3)\cup(2,\infty)", r"\frac{x+3}{x-2}>0"), ("[1,2]", r"x^2-3x+2 \le 0"), (r"x \ne 3", r"x-3 \ne 0"), ("x=5", "2x=10"), ("x=5", "x+1=6"), ("x<1", "-x>-1"), (r"(-\infty,\infty)", "-12x^2+3x-5<0"),
         (r"x<1 \text{ or } x>2", "x-1<0 or x-2>0")],
    )  # fmt: skip


def test_what_stands_behind_a_formula_is_its_unit_or_it_is_not_read(math: MathVerifier) -> None:
    check(
        math,
        [(r"3\pi", r"3\pi\text{ square cm}"), (r"3\pi", r"3\pi\text{ units}"), (r"3\pi", r"3\pi\text{ m/s}"), (r"3\pi\text{ cm}^2", r"3\pi\text{ cm squared}"),
         (r"5\pi", r"5\pi\text{apples}"), (r"2^n", r"2^n\mathrm{ways}"), (r"\mathbf{i}-2\mathbf{j}", r"\mathbf{i}-2\mathbf{j}")],
        [(r"\mathbf{i}-2\mathbf{j}", r"\mathbf{i}-2"), (r"3\pi", r"3\pi\text{ k}"), (r"3\pi\text{ cm}", r"3\pi\text{ m}")],
    )  # fmt: skip
    check_unread(math, [(r"3\pi", r"3\pi\text{ million}"), (r"3\pi", r"3\pi\text{million}"), (r"\sqrt2", r"\sqrt2\text{ thousand}"), (r"\sqrt2", r"\sqrt2\text{, 1, 5, 7}"), (r"3\pi", r"3\pi\text{ isn't it}"), (r"\sqrt2", r"\sqrt2\text{ millionths}"), (r"y=2x+3", r"y=2x+3\quad\text{A,B,C}")])  # fmt: skip


def test_a_second_answer_behind_a_space_is_no_factor(math: MathVerifier) -> None:
    check(
        math,
        [
            (r"\frac38", r"\dfrac 3 8"),
            (r"2\log_2 5", r"2 \log_2 5"),
            (r"3\frac12", "3 1/2"),
            ("10000", r"10\,000"),
            ("14916", "14 {, }916"),
        ],
        [],
    )
    check_unread(math, [("0,1", r"202\quad 0, 1"), ("0,1", r"36.9\text{ but not }0, 1"), ("0,1", r"468\%0, 1"), (r"\frac{1}{\sqrt2}", r"\frac{1}{\sqrt2}\;\;1"), ("0,x", "(x+1) 0, x")])  # fmt: skip


def test_about_stands_between_numbers_that_are_close_or_behind_a_name(math: MathVerifier) -> None:
    check(
        math,
        [(r"\sqrt2", r"\sqrt2 \approx 1.414"), ("17", r"x = 17 \approx 17.001"), ("x=3.2", r"x \approx 3.2")],
        [("17", r"17 \approx x = 18"), ("17", r"x = 17 \approx y = 18"), ("2-b", r"2-b \approx 5898"), ("(8,-2)", r"(8,-2) \approx 7"), (r"\frac14", r"\frac14 \approx x^2"), ("[0,3)", r"[0,3) \approx [0,4)")],
    )  # fmt: skip


def test_primes_are_part_of_a_name(math: MathVerifier) -> None:
    check(
        math,
        [("f'(x)", "f'(x)"), (r"\frac{A'}{2}", "0.5A'"), ("2x", "f'(x) = 2x")],
        [("f'(x)", "f(x)"), ("f''(x)", "f'(x)"), ("y'", "y"), ("18", "18'")],
    )


def test_a_list_of_two_numbers_is_no_decimal(math: MathVerifier) -> None:
    check(math, [("1.22", "1,22"), ("1,2", "2,1"), ("22,500", "22500")], [("1,2", "1.2"), ("17,44", "17.44"), ("0,1", "0.1")])  # fmt: skip


def test_a_tuple_is_not_half_open(math: MathVerifier) -> None:
    check(math, [("(1,2,3)", "(1,2,3)"), ("[1,2)", "[1,2)")], [])
    check_unread(math, [("(1,2,3)", "(1,2,3]"), ("(1,2,3)", "[1,2,3)")])


def test_a_minus_in_brackets_before_a_variable_is_heard(math: MathVerifier) -> None:
    check(math, [], [("18", "(-x)=18"), ("18", "{-x}=18"), ("18", "18=( - x)")])


def test_a_fraction_in_one_character_is_read(math: MathVerifier) -> None:
    check(math, [(r"\frac12", "½"), ("3.5", "3½"), (r"\frac34", "¾"), ("2/3", "⅔")], [("18", "18½"), ("3/2", "3½")])


def test_conditions_may_be_united_or_stand_in_a_set(math: MathVerifier) -> None:
    check(
        math,
        [(r"(-\infty,-1)\cup(1,\infty)", r"x<-1 \cup x>1"), ("|x|>1", r"x<-1 \cup x>1"), (r"(2,\infty)", r"\{x \mid x>2\}"), (r"(2,\infty)", r"\{x : x > 2\}"), (r"(2,\infty)", r"\left\{x \in \mathbb{R} \mid x > 2\right\}"), (r"[0,1)", r"S = [0,1)"),
         (r"[0,1)\cup(2,3)", r"S=[0,1)\cup(2,3)")],
        [(r"(-\infty,-1)\cup(1,\infty)", r"x<-1 \cup y>1"), (r"(2,\infty)", r"\{x \mid 2x>4\}"), (r"(2,\infty)", r"\{x : x \ge 2\}"), (r"(2,\infty)", r"\{x : y > 2\}"), (r"\{2,3\}", "2:3")],
    )  # fmt: skip


# judged by hand: gold, what a model wrote, is it the same
SEEN = [
    (r"30^\circ", r"30 \text{ degrees}", True), (r"30^\circ", r"30 \text{ radians}", False), ("10\\%", r"\frac{1}{10}", True), ("10\\%", "0.01", False), ("1/3", r"33\frac13\%", True), ("50", "50\\%", True),
    (r"6 \text{ square units}", "6", True), (r"36\pi", r"36\pi \text{ cubic inches}", True), (r"3 \text{ hours}", "180 minutes", True), (r"3 \text{ hours}", "3 minutes", False),
    (r"3\frac{1}{2}", "3 1/2", True), (r"3\frac{1}{2}", r"\frac{3}{2}", False), (r"-2\frac13", r"-\frac{7}{3}", True), (r"-2\frac13", r"-\frac{5}{3}", False), ("1 1/2", "11/2", False),
    (r"\text{Thursday}", "thursday", True), (r"\text{Thursday}", "Friday", False), (r"\text{odd}", r"\textbf{odd}", True), (r"\text{neither}", "even", False),
    (r"\dfrac{3}{4}", r"{3\over4}", True), (r"-\frac{3}{4}", r"\frac{3}{-4}", True), (r"\frac{3}{4}", r"\frac{4}{3}", False), ("5", r"5\\", True),
    (r"\left( -2, 3 \right]", "(-2,3]", True), ("(-1,2)", "(-1,2]", False), (r"(-\infty, 2)", "x<2", True), (r"(-\infty,2)\cup(2,\infty)", r"x\neq 2", True),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}", False), (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\left(\begin{array}{c}1\\2\end{array}\right)", True), (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "(1,2)", False),
    (r"\{1,2,3\}", "3, 2, 1", True), (r"\{1,2,3\}", r"\{1,2\}", False), (r"\pm 3", "-3, 3", True), ("3", r"\pm 3", False), ("2, 3, \\text{ and } 4", "2,3,4", True),
    (r"\$18.90", "18.9", True), ("18", "18 USD", True), (r"\$18", "€18", False), ("50 cents", "0.5", False), (r"\$0.50", "50 cents", True), ("1.25", "1,250", False),
    ("12,345", r"12\,345", True), ("12345", "1,2345", False), (r"3.0\times10^8", "300000000", True), (r"3\times10^{-4}", r"3\times10^{4}", False), ("0.0003", "3E-4", True),
    (r"0.\overline{27}", "3/11", True), (r"0.\overline{27}", "0.27", False), ("2/3", r"0.\dot{6}", True), ("2/3", "0.67", False), ("1/7", r"0.\dot{1}4285\dot{7}", False),
    ("3:30", "3:03", False), ("3:4", "3 to 4", True), ("3:4", "4:3", False), ("3:4", r"\frac{3}{4}", False), ("3:4", "6:8", False), (r"\text{undefined}", "0", False),
    ("x^2+2x+1", "1+2x+x^2", True), ("(x+1)(x-2)", "x^2-x-2", True), ("x^2+2x+1", "x^2+2x+1=0", False), ("(a+b)^2", "a^2+b^2", False), (r"\frac{x^2-1}{x-1}", "x+1", True),
    (r"\sqrt{7+4\sqrt3}", r"2+\sqrt3", True), (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5}", False), (r"\sqrt5", "5^0.5", True), (r"3\sqrt{2}", r"\sqrt[3]{2}", False), (r"\ln 2", r"\log 2", False),
    ("(2,-3)", r"\langle 2,-3 \rangle", True), ("(2,-3)", "2,-3", False), ("(1,2),(3,4)", r"\{(3,4),(1,2)\}", True), ("(1,2),(3,4)", "(2,1),(3,4)", False),
    (r"\theta = 30^\circ", r"30^\circ", True), ("5", "5 or more", False), ("5", r"\text{not } 5", False), ("B", r"\text{(B) } 5", False), ("k<-3", "x<-3", False), ("0.56 = 56\\%", "56\\%", True),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "prediction", "same"), SEEN)
def test_what_models_write_is_judged_as_by_hand(math: MathVerifier, gold: str, prediction: str, same: bool) -> None:
    verdict = math.verify(gold, prediction)
    assert verdict.won == same
    assert verdict.status in ((Status.CORRECT,) if same else (Status.WRONG, Status.UNPARSABLE)), verdict
