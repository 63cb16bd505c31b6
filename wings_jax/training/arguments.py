"""The command line of a training run: a config, changes of its leaves, and its data files."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import importlib.util
import json
import pathlib
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from wings_jax import config as config_lib
from wings_jax import serialization
from wings_jax.data.settings import SourceConfig
from wings_jax.errors import UserError
from wings_jax.hosts import JobFlags

_TRUE, _FALSE = ("true", "t", "yes", "1"), ("false", "f", "no", "0")
# What a config file of a user may raise: each becomes one line.
_CONFIG_ERRORS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What a command line asks for."""

    config: config_dict.ConfigDict | None
    """The config with all changes; None where `--help` came without one."""
    presets: tuple[str, ...]
    """Names that may stand after `--config=FILE:`."""
    workdir: str
    """Value of --workdir; '' for that of the config."""
    distributed: bool
    """Whether to join the other hosts of the job."""
    job: JobFlags
    """What the command line gives of this job."""
    print_config: bool
    """Whether to print the config instead of training."""
    help: bool
    """Whether to print `format_help` instead of training."""


def parse(argv: Sequence[str]) -> Arguments:
    """Returns the arguments of a command line without its program.

    Raises:
      UserError: naming the flag, the config file or the key, and what is allowed.
    """
    # Leaves first: argparse does not define their names.
    changes, rest = _split_changes(argv)

    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-config", default="")
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--workdir", "-workdir", default="")
    parser.add_argument("--coordinator_address", default="")
    for flag in ("num_processes", "process_id"):
        parser.add_argument(f"--{flag}", type=int)
    for flag in ("distributed", "print_config", "debug"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    flags = parser.parse_args(rest)

    # `--help` alone lists the keys with their defaults.
    if not flags.config:
        if not flags.help:
            raise UserError("--config is missing: for instance --config=configs/stage1.py")
        return Arguments(None, (), "", False, JobFlags(), False, True)

    config, presets = load_config(flags.config)
    apply_changes(config, changes, [parse_data(text) for text in flags.data])

    # A flag of a job asks for the job.
    job = JobFlags(flags.coordinator_address, flags.num_processes, flags.process_id)
    joins = flags.distributed or job != JobFlags()
    return Arguments(config, presets, flags.workdir, joins, job, flags.print_config, flags.help)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)


