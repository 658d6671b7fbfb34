"""The figures of `bench_gpu` for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from selfplay.plan import GIB, Load


def rows_table(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(title=title, show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def machine_table(about: dict[str, Any]) -> Table:
    return rows_table(
        f"{about['device']}, torch {about['torch']}",
        [
            ("model", about["model"]),
            ("large copy, read and written", f"{about['bandwidth'] / 1e12:.2f} TB/s"),
            ("large bfloat16 product", f"{about['rate'] / 1e12:.0f} TFLOP/s"),
        ],
    )


def decode_table(decode: dict[str, Any]) -> Table:
    def shown(case: dict[str, float]) -> str:
        return ", ".join(f"{name} {milliseconds:.2f}" for name, milliseconds in case.items())

    return rows_table("one decode forward, milliseconds", [(name, shown(case)) for name, case in decode.items()])


def play_table(play: dict[str, Any], plan: Load) -> Table:
    return rows_table(
        "play",
        [
            ("searches, steps, tokens drawn", f"{play['searches']}, {play['steps']:,}, {play['drawn']:,}"),
            ("tokens drawn per second", f"{play['tokens_per_second']:,.0f}"),
            ("of the bound of its forwards", f"{play['of_bound']:.1%}"),
            ("rows per forward, milliseconds per forward", f"{play['rows_per_forward']:.1f}, {milliseconds(play)}"),
            ("seconds in all, in the engine", seconds_text(play, "seconds", "poll_seconds")),
            ("seconds to load, of the first pass", seconds_text(play, "load_seconds", "first_pass_seconds")),
            *memory_rows(play["peak"], plan),
        ],
    )


def learn_table(learn: dict[str, Any], plan: Load) -> Table:
    return rows_table(
        "learn",
        [
            ("steps, tokens, seconds", f"{learn['steps']:.0f}, {learn['tokens']:,.0f}, {learn['seconds']:.1f}"),
            ("tokens per second, of the bound", f"{learn['tokens_per_second']:,.0f}, {learn['of_bound']:.1%}"),
            ("trained as trees", str(learn["tree_mask"])),
            ("engine's log-probabilities against the learner's, nats", f"{learn['logprob_gap']:.2g}"),
            *memory_rows(learn["peak"], plan),
        ],
    )


def trees_table(trees: dict[str, Any]) -> Table:
    return rows_table(
        "training whole trees and their paths",
        [
            *((f"{name}, useful tokens per second", f"{rate:,.0f}") for name, rate in trees["rates"].items()),
            ("trees over the faster way with paths", f"{trees['speedup']:.2f}"),
            ("tokens of paths over those of trees", f"{trees['path_tokens'] / trees['useful_tokens']:.2f}"),
            *((f"gradient difference, {name}", f"{gap:.2g}") for name, gap in trees["gradient_difference"].items()),
        ],
    )


def memory_rows(peak: dict[str, int], plan: Load) -> list[tuple[str, str]]:
    return [
        ("peak of tensors, plan, ratio (GiB)", f"{peak['allocated'] / GIB:.2f}, {plan.total / GIB:.2f}, "
                                               f"{peak['allocated'] / plan.total:.3f}"),
        ("held by the allocator (GiB)", f"{peak['reserved'] / GIB:.2f}"),
    ]  # fmt: skip


def milliseconds(play: dict[str, Any]) -> str:
    return f"{1000 * play['seconds'] / play['forwards']:.2f}"


def seconds_text(part: dict[str, Any], *names: str) -> str:
    return ", ".join(f"{part[name]:.2f}" for name in names)
