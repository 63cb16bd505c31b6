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
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr

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


def code_of(page: pathlib.Path) -> str:
    """Returns the code blocks of a page, with continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return "\n".join(blocks).replace("\\\n", " ")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_that_are_named_exist(page):
    modules = {module.removesuffix(".__main__") for module, _ in cli.COMMANDS.values()}
    for command in re.findall(r"^(?:\$ )?wings ([a-z][a-z-]*)", code_of(page), re.MULTILINE):
        assert command in cli.COMMANDS, f"{page.name}: wings {command}"
    for module in re.findall(r"python -m (wings_jax[\w.]*)", code_of(page)):
        assert module in modules, f"{page.name}: python -m {module}"


def documented_flags() -> dict[tuple[str, ...], dict[str, str]]:
    """Returns command and subcommand -> {flag: page} of all commands in code blocks."""
    flags: dict[tuple[str, ...], dict[str, str]] = {}
    for page in PAGES:
        for line in re.findall(r"^wings ([a-z].*)$", code_of(page), re.MULTILINE):
            arguments = line.partition(" #")[0].split()
            if arguments[0] == "lm-eval":  # the flags are those of another program
                continue
            # `convert` and `analyze` have subcommands with flags of their own.
            length = 2 if arguments[0] in ("convert", "analyze") else 1
            of_command = flags.setdefault(tuple(arguments[:length]), {})

            for argument in arguments[length:]:
                flag = argument.partition("=")[0]
                if flag.startswith("--") and not flag.startswith("--config."):
                    of_command[flag] = page.name
    return flags


@pytest.mark.slow
def test_flags_that_are_named_exist():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    for command, flags in documented_flags().items():
        program = f"import sys; sys.argv = ['wings', *{command!r}, '--help']; "
        program += "from wings_jax.cli import main; main()"
        completed = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment
        )
        assert completed.returncode == 0, completed.stderr

        known_flags = set(re.findall(r"--[\w-]+", completed.stdout)) | {"--help"}
        missing = {flag: page for flag, page in flags.items() if flag not in known_flags}
        assert not missing, f"wings {' '.join(command)}"


def test_scripts_are_executable_and_short():
    for path in (ROOT / "launch").glob("*.sh"):
        assert len(path.read_text().splitlines()) <= 70, path.name
        assert os.access(path, os.X_OK) or path.name == "environment.sh", path.name
