"""Pages: what a reader of the package may rely on, measured on its source.

Public names and fields are documented, class names are unique, functions are short and in
paragraphs, and the examples in the docstrings are true.
"""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import pathlib
import re
from collections.abc import Iterator

import pytest

import wings_jax

ROOT = pathlib.Path(wings_jax.__file__).parent
EXPORTED = "transformers_code"  # torch code that is shipped as data
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent.name != EXPORTED)
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]

MAX_LINES = 65  # of a function, with its docstring
LONG = 20  # lines of a body that must be in paragraphs
MIN_IN_PARAGRAPHS = 0.93  # of the functions with long bodies
# Verbs that need their object, as in `write_shards`; `checkpoint.load` is clear by its module.
VAGUE = {"build", "find", "load", "make", "place", "read", "write"}
CLEAR = {"checkpoint.py load"}
HOOKS = {"setup"}  # methods that a library calls, documented by it

Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def parse(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


@functools.cache
def lines_of(name: str) -> list[str]:
    return (ROOT / name).read_text(encoding="utf-8").splitlines()


def public_definitions(node: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    """Yields the public functions and classes of a module, and the methods of the classes."""
    for child in node.body:
        if not isinstance(child, Function | ast.ClassDef) or child.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef) and child.name in HOOKS:
            continue
        if any(ast.unparse(item).endswith("overload") for item in child.decorator_list):
            continue
        yield child
        if isinstance(child, ast.ClassDef):
            yield from public_definitions(child)


def functions_of(name: str) -> Iterator[Function]:
    """Yields every function of a file, also private and nested ones."""
    for node in ast.walk(parse(name)):
        if isinstance(node, Function):
            yield node


def has_fields(node: ast.ClassDef) -> bool:
    """Returns whether annotations in the class are fields: dataclass, flax module, NamedTuple."""
    bases = {ast.unparse(base).split(".")[-1] for base in node.bases}
    is_dataclass = any("dataclass" in ast.unparse(item) for item in node.decorator_list)
    return is_dataclass or bool(bases & {"Module", "NamedTuple"})


def undocumented_fields(node: ast.ClassDef, lines: list[str]) -> Iterator[str]:
    """Yields the fields without a word in the class docstring, a comment or a docstring."""
    words = set(re.findall(r"\w+", ast.get_docstring(node) or ""))
    for index, child in enumerate(node.body):
        if not isinstance(child, ast.AnnAssign) or not isinstance(child.target, ast.Name):
            continue
        name = child.target.id
        following = node.body[index + 1] if index + 1 < len(node.body) else None
        has_docstring = isinstance(following, ast.Expr) and isinstance(
            following.value, ast.Constant
        )
        has_comment = lines[child.lineno - 2].strip().startswith("#") or any(
            "  # " in line for line in lines[child.lineno - 1 : child.end_lineno]
        )
        is_documented = name in words or has_docstring or has_comment
        if not name.startswith("_") and not is_documented:
            yield name


def body_lines(node: Function, lines: list[str]) -> list[str]:
    """Returns the lines of a function's body without its docstring."""
    has_docstring = ast.get_docstring(node, clean=False) is not None and len(node.body) > 1
    first = node.body[1] if has_docstring else node.body[0]
    return lines[first.lineno - 1 : node.end_lineno]


def test_public_definitions_have_docstrings():
    missing = [name for name in NAMES if parse(name).body and not ast.get_docstring(parse(name))]
    for name in NAMES:
        for node in public_definitions(parse(name)):
            if not ast.get_docstring(node):
                missing.append(f"{name}:{node.lineno} {node.name}")
    assert not missing, "no docstring: " + "; ".join(missing)


def test_fields_of_public_classes_are_documented():
    missing = []
    for name in NAMES:
        for node in public_definitions(parse(name)):
            if isinstance(node, ast.ClassDef) and has_fields(node):
                for field in undocumented_fields(node, lines_of(name)):
                    missing.append(f"{name}:{node.lineno} {node.name}.{field}")
    assert not missing, "undocumented fields: " + "; ".join(missing)


def test_public_class_names_are_unique():
    files_by_class: dict[str, list[str]] = {}
    for name in NAMES:
        for node in public_definitions(parse(name)):
            if isinstance(node, ast.ClassDef):
                files_by_class.setdefault(node.name, []).append(name)
    repeated = {cls: files for cls, files in files_by_class.items() if len(files) > 1}
    assert not repeated


def test_function_names_have_an_object():
    vague = [
        f"{name} {node.name}"
        for name in NAMES
        for node in parse(name).body
        if isinstance(node, Function) and node.name in VAGUE
    ]
    assert set(vague) <= CLEAR


def test_functions_are_short():
    long = []
    for name in NAMES:
        for node in functions_of(name):
            size = node.end_lineno - node.lineno + 1
            if size > MAX_LINES:
                long.append(f"{name}:{node.lineno} {node.name} ({size} lines)")
    assert not long, f"more than {MAX_LINES} lines: " + "; ".join(long)


def test_long_functions_are_in_paragraphs():
    solid, count = [], 0
    for name in NAMES:
        for node in functions_of(name):
            body = body_lines(node, lines_of(name))
            if len(body) < LONG:
                continue
            count += 1
            if not any(not line.strip() for line in body):
                solid.append(f"{name}:{node.lineno} {node.name} ({len(body)} lines)")
    assert count > 50
    share = 1 - len(solid) / count
    assert share >= MIN_IN_PARAGRAPHS, f"{share:.0%} of {count}, not: " + "; ".join(solid)


@pytest.mark.parametrize("name", [name for name in NAMES if ">>>" in "\n".join(lines_of(name))])
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"wings_jax.{name.removesuffix('.py').replace('/', '.')}")
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_a_bare_class_would_be_found():
    """The checks above can fail."""
    source = "@dataclasses.dataclass\nclass Bare:\n    width: int\n    depth: int  # layers\n"
    node = ast.parse(source).body[0]
    assert has_fields(node)
    assert not ast.get_docstring(node)
    assert list(undocumented_fields(node, source.splitlines())) == ["width"]
