"""Settings of the tasks whose problems are texts, and how a wrong one is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from mcts.registry import nearest
from mcts.tasks.base import TaskSettingError
from mcts.verify.extract import KINDS


@dataclass(frozen=True, slots=True)
class TextSettings:
    """What every text task can be told; a task's class says which defaults it changes.

    Paths are taken from the working directory. A file is JSON Lines (one object per line) or, with the suffix
    .json, one array of objects.
    """

    # --- data ---
    path: str | None = None
    """One file, whose rows are put into splits by `split_field` or by hash; or a folder with train, dev (or
    valid, validation) and test (or heldout) files."""
    train: str | None = None
    """File of one split, beside or instead of `path`; likewise `dev` and `heldout`."""
    dev: str | None = None
    heldout: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    """Role (id, question, answer, solution, options) -> column of the file, or a text with {column}s in it."""
    split_field: str | None = None
    """Column of `path` that says train, dev (or valid, validation) or heldout (or test)."""
    dev_share: float = 0.05
    """Share of the training rows that is dev, chosen by a hash of the question, where no dev file is given."""
    heldout_share: float = 0.2
    """Share of the rows of a single file `path` that is held out, chosen likewise."""
    train_problems: int | None = None
    """At most so many problems of a split, the same ones each time (lowest hash first); None: all."""
    dev_problems: int | None = None
    heldout_problems: int | None = None
    bad_rows: str = "error"
    """"error": a row that cannot be used is an error that names it. "skip": it is left out, and counted in `notes`."""

    # --- prompt ---
    chat: bool = False
    """True: chat messages, for models with a chat template. False: plain text."""
    system: str | None = None
    """System message (chat), or text before everything else (plain)."""
    template: str = "Question: {question}\nAnswer:\n"
    """The user's message, or the plain prompt. {name} is a role or a column; {{name}} is the text "{name}"."""
    few_shot: int | tuple[Mapping[str, Any], ...] = 0
    """So many worked training rows before the problem (they leave the training split), or examples with the columns
    of a row; an example without a solution shows its answer alone."""

    # --- steps ---
    delimiter: str = "\n"
    max_steps: int = 16
    max_step_tokens: int = 128
    thinking: tuple[str, str] | None = ("<think>", "</think>")
    """Tags of a thinking block: no answer is read before its end. None: there is no such thing."""

    # --- answer ---
    final: str = "The answer is {answer}."
    """The last step of a worked solution that does not state its answer behind a marker itself; {answer} is put in,
    everything else stays as it is."""
    kind: str = "math"
    """What an answer is: math, number, choice or exact (see `mcts.verify.extract`). Where only a verifier of one of
    these names is given, that."""
    verifier: Mapping[str, Any] = field(default_factory=lambda: {"name": "math"})
    """Registered name or dotted path, with the verifier's own settings."""

    # --- warm-up ---
    negatives: int = 1
    """Lost examples per worked solution, where the gold answers allow sound ones."""
    seed: int = 0
    """Of the few-shot rows."""


def text_settings(task: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> TextSettings:
    """The checked settings of a task: `given` over `defaults` over those of `TextSettings`.

    Lists (YAML has no tuples) become tuples; `fields` and `verifier` are laid over the task's own, key by key; a
    verifier may be given by its name alone. Raises TaskSettingError in one sentence.
    """
    known = [f.name for f in fields(TextSettings)]
    for key in given:
        if key not in known:
            raise TaskSettingError(f"task {task!r} has no setting {key!r}{nearest(key, known)}")
    both = {**defaults, **given}
    both["fields"] = {**defaults.get("fields", {}), **_texts(task, "fields", given.get("fields"))}
    both["verifier"] = _verifier(task, defaults.get("verifier", {"name": "math"}), given.get("verifier"))
    if "kind" not in given and "verifier" in given and both["verifier"]["name"] in KINDS:
        both["kind"] = both["verifier"]["name"]
    if isinstance(both.get("thinking"), list):
        both["thinking"] = tuple(both["thinking"])
    shots = both.get("few_shot", 0)
    if isinstance(shots, list | tuple):
        for number, shot in enumerate(shots, start=1):
            if not isinstance(shot, Mapping):
                raise TaskSettingError(f"{task}: few_shot example {number} must have the fields of a row, not {shot!r}")
        both["few_shot"] = tuple(shots)
    made = replace(TextSettings(), **both)
    _check(task, made)
    return made


def _texts(task: str, name: str, value: object) -> dict[str, str]:
    """A mapping of texts; None is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(k, str) and isinstance(v, str) for k, v in value.items()):
        raise TaskSettingError(f"{task}: {name} must map names to texts, not {value!r}")
    return dict(value)


def _verifier(task: str, default: Mapping[str, Any], given: object) -> dict[str, Any]:
    if given is None:
        return dict(default)
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping) or not isinstance(given.get("name", default["name"]), str):
        raise TaskSettingError(f"{task}: verifier must be a name, or a mapping with a name and settings, not {given!r}")
    same = given.get("name", default["name"]) == default["name"]
    return {**default, **given} if same else dict(given)


def _check(task: str, settings: TextSettings) -> None:
    for name in ("path", "train", "dev", "heldout", "split_field", "system"):
        value = getattr(settings, name)
        if value is not None and (not isinstance(value, str) or not value):
            raise TaskSettingError(f"{task}: {name} must be a text, not {value!r}")
    for name in ("template", "delimiter", "final", "kind"):
        value = getattr(settings, name)
        if not isinstance(value, str) or not value:
            raise TaskSettingError(f"{task}: {name} must be a text that is not empty, not {value!r}")
    for name in ("dev_share", "heldout_share"):
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
            raise TaskSettingError(f"{task}: {name} must be at least 0 and below 1, not {value!r}")
    if settings.dev_share + settings.heldout_share >= 1.0:
        raise TaskSettingError(f"{task}: dev_share and heldout_share leave nothing to train on: lower them")
    for name, least in (("max_steps", 1), ("max_step_tokens", 1), ("negatives", 0), ("seed", 0)):
        _whole(task, name, getattr(settings, name), least)
    for name in ("train_problems", "dev_problems", "heldout_problems"):
        if getattr(settings, name) is not None:
            _whole(task, name, getattr(settings, name), 1)
    if not isinstance(settings.chat, bool):
        raise TaskSettingError(f"{task}: chat must be true or false, not {settings.chat!r}")
    if settings.bad_rows not in ("error", "skip"):
        raise TaskSettingError(f"{task}: bad_rows must be 'error' or 'skip', not {settings.bad_rows!r}")
    if not isinstance(settings.few_shot, tuple):
        _whole(task, "few_shot", settings.few_shot, 0)
    _check_thinking(task, settings)


def _whole(task: str, name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise TaskSettingError(f"{task}: {name} must be a whole number of at least {least}, not {value!r}")


def _check_thinking(task: str, settings: TextSettings) -> None:
    tags: object = settings.thinking
    if tags is None:
        return
    if not isinstance(tags, tuple) or len(tags) != 2 or not all(isinstance(tag, str) and tag for tag in tags):
        raise TaskSettingError(f"{task}: thinking must be an opening and a closing tag, or null, not {tags!r}")
    for tag in tags:
        if settings.delimiter in tag:
            raise TaskSettingError(f"{task}: the delimiter {settings.delimiter!r} would cut the tag {tag!r} in two")
