"""Imports point down: the rooms of the package, and what each may know of."""

from __future__ import annotations

import ast
import pathlib

import wings_jax

ROOT = pathlib.Path(wings_jax.__file__).parent
# room -> rooms that it may import from; single files below the root are rooms of their own
BASE = {"errors", "axes", "tree", "files", "formatting", "serialization"}
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "formatting": set(),
    "axes": {"errors"},
    "tree": {"errors", "formatting"},
    "cli": {"errors"},
    "hosts": {"errors"},
    "distributed": {"errors", "hosts"},
    "process": set(),
    "serialization": {"errors"},
    "config_files": set(),
    "config": {*BASE, "config_checks", "data", "model"},
    "config_checks": {*BASE, "config", "model"},  # config for its types only
    "checkpoint": {*BASE, "checkpoint_items", "checkpoint_steps", "checksums", "config", "model"},
    "checkpoint_items": {"checkpoint_steps", "checksums", "config", "model", "serialization"},
    "checkpoint_steps": {"errors", "files"},
    "checksums": set(),
    "model": BASE,
    "data": {*BASE, "model"},
    "scenes": {*BASE, "data"},
    "weights": {*BASE, "config", "checkpoint", "distributed", "model", "data"},
    "training": {
        *BASE,
        "checksums",
        "config",
        "config_checks",
        "checkpoint",
        "checkpoint_items",
        "model",
        "data",
        "scenes",
        "weights",
        "hosts",
    },
    "planning": {*BASE, "config", "model", "training"},
    "inference": {*BASE, "checkpoint", "distributed", "model", "data", "weights"},
    "evaluation": {
        *BASE,
        "checksums",
        "config",
        "checkpoint",
        "distributed",
        "model",
        "data",
        "scenes",
        "weights",
        "inference",
    },
    "analysis": {*BASE, "config", "checkpoint", "model", "data", "scenes", "inference"},
    "forgetting": {*BASE, "checkpoint", "scenes", "evaluation"},
}
# Entry points: one file each, or `__main__` of a room. They may import from every room.
ENTRIES = {"train", "plan", "convert", "generate", "chat", "evaluate", "analyze"}
# Command lines inside of a room, which use `cli` too.
COMMANDS = {
    "data/check.py",
    "data/prepare.py",
    "inference/flags.py",
    "evaluation/lm_eval_model.py",
}
# Of these, the ones that are entry points: they may import from every room too.
ROOM_ENTRIES = {"data/check.py"}


def imports(path: pathlib.Path) -> set[str]:
    """Returns the modules of this package that a file imports, without `wings_jax.`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "wings_jax":
            inner = node.module.removeprefix("wings_jax").lstrip(".")
            found |= {f"{inner}.{a.name}".lstrip(".") for a in node.names} if not inner else {inner}
            if inner and (ROOT / inner.replace(".", "/")).is_dir():
                found |= {f"{inner}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.startswith("wings_jax.")]
            found |= {name.removeprefix("wings_jax.") for name in names}
    return found


def files() -> dict[str, list[pathlib.Path]]:
    """Returns the files of each room."""
    rooms: dict[str, list[pathlib.Path]] = {}
    for path in ROOT.rglob("*.py"):
        if path.parent.name == "transformers_code":  # exported with a model, never imported
            continue
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        rooms.setdefault(room, []).append(path)
    return rooms


def test_every_room_imports_only_from_below():
    for room, paths in files().items():
        if room in ENTRIES or room == "__init__":
            continue
        for path in paths:
            name = path.relative_to(ROOT).as_posix()
            if name in ROOM_ENTRIES:
                continue
            is_command = path.name == "__main__.py" or name in COMMANDS
            allowed = MAY_IMPORT[room] | (
                {"cli", "config_files", "process"} if is_command else set()
            )
            used = {module.split(".")[0] for module in imports(path)} - {room}
            assert used <= allowed, f"{name} imports {sorted(used - allowed)}"


def test_nothing_imports_an_entry_point():
    for paths in files().values():
        for path in paths:
            if path == ROOT / "__init__.py":  # the public surface names them
                continue
            used = {name.split(".")[0] for name in imports(path)}
            assert not used & ENTRIES, f"{path.relative_to(ROOT)} imports {used & ENTRIES}"


def test_data_knows_of_the_model_only_its_layout():
    for path in files()["data"]:
        used = {name for name in imports(path) if name.startswith("model.")}
        assert used <= {"model.layout"}, f"{path.relative_to(ROOT)} imports {sorted(used)}"


def test_the_runtime_never_imports_torch():
    for paths in files().values():
        for path in paths:
            tops = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import)]
            names = {alias.name.split(".")[0] for node in tops for alias in node.names}
            assert "torch" not in names, path