def _split_changes(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Returns {key: text} of the `--config.KEY` arguments, and the other arguments.

    >>> _split_changes(["--config=a.py", "--config.steps=3", "--config.seed", "4", "--debug"])
    ({'steps': '3', 'seed': '4'}, ['--config=a.py', '--debug'])
    """
    changes: dict[str, str] = {}
    rest: list[str] = []
    arguments = list(argv)

    while arguments:
        argument = arguments.pop(0)
        match = re.fullmatch(r"--?(no)?config\.([^=]*)(=(.*))?", argument, re.DOTALL)
        if match is None:
            rest.append(argument)
            continue

        # --config.KEY=TEXT, --config.KEY TEXT, --config.KEY (true), --noconfig.KEY (false)
        negated, key, equals, text = match.groups()
        if not equals and not negated and arguments and not arguments[0].startswith("--"):
            text = arguments.pop(0)
        changes[key] = "false" if negated else "true" if text is None else text
    return changes, rest


def load_config(flag: str) -> tuple[config_dict.ConfigDict, tuple[str, ...]]:
    """Returns the config that `FILE[:PRESET]` names, open for changes, and the file's presets.

    A JSON file, or the workdir that it is in, is the config of an earlier run.

    Raises:
      UserError: naming the file and what is wrong in it.
    """
    name, _, preset = flag.partition(":")
    path = pathlib.Path(name)

    # The config of an earlier run.
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json":
        return _load_json(path), ()

    if not path.is_file():
        raise UserError(f"--config: {name} does not exist")

    # A Python file is executed: it may raise anything that its author did.
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config: {name} is not a Python or JSON file")
    module = importlib.util.module_from_spec(spec)

    try:
        spec.loader.exec_module(module)
        config = module.get_config(preset) if preset else module.get_config()
    except _CONFIG_ERRORS as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--config: {name}: {detail}") from error

    if not isinstance(config, config_dict.ConfigDict):
        raise UserError(f"--config: {name}: get_config() returned {type(config).__name__}")

    # Presets are of the file itself, or of the base that it edits.
    shared = getattr(module, "base", None)
    return config, tuple(getattr(module, "PRESETS", getattr(shared, "PRESETS", ())))


def _load_json(path: pathlib.Path) -> config_dict.ConfigDict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--config: {path}: {reason}") from error
    return config_lib.to_tree(serialization.from_dict(config_lib.Config, content, str(path)))


def parse_data(text: str) -> tuple[str, dict[str, Any]]:
    """Returns name and leaves of the source that `--data` gives.

    >>> parse_data("llava=mix665k.json:images@0.5")
    ('llava', {'path': 'mix665k.json', 'images': 'images', 'weight': 0.5, 'split': 'train'})
    >>> parse_data("mine=gs://data/mine.jsonl:gs://data/images")[1]["images"]
    'gs://data/images'

    Raises:
      UserError: there is no name or no file.
    """
    name, _, location = text.partition("=")

    # The weight is after the last @, since a path may have one.
    weighted = re.fullmatch(r"(.*)@([0-9.eE+-]+)", location, re.DOTALL)
    weight = 0.0
    if weighted:
        location = weighted[1]
        try:
            weight = float(weighted[2])
        except ValueError as error:
            raise UserError(f"--data {text}: {weighted[2]!r} is not a weight") from error

    # The colon of gs:// is none between the two paths.
    path, *rest = re.split(r":(?!//)", location, maxsplit=1)
    images = rest[0] if rest else ""
    if not re.fullmatch(r"\w[\w-]*", name) or not path:
        raise UserError(f"--data {text}: the form is NAME=FILE[:IMAGES][@WEIGHT]")

    return name, {"path": path, "images": images, "weight": weight, "split": "train"}


def apply_changes(
    config: config_dict.ConfigDict,
    changes: Mapping[str, str],
    data: Sequence[tuple[str, dict[str, Any]]] = (),
) -> None:
    """Sets leaves from text, {'optimizer.name': 'muon'}, and the sources of `--data`.

    Sources of the embedded data set follow `data.scenes` to another directory. A source with
    another path has another image directory too: that of the new file, unless it is set.

    Raises:
      UserError: naming the key, the text and its type.
    """
    scenes = config.data.scenes
    defaults = dataclasses.asdict(SourceConfig())
    with config.unlocked():
        if data:
            config.data.sources = config_dict.ConfigDict(dict(data), sort_keys=False)

        # Everything is checked before the first leaf is set.
        values = {}
        for former_key, text in changes.items():
            key, kind = find_leaf(former_key)
            values[key] = _from_text(text, kind, f"--config.{key}")

        # Mappings that do not exist yet are created on the way, a source with its defaults.
        for key, value in values.items():
            *parents, leaf = key.split(".")
            node = config
            for i, name in enumerate(parents):
                if name not in node:
                    is_source = parents[:i] == ["data", "sources"]
                    node[name] = config_dict.ConfigDict(defaults if is_source else {})
                node = node[name]
            node[leaf] = value

        # Sources of the scenes follow them to another directory.
        for name, source in config.data.sources.items():
            changed = {leaf for leaf in source if f"data.sources.{name}.{leaf}" in values}
            if "path" in changed and "images" not in changed:
                source.images = ""
            for leaf in {"path", "images"} - changed:
                source[leaf] = _move(source[leaf], scenes, config.data.scenes)

        if not any(_is_inside(s.path, config.data.scenes) for s in config.data.sources.values()):
            config.data.scenes = ""  # no source needs it


def _is_inside(path: str, directory: str) -> bool:
    return bool(directory) and pathlib.PurePath(path).is_relative_to(directory)


def _move(path: str, source: str, target: str) -> str:
    """Returns a path inside of `source` as the same path inside of `target`."""
    if not target or not _is_inside(path, source):
        return path
    return str(pathlib.PurePath(target) / pathlib.PurePath(path).relative_to(source))


def find_leaf(key: str) -> tuple[str, Any]:
    """Returns the current name and the type of a leaf of the config.

    >>> find_leaf("optimizer.b1")
    ('optimizer.b1', <class 'float'>)

    Raises:
      UserError: there is no such key; the message has the nearest one.
    """
    kind: Any = config_lib.Config
    names: list[str] = []

    for name in key.split("."):
        # A field of a dataclass, or any name in a mapping (sources, groups).
        if dataclasses.is_dataclass(kind):
            name = serialization.current_name(typing.cast(type, kind), name)
            hints = typing.get_type_hints(kind)
            if name not in hints:
                path = ".".join(["--config", *names, name])
                nearest = difflib.get_close_matches(name, hints, 1)
                listed = f"did you mean {nearest[0]}?" if nearest else f"there are {sorted(hints)}"
                raise UserError(f"{path}: no such key; {listed}")
            kind = hints[name]
        elif typing.get_origin(kind) is not None and issubclass(typing.get_origin(kind), Mapping):
            kind = typing.get_args(kind)[1]
        else:
            raise UserError(f"--config.{key}: config.{'.'.join(names)} has no keys")

        names.append(name)
    return ".".join(names), kind


def _from_text(text: str, kind: Any, key: str) -> Any:
    """Returns the value that a leaf of this type has on the command line."""
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in (*_TRUE, *_FALSE):
            raise UserError(f"{key}: {text!r} is not true or false")
        return text.lower() in _TRUE
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError as error:
            raise UserError(f"{key}: {text!r} is not of type {kind.__name__}") from error

    # Tuples and mappings are Python literals; names may stand without quotes.
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = [part.strip() for part in text.strip("()[] ").split(",") if part.strip()]
    if typing.get_origin(kind) is tuple and not isinstance(value, (list, tuple)):
        value = (value,)
    return serialization.to_dict(serialization.from_dict(kind, value, key))
