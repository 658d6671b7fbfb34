"""Parts that a user names in a config: a registered name, or a dotted path to a class of the user's own."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping

from mcts.types import SettingError


def load(
    noun: str,
    name: str,
    registered: Mapping[str, str],
    settings: Mapping[str, object],
    error: type[SettingError],
    method: str,
) -> object:
    """Make the part (`noun` says what it is: "task") `name` with `settings`. `registered`: name -> dotted path;
    `method`: what every such part can do.

    Raises `error` in one sentence: no such part or setting (naming the nearest one), a setting that is missing, a part
    of another kind. What the part's own constructor raises passes through.
    """
    path = registered.get(name, name)
    module_name, dot, attribute = path.rpartition(".")
    if not dot or path.startswith("."):
        raise error(f"there is no {noun} {name!r}{nearest(name, registered)}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        if missing.name is None or not (module_name + ".").startswith(missing.name + "."):
            raise  # the part's module exists, one that it imports does not
        raise error(f"{noun} {name!r}: there is no module {missing.name!r} to import") from missing
    maker = getattr(module, attribute, None)
    if not callable(maker):
        near = nearest(attribute, [key for key, value in vars(module).items() if callable(value)])
        raise error(f"{noun} {name!r}: module {module_name!r} has no class {attribute!r}{near}")
    try:
        signature = inspect.signature(maker)
    except ValueError as missing:  # a class of C that does not say what it takes
        raise error(f"{noun} {name!r} is no {noun}: give the dotted path of a class") from missing
    objection = _objection(signature, settings)
    if objection:
        raise error(f"{noun} {name!r} {objection}")
    made: object = maker(**settings)
    if not callable(getattr(made, method, None)):
        raise error(f"{noun} {name!r} is no {noun}: it has no method {method!r}")
    return made


def _objection(signature: inspect.Signature, settings: Mapping[str, object]) -> str:
    """What is wrong with the names of `settings`, as the end of a sentence; empty if nothing."""
    parameters = signature.parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in settings:
            if key not in named:
                return f"has no setting {key!r}{nearest(key, named)}"
    for p in parameters:
        if p.name in named and p.default is p.empty and p.name not in settings:
            return f"needs the setting {p.name!r}"
    return ""


_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def wrong_kind(maker: Callable[..., object], settings: Mapping[str, object]) -> str:
    """The first of `settings` that is not what its annotation says (int, float, bool, str, or None beside them), as the
    end of a sentence; empty if there is none. A float must be finite; other annotations are the maker's to check."""
    annotations = {name: str(p.annotation) for name, p in inspect.signature(maker).parameters.items()}
    for key, value in settings.items():
        names = [name.strip() for name in annotations.get(key, "").split("|")]
        if any(name not in _KINDS and name != "None" for name in names) or (value is None and "None" in names):
            continue
        kinds = [kind for name in names for kind in _KINDS.get(name, ())]
        fits = isinstance(value, tuple(kinds)) and (not isinstance(value, bool) or bool in kinds)
        if not fits or (isinstance(value, float) and not math.isfinite(value)):
            return f"{key} must be {' or '.join(names)}, not {value!r}"
    return ""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that names the nearest known word, or all of them where none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f": did you mean {near[0]!r}?"
    return f": choose one of {', '.join(known)}" if known else ""
