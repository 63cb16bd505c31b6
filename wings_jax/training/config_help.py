"""What `train --help` prints: usage, presets, and every key of the config."""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Mapping
from typing import Any

from wings_jax import config as config_lib
from wings_jax.training.arguments import Arguments

USAGE = """\
usage: {program} --config=FILE[:PRESET] [--config.KEY=VALUE ...]
       [--data NAME=FILE[:IMAGES][@WEIGHT] ...] [--workdir=DIR]
       [--distributed] [--print_config] [--debug]

  --config=FILE[:PRESET]   Python file with get_config(preset), or the config.json of a run
  --config.KEY=VALUE       sets a leaf of the config; the keys are below
  --data NAME=FILE[:IMAGES][@WEIGHT]
                           trains on this data file instead of the config's; repeat it for several.
                           IMAGES is the directory of its images (default: that of FILE), WEIGHT
                           its share of the rows (for all files or for none)
  --workdir=DIR            directory of checkpoints and metrics (default: config.workdir)
  --distributed            join the other hosts of this job: a TPU slice, Slurm, Open MPI,
                           Kubernetes, or what JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
                           JAX_PROCESS_ID say; these flags have precedence over all of them:
  --coordinator_address=HOST:PORT --num_processes=N --process_id=K
  --print_config           print the config as JSON and exit
  --debug                  show the traceback of an error
  --help                   show this text; with --config, that config's values and presets
"""


def format_help(program: str, arguments: Arguments) -> str:
    """Returns usage, presets, and every leaf of the config with its value and documentation."""
    config = arguments.config or config_lib.default()
    lines = [USAGE.format(program=program)]
    if arguments.presets:
        presets = textwrap.fill(", ".join(arguments.presets), 96, initial_indent="  ")
        lines += ["Presets, --config=FILE:PRESET:", textwrap.indent(presets, "  "), ""]

    # Every leaf with its current value, and below it its documentation.
    lines.append("Keys of the config, --config.KEY=VALUE:")
    for key, value, doc in list_leaves(config_lib.Config, config.to_dict()):
        lines.append(f"  {key} = {value!r}")
        lines.append(textwrap.fill(doc, 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


def list_leaves(
    kind: Any, values: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, str]]:
    """Returns (key, value, documentation) of all leaves below a dataclass of the config."""
    hints, docs = typing.get_type_hints(kind), field_docs(kind)
    leaves: list[tuple[str, Any, str]] = []
    for field in dataclasses.fields(kind):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        # A source of a config file need not have all keys.
        value = values.get(field.name, field.default)
        # A mapping whose values are dataclasses, such as data.sources.
        is_mapping = typing.get_origin(hint) is collections.abc.Mapping
        entry: Any = typing.get_args(hint)[1] if is_mapping else None

        if dataclasses.is_dataclass(hint):
            leaves += list_leaves(hint, value, f"{key}.")
        elif dataclasses.is_dataclass(entry):
            leaves.append((f"{key}.NAME", ", ".join(value), docs[field.name]))
            # The leaves of its first entry stand for those of all.
            for name in list(value)[:1]:
                leaves += list_leaves(entry, value[name], f"{key}.{name}.")
        else:
            leaves.append((key, value, docs[field.name]))
    return leaves


def field_docs(kind: type) -> dict[str, str]:
    """Returns field -> the string literal below its declaration, of a dataclass, in one line.

    >>> field_docs(config_lib.MeshConfig)["data"]
    'Replicas of the parameters; each takes a share of the batch.'
    """
    # The source, because string literals below fields are not kept at run time.
    (declared,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(declared, ast.ClassDef)

    # A field is documented by the string literal below it.
    docs = {}
    for field, below in zip(declared.body, declared.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            docs[ast.unparse(field.target)] = " ".join(ast.literal_eval(below.value).split())
    return docs
