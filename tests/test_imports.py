"""Dependencies run one way (DESIGN.md, section 2): the imports of both packages are walked to prove it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MCTS_ROOMS: dict[str, set[str]] = {
    "types": set(),
    "rng": set(),
    "registry": {"types"},
    "budget": {"types"},
    "tree": {"types"},
    "verify": {"types", "registry"},
    "engines": {"types", "rng"},
    "tasks": {"types", "rng", "registry", "verify"},
    "waves": {"types"},
    "selection": {"types", "tree"},
    "policy": {"types", "tree", "selection"},
    "value": {"types", "tree", "waves"},
    "context": {"types", "rng", "budget", "tree", "waves", "policy", "value", "tasks.base"},
    "search": {"types", "rng", "budget", "tree", "waves", "policy", "value", "context", "tasks.base", "engines.base"},
    "strategies": {"types", "rng", "budget", "tree", "waves", "selection", "policy", "value", "search", "registry"},
}
"""What each room of mcts may import at run time, itself and its own files beside it."""

SELFPLAY_FLOORS: dict[str, int] = {
    "config": 0, "traces": 0, "columns": 0, "disk": 0,
    "shards": 1, "store": 2, "store_disk": 2, "s3": 2, "mirror": 2, "store_s3": 2,
    "heartbeat": 3, "retention": 3, "run_folder": 4, "repair": 5, "packing": 2, "objectives": 3, "inspect": 3,
    "grade": 3, "learner": 4, "group": 4, "phase": 4, "sharded": 4, "partial": 4,
    "worker": 4, "evaluate": 4, "checkpoint": 4, "plan_model": 4, "prm_model": 0, "export": 5, "export_prm": 5,
    "plan": 5, "loop": 5, "status": 5, "doctor": 5, "cluster": 6, "cli": 7,
    "behavior": 0, "side_rows": 0, "side_values": 3, "cutting": 2, "reanalyse": 4,
}  # fmt: skip
"""A room of selfplay imports rooms of its own floor or lower ones."""

TYPING_ONLY = {"types": {"budget", "tree"}, "value": {"context"}}
"""Imports for annotations alone, under TYPE_CHECKING."""


def modules(package: str) -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, *, top_level: bool = False, typing: bool = False) -> Iterator[str]:
    """Dotted names that a file imports at run time; only those met when it is loaded with `top_level`, only
    those under TYPE_CHECKING with `typing`."""

    def walk(node: ast.AST, guarded: bool) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            inside = guarded
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inside = True
            if top_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.Import) and inside == typing:
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and inside == typing:
                assert child.level == 0, f"{path}: relative import"
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            else:
                yield from walk(child, inside)

    yield from walk(ast.parse(path.read_text()), False)


def known(name: str, all_modules: dict[str, Path]) -> str | None:
    """The module that an imported name lives in, None outside our packages."""
    while name and name not in all_modules:
        name = name.rpartition(".")[0]
    return name or None


ALL = modules("mcts") | modules("selfplay")


@pytest.mark.parametrize("module", sorted(modules("mcts")))
def test_mcts_imports_neither_the_loop_nor_its_heavy_parts(module: str) -> None:
    banned = {"selfplay", "ray", "pyarrow"}
    if not module.startswith("mcts.engines."):
        banned |= {"torch", "transformers", "safetensors", "tokenizers"}
    elif module in ("mcts.engines.base", "mcts.engines.scripted"):
        banned |= {"torch", "transformers"}
    assert not {name.split(".")[0] for name in imports(ALL[module])} & banned


@pytest.mark.parametrize("module", sorted(set(modules("mcts")) - {"mcts"}))
@pytest.mark.parametrize("typing", [False, True])
def test_rooms_of_mcts_import_only_what_stands_before_them(module: str, typing: bool) -> None:
    room = module.split(".")[1]
    assert room in MCTS_ROOMS, f"say in MCTS_ROOMS what mcts/{room} may import"
    allowed = MCTS_ROOMS[room] | {room} | (TYPING_ONLY.get(room, set()) if typing else set())
    for name in imports(ALL[module], typing=typing):
        target = known(name, ALL)
        if target is None or target == "mcts":
            assert not name.startswith("mcts"), f"{module} imports the package itself; import from its rooms"
            continue
        parts = target.split(".")
        assert parts[1] in allowed or ".".join(parts[1:3]) in allowed, f"{module} must not import {target}"


@pytest.mark.parametrize("module", sorted(modules("selfplay")))
def test_rooms_of_selfplay_import_nothing_from_higher_floors(module: str) -> None:
    room = module.split(".")[1] if "." in module else ""
    floor = SELFPLAY_FLOORS.get(room)
    for name in imports(ALL[module]):
        if name.split(".")[0] == "ray":
            assert room == "cluster", f"{module} imports ray; only selfplay/cluster/ may"
        target = known(name, ALL)
        if floor is None or target is None or not target.startswith("selfplay."):
            continue
        other = target.split(".")[1]
        if other != room and other in SELFPLAY_FLOORS:
            assert SELFPLAY_FLOORS[other] <= floor, f"{module} must not import {target}"


def test_config_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "ray", "pyarrow", "tokenizers", "datasets", "matplotlib"}
    for module in ALL:
        if module == "selfplay.config" or module.startswith("selfplay.config."):
            assert not {name.split(".")[0] for name in imports(ALL[module])} & heavy


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {
        module: {t for name in imports(path, top_level=True) if (t := known(name, ALL)) not in (None, module)}
        for module, path in ALL.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import circle: {' -> '.join((*trail[trail.index(module) :], module))}"
        if module not in done:
            for target in graph[module]:
                visit(str(target), (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", ["mcts", "mcts.search", "mcts.strategies", "mcts.engines.scripted"])
def test_the_search_library_loads_neither_torch_nor_ray(module: str) -> None:
    code = f"import {module}, sys; print([m for m in ('torch', 'ray', 'pyarrow', 'transformers') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"
