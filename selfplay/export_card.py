"""The dataset card of an export: a README.md with the YAML header that the Hugging Face hub and `datasets` read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import yaml

CARD: Final = "README.md"
_MARK: Final = "<!-- selfplay export: {file} -->"
"""Says that a card is ours to replace, and which file it describes."""

_SIZES: Final = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))

_COLUMNS: Final = {
    "sft": "`prompt`, `completion`: a finished path of a search that a check or verifier called correct.",
    "preference": "`prompt`, `chosen`, `rejected`: two steps drawn at one node of a search tree, the best "
    "and the worst by value, at least `gap` apart. In a chat both are the assistant's message up to and with the step.",
    "stepwise": "`prompt`, `completions`, `labels`: a path, and per step whether a verified win lies at or below it in "
    "the tree. Steps that nothing below them judges are cut off. White space at the ends of steps is stripped: the "
    "trainer puts its own separator between them.",
    "prm": "`prompt`, `completions`, `values`: a path and a soft value in [0, 1] per step. (No column is "
    "called `labels`: TRL's PRMTrainer would cut the values to whole numbers.)",
}

_VALUE: Final = {
    "verified": "mean reward of the judged chains at or below the step, each counted as often as it was drawn",
    "search": "mean value that the search backed up at the step (value head and rewards together)",
}

_USE: Final = {
    "sft": "`SFTTrainer`",
    "preference": "`DPOTrainer`. TRL appends EOS to text, also where a step does not end the solution",
    "stepwise": "`trl.experimental.prm.PRMTrainer`, which TRL had up to 1.12",
    "prm": "any trainer with soft labels; read the value at each completion's last token",
}


def owns_card(text: str, file: str) -> bool:
    """Whether a card was made for `file`, and may be replaced."""
    return _MARK.format(file=file) in text


def card_text(facts: Mapping[str, Any], joiners: Mapping[str, str]) -> str:
    """The card of an export (`Export.data`). The same export gives the same text."""
    form, rows = facts["format"], facts["rows"]
    header = {
        "pretty_name": f"Search traces, {form}",
        "tags": ["selfplay", "tree-search", "reasoning", "trl", form],
        "size_categories": [next((name for limit, name in _SIZES if rows < limit), "n>1M")],
        "configs": [{"config_name": form, "data_files": facts["file"]}],
    }
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).rstrip(),
        "---",
        _MARK.format(file=facts["file"]),
        f"# Search traces as `{form}` rows",
        "",
        _COLUMNS[form],
        "",
        f"Made for {_USE[form]}.",
        "",
        "## How it was made",
        "",
        f"By `selfplay export --format {form}` from tree searches of mcts-selfplay, where a language model proposes "
        "the steps. The text is model output, as drawn; verdicts are those of the run's own checks and verifier.",
        "",
        f"- tasks: {', '.join(facts['tasks'])}",
        f"- runs: {', '.join(facts['runs'])}",
        f"- filter: {'`' + facts['where'] + '`' if facts['where'] else 'none'}",
    ]
    if form in ("preference", "prm"):
        lines.append(f"- value of a step: {_VALUE[facts['value']]} (`--value {facts['value']}`)")
    if form == "preference":
        lines.append(f"- least gap in value: {facts['gap']}")
    for task, joiner in joiners.items():
        if joiner:
            lines.append(f"- each step of {task} begins with {json.dumps(joiner)}, which the task puts between steps")
    lines += [
        "- nodes conditioned on more than their ancestors (revisions, hints), and what lies below them, are left out",
        "",
        "## Counts",
        "",
        "| | |",
        "|---|---|",
        f"| rows | {rows} |",
        f"| traces read | {facts['traces']} |",
        f"| traces that gave rows | {facts['traces_with_rows']} |",
        f"| equal rows left out | {facts['repeated']} |",
        f"| problems | {facts['problems']} |",
        *(f"| steps labelled {name} | {count} |" for name, count in facts.get("labels", {}).items()),
        f"| prompts | {'chat messages' if facts['chat'] else 'text'} |",
        f"| sha256 of {facts['file']} | `{facts['sha256']}` |",
        "",
    ]
    return "\n".join(lines)
