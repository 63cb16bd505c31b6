"""Where `--config=configs/NAME.py` is found: on disk, else the copy that ships with the package.

The configs of this project are in `configs/` at the root of the repository; a wheel carries them
as `wings_jax/configs/`. They import each other (`from configs import base`), so a package of this
name is registered whose modules come from several directories. The first that has a file wins:

1. the directory of the config that was asked for, if it is named `configs`
2. `configs/` in the current directory
3. the configs of this project
"""

from __future__ import annotations

import pathlib
import sys
import types
from collections.abc import Sequence

_PACKAGE = pathlib.Path(__file__).resolve().parent
NAME = "configs"
FLAG = "--config"


def shipped_directory() -> pathlib.Path:
    """Returns the directory of this project's configs, in a checkout or in an installed wheel."""
    installed = _PACKAGE / NAME
    return installed if installed.is_dir() else _PACKAGE.parent / NAME


def find_config(path: str) -> str:
    """Returns `path` if it exists, else the shipped config of that name, else `path` unchanged.

    `path` may end with `:preset`, which is returned with it. Only paths of the form
    `configs/NAME.py` refer to shipped configs.
    """
    file, colon, preset = path.partition(":")
    if pathlib.Path(file).exists():
        return path

    shipped = shipped_directory() / pathlib.PurePath(file).name
    is_shipped_form = pathlib.PurePath(file).parent == pathlib.PurePath(NAME)
    if not is_shipped_form or not shipped.is_file():
        return path  # the error message then has what the user typed

    return f"{shipped}{colon}{preset}"


def register_package(first: pathlib.Path | None = None) -> None:
    """Makes `from configs import base` work from any directory; `first` is searched first.

    A package `configs` that is already imported is not changed.
    """
    if NAME in sys.modules:
        return

    # A package with several directories: each of its modules comes from the first that has it.
    directories = [first, pathlib.Path(NAME).resolve(), shipped_directory()]
    package = types.ModuleType(NAME, "Configs, from the directories in __path__.")
    package.__path__ = [str(path) for path in dict.fromkeys(directories) if path is not None]
    sys.modules[NAME] = package


def resolve_flags(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with the path of `--config` resolved, and registers `configs`.

    Both `--config=PATH` and `--config PATH` are resolved.
    """
    resolved = list(argv)
    directory = None
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name not in (FLAG, FLAG[1:]):  # absl takes one dash or two
            continue

        if equals:
            path = find_config(value)
            resolved[i] = f"{name}={path}"
        elif i + 1 < len(argv):
            path = resolved[i + 1] = find_config(argv[i + 1])
        else:
            continue

        # The neighbors of a config are found before the shipped ones.
        parent = pathlib.Path(path.partition(":")[0]).resolve().parent
        directory = parent if parent.name == NAME else None

    register_package(directory)
    return resolved
