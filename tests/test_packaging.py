"""The package as it is installed: dependencies, the `wings` command, configs in the wheel."""

from __future__ import annotations

import ast
import importlib
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import types
import venv
from collections.abc import Iterator

import pytest
import training_cases as cases

import wings_jax
from wings_jax import cli, config_files

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Import name -> distribution, where they differ.
DISTRIBUTIONS = {
    "absl": "absl-py",
    "google": "google-auth",
    "orbax": "orbax-checkpoint",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
}
# Imported below a function whose error has the command to install it, or by a user's `.bin` files
# only. aiohttp and google-auth come with gcsfs.
OPTIONAL = {
    *("lm-eval", "torch", "gguf", "tensorflow", "tokamax", "wandb"),
    *("gcsfs", "aiohttp", "google-auth"),
}
# Needed without an import of ours: array_record is what tensorflow-datasets reads shards with,
# jinja2 renders chat templates, and sentencepiece with protobuf reads `tokenizer.model`, both
# inside transformers.
INDIRECT = {"array-record", "jinja2", "sentencepiece", "protobuf", "pyarrow"}
STANDARD = frozenset(sys.stdlib_module_names)


def requirements(name: str) -> dict[str, str]:
    """Returns distribution name -> line of a requirements file."""
    lines = [line.partition(" #")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    wanted = [line for line in lines if line and not line.startswith(("#", "-"))]
    return {re.split(r"[<>=!;\[ ]", line)[0].lower().replace("_", "-"): line for line in wanted}


def imported_modules() -> set[str]:
    """Returns the top-level names that the package and the configs import anywhere."""
    modules = set()
    for path in [*(ROOT / "wings_jax").rglob("*.py"), *(ROOT / "configs").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.split(".")[0])
    return modules - STANDARD - {"wings_jax", "configs"}


def test_every_import_is_a_declared_dependency():
    used = {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in imported_modules()}
    declared = set(requirements("requirements.txt"))
    assert used - OPTIONAL <= declared
    assert declared <= used | INDIRECT


def test_extras_agree_with_the_requirements_files():
    extras = PROJECT["project"]["optional-dependencies"]
    development = requirements("requirements-dev.txt")
    assert sorted(line.replace('"', "'") for line in development.values()) == sorted(extras["dev"])
    assert set(extras["docs"]) <= set(extras["dev"])
    assert set(extras["convert"]) <= set(extras["dev"])
    assert extras["gpu"] == extras["cuda13"]
    assert {"cuda12", "cuda13", "tpu"} <= set(extras)


def test_pins_of_hooks_and_workflow_agree_with_the_requirements():
    development = requirements("requirements-dev.txt")
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert f"rev: v{development['ruff'].partition('==')[2]}\n" in hooks
    assert "mypy==" in development["mypy"]  # its hook runs the installed one
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "./launch/test.sh" in workflow  # which installs requirements-dev.txt
    for version in ("3.11", "3.13"):
        assert f'"{version}"' in workflow


def test_packages_are_all_listed():
    parents = {path.parent for path in (ROOT / "wings_jax").rglob("*.py")}
    parents.discard(ROOT / "wings_jax" / "weights" / "transformers_code")  # data
    names = {".".join(parent.relative_to(ROOT).parts) for parent in parents}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == names | {"wings_jax.configs"}
    assert (ROOT / "wings_jax" / "py.typed").is_file()


def test_every_subcommand_is_a_module_with_a_main():
    for module, _ in cli.COMMANDS.values():
        assert callable(importlib.import_module(module).main), module


def run_wings(*arguments: str) -> subprocess.CompletedProcess:
    """Runs the console command with its modules imported from this checkout."""
    code = "from wings_jax.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_help_lists_the_commands_without_importing_jax():
    code = (
        "import sys; from wings_jax import cli; sys.argv = ['wings', '--help']; cli.main();"
        "print(sorted({'jax', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.splitlines()[-1] == "[]"
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name} ", completed.stdout, re.MULTILINE)


def test_unknown_subcommand_is_one_line_with_a_suggestion():
    completed = run_wings("eval", "--checkpoint", "runs/stage2")
    assert completed.returncode == 2
    assert completed.stderr == (
        "wings: 'eval' is not a command; did you mean 'evaluate'? `wings --help` lists all "
        "commands\n"
    )


def test_errors_name_the_command_that_was_typed():
    completed = run_wings("check", "nowhere.json")
    assert completed.returncode == 2
    assert completed.stderr.startswith("wings check: ")
    assert "nowhere.json" in completed.stderr
    assert len(completed.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["chat", "check", "convert", "train"])
def test_help_names_the_command_that_was_typed(command):
    completed = run_wings(command, "--help")
    assert completed.returncode == 0
    assert completed.stdout.startswith(f"usage: wings {command} ")


def test_a_config_on_disk_wins_over_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = str(config_files.shipped_directory() / "stage1.py")
    assert config_files.find_config("configs/stage1.py:qwen1_5_7b") == f"{shipped}:qwen1_5_7b"
    assert config_files.find_config("configs/stage9.py") == "configs/stage9.py"
    assert config_files.find_config("stage1.py") == "stage1.py"

    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "stage1.py").touch()
    assert config_files.find_config("configs/stage1.py") == "configs/stage1.py"


