"""The documentation: builds as a site without a network, and names files that exist."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

from wings_jax import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PATH = re.compile(r"(?<![\w/.-])((?:configs|launch|benchmarks|tests|tools|wings_jax)/[\w/.-]*\w)")


@pytest.mark.slow
def test_site_builds_without_broken_links(tmp_path):
    """mkdocs in strict mode: a broken link or anchor is an error."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: requirements-dev.txt")
    pytest.importorskip("material", reason="mkdocs-material is not installed: requirements-dev.txt")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed")

    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

    index = (tmp_path / "index.html").read_text()
    assert 'src="assets/layer.svg"' in index
    configs = (tmp_path / "configs" / "index.html").read_text()
    assert "config.optimizer.accumulation" in configs
    assert "configs/stage2.py" in configs
    api = (tmp_path / "api" / "index.html").read_text()
    assert "wings_jax.inference.generator.Generator" in api


def test_site_loads_nothing_from_other_hosts():
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=yaml.BaseLoader)
    assert config["theme"]["font"] == "false"
    assert not any("//" in str(config.get(key, "")) for key in ("extra_css", "extra_javascript"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_that_are_named_exist(page):
    for name in set(PATH.findall(page.read_text())):
        is_placeholder = name.startswith(("configs/NAME", "wings_jax/configs"))
        assert is_placeholder or list(ROOT.glob(f"{name}*")), f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_that_are_named_exist(page):
    modules = {module.removesuffix(".__main__") for module, _ in cli.COMMANDS.values()}
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    text = "\n".join(blocks)
    for name in re.findall(r"^(?:\$ )?wings ([a-z]+)", text, re.MULTILINE):
        assert name in cli.COMMANDS, f"{page.name}: wings {name}"
    for name in re.findall(r"python -m (wings_jax[\w.]*)", text):
        assert name in modules, f"{page.name}: python -m {name}"


def test_scripts_are_executable_and_short():
    for path in (ROOT / "launch").glob("*.sh"):
        assert len(path.read_text().splitlines()) <= 60, path.name
        assert os.access(path, os.X_OK) or path.name == "environment.sh", path.name
