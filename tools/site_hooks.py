"""Hooks of mkdocs: pages that come from other files of the repository.

index, contributing and changelog are README.md, CONTRIBUTING.md and CHANGELOG.md with their links
rewritten; the reference of configs is generated from `wings_jax/config.py` and `configs/*.py`.
"""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import sys
import typing
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
INCLUDED = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
# How links of files at the root of the repository read from inside docs/.
LINKS = {
    "](docs/": "](",
    "](README.md": "](index.md",
    "](CONTRIBUTING.md": "](contributing.md",
    "](CHANGELOG.md": "](changelog.md",
}
LEAVES = "<!-- config leaves -->"
FILES = "<!-- config files -->"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Returns the page's text with what it includes; mkdocs calls this for every page."""
    name = page.file.src_uri
    if name == "configs.md":
        return markdown.replace(FILES, config_files()).replace(LEAVES, config_leaves())
    if name not in INCLUDED:
        return markdown

    included = (ROOT / INCLUDED[name]).read_text(encoding="utf-8")
    for link, replacement in LINKS.items():
        included = included.replace(link, replacement)
    return included


def config_files() -> str:
    """Returns a table of configs/*.py: name and first line of the docstring."""
    rows = ["| config | what it trains |", "|---|---|"]
    for path in sorted((ROOT / "configs").glob("*.py")):
        summary = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        rows.append(f"| `configs/{path.name}` | {summary} |")
    return "\n".join(rows)


def config_leaves() -> str:
    """Returns a table of every config key: type, default and documentation."""
    sys.path.insert(0, str(ROOT))
    from wings_jax import config  # imports JAX, which only this page needs
    from wings_jax.training import config_help

    sys.path.pop(0)
    return "\n\n".join(_section(config_help, config.Config, "config"))


def _section(config_help: Any, section: Any, prefix: str) -> list[str]:
    documentation = config_help.field_docs(section)
    hints = typing.get_type_hints(section)
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    subsections: list[str] = []

    for field in dataclasses.fields(section):
        key = f"{prefix}.{field.name}"
        value_types = [t for t in typing.get_args(hints[field.name]) if dataclasses.is_dataclass(t)]
        if dataclasses.is_dataclass(hints[field.name]):  # a section of its own, after this one
            subsections += _section(config_help, hints[field.name], key)
            continue
        for value_type in value_types:  # a mapping from names to sections
            subsections += _section(config_help, value_type, f"{key}.NAME")

        # A bar would end the cell.
        meaning = " ".join(documentation[field.name].split()).replace("|", "\\|")
        type_name = str(field.type).replace("|", "\\|")
        rows.append(f"| `{key}` | `{type_name}` | `{_default(field)!r}` | {meaning} |")

    summary = (section.__doc__ or "").partition("\n")[0]
    return [f"## `{prefix}`\n\n{summary}", "\n".join(rows), *subsections]


def _default(field: dataclasses.Field) -> Any:
    if callable(field.default_factory):
        return field.default_factory()
    return field.default