@pytest.fixture
def no_configs() -> Iterator[None]:
    """Removes the imported `configs` for one test, as in a process that has just started."""

    def remove() -> dict[str, types.ModuleType]:
        names = [name for name in sys.modules if name.split(".")[0] == "configs"]
        return {name: sys.modules.pop(name) for name in names}

    imported = remove()
    yield
    remove()
    sys.modules.update(imported)


def test_configs_import_each_other_from_any_directory(tmp_path, monkeypatch, no_configs):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "configs").mkdir(parents=True)
    config = tmp_path / "mine" / "configs" / "own.py"
    config.write_text("from configs import base\n")

    for argv in (["train", f"--config={config}:tiny"], ["train", "--config", f"{config}:tiny"]):
        assert config_files.resolve_flags(argv) == argv
    assert importlib.import_module("configs.own").base.SCENES == "runs/scenes"


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> pathlib.Path:
    """Returns the bin directory of an environment that has the dependencies, not wings_jax."""
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, with_pip=True)
    paths = sysconfig.get_paths(vars={"base": str(directory), "platbase": str(directory)})
    # A directory of packages that a .pth file names is searched, but its own .pth files are not
    # read: an editable installation of this checkout has no effect here.
    shared = pathlib.Path(sysconfig.get_paths()["purelib"])
    (pathlib.Path(paths["purelib"]) / "shared.pth").write_text(f"{shared}\n")
    return directory / "bin"


def run_in(environment: pathlib.Path, directory: pathlib.Path, *command: str) -> str:
    """Runs a command of the environment without this checkout; returns its output."""
    variables = {k: v for k, v in cases.one_device().items() if k != "PYTHONPATH"}
    completed = subprocess.run(
        [str(environment / command[0]), *command[1:]],
        cwd=directory,
        capture_output=True,
        text=True,
        env=variables,
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout


# Those with a command line; the other files are modules that they import.
BENCHMARKS = sorted(
    path.name for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()
)


@pytest.mark.slow
@pytest.mark.parametrize("script", BENCHMARKS)
def test_benchmarks_run_from_a_clone_that_is_not_installed(script, environment, tmp_path):
    if "\nimport torch\n" in (ROOT / "benchmarks" / script).read_text():
        pytest.importorskip("torch", reason="the benchmark compares with torch")
    assert "usage" in run_in(environment, tmp_path, "python", "-c", RUN_HELP, str(ROOT), script)


RUN_HELP = """
import runpy, sys
root, script = sys.argv[1:]
sys.argv = [script, "--help"]
try:
    runpy.run_path(f"{root}/benchmarks/{script}", run_name="__main__")
except SystemExit:
    print("usage: ok")
    import wings_jax
    assert wings_jax.__file__.startswith(root), wings_jax.__file__
"""


@pytest.mark.slow
def test_wheel_trains_from_an_empty_directory(environment, tmp_path):
    """`pip install .`, then the documented commands where there is no checkout."""
    install_wheel(environment, tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()

    # The second command resumes the run of the first, which has nothing more to do.
    train = ["--config=configs/stage1.py", "--config.steps=1"]
    assert "runs/stage1" in run_in(environment, empty, "python", "-m", "wings_jax.train", *train)
    assert "runs/stage1" in run_in(environment, empty, "wings", "train", *train)

    version = PROJECT["project"]["version"]
    assert run_in(environment, empty, "wings", "--version") == f"wings_jax {version}\n"

    # A file on disk wins, and still finds the shipped configs that it imports.
    (empty / "configs").mkdir()
    (empty / "configs" / "stage1.py").write_text(
        "from configs import base\n\n\ndef get_config(preset='tiny'):\n"
        "    raise ValueError(f'own config after {base.SCENES}')\n"
    )
    completed = subprocess.run(
        [environment / "wings", "train", *train], cwd=empty, capture_output=True, text=True
    )
    assert completed.returncode == 2
    assert completed.stderr.splitlines()[-1] == (
        "wings train: --config: configs/stage1.py: own config after runs/scenes"
    )


def install_wheel(environment: pathlib.Path, directory: pathlib.Path) -> None:
    """Builds a wheel of this checkout without a network and installs it."""
    # Built from a copy: setuptools writes beside the sources.
    source = directory / "source"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "tests")
    shutil.copytree(ROOT, source, ignore=ignored)

    build = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--quiet", "--no-index"]
    subprocess.run([sys.executable, *build, "-w", str(directory), str(source)], check=True)
    shutil.rmtree(source)

    (wheel,) = directory.glob("wings_jax-*.whl")
    install = ["-m", "pip", "install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    run_in(environment, directory, "python", *install)


def test_this_suite_runs_against_this_checkout():
    assert pathlib.Path(wings_jax.__file__).parents[1] == ROOT
