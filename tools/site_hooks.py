"""Hooks of mkdocs: pages that come from other files of the repository.

index, contributing and changelog are README.md, CONTRIBUTING.md and CHANGELOG.md with their links
rewritten; the reference of configs is generated from `wings_jax/config.py` and `configs/*.py`.
"""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import sys
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
    if name in INCLUDED:
        markdown = (ROOT / INCLUDED[name]).read_text(encoding="utf-8")
        for link, replacement in LINKS.items():
            markdown = markdown.replace(link, replacement)
    elif name == "configs.md":
        markdown = markdown.replace(FILES, config_files()).replace(LEAVES, config_leaves())
    return markdown


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

    sys.path.pop(0)
    return "\n\n".join(_section(config, config.Config, "config"))


def _section(config: Any, section: Any, prefix: str) -> list[str]:
    documentation = getattr(config, "field_docs", lambda _: {})(section)
    rows, below = ["| key | type | default | meaning |", "|---|---|---|---|"], []
    for field in dataclasses.fields(section):
        key = f"{prefix}.{field.name}"
        default = _default(field)
        if dataclasses.is_dataclass(default):
            below += _section(config, type(default), key)
            continue
        text = " ".join(documentation.get(field.name, "").split()).replace("|", "\\|")
        kind = str(field.type).replace("|", "\\|")
        rows.append(f"| `{key}` | `{kind}` | `{default!r}` | {text} |")
    title = f"## `{prefix}`\n\n{(section.__doc__ or '').partition(chr(10))[0]}"
    return [title, "\n".join(rows), *below]


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if callable(field.default_factory) else ""
