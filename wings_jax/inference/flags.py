"""Command-line flags that every command which generates has."""

from __future__ import annotations

import argparse
import dataclasses

from wings_jax import axes, checkpoint, cli, errors
from wings_jax.inference.generator import Generator
from wings_jax.inference.sampling import SamplingParams
from wings_jax.model import parameters


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which model answers, and how."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="workdir or checkpoint")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the matmuls")
    parser.add_argument("--mesh", help="share the model among devices, e.g. data=2,tensor=4")
    parser.add_argument("--system", default="", help="system text; default: the template's")
    drawn = parser.add_argument_group("how an answer is drawn (default: greedily)")
    for field in dataclasses.fields(SamplingParams):
        flag = f"--{field.name.replace('_', '-')}"
        if field.name == "stop":
            drawn.add_argument(flag, action="append", default=[], metavar="STRING")
        elif field.name == "logprobs":
            drawn.add_argument(flag, action="store_true", help="give each token's")
        else:
            kind = type(field.default)
            drawn.add_argument(flag, type=kind, default=field.default, help="default: %(default)s")
    parser.add_argument("--debug", action="store_true", help="show a mistake's traceback")


def open_generator(flags: argparse.Namespace, *, rows: int) -> Generator:
    """Returns the generator that the flags say. Raises UserError naming what does not fit."""
    dtype = flags.dtype or parameters.default_dtype()
    options = {"sampling": sampling_of(flags), "dtype": dtype, "rows": rows}
    cli.use_compilation_cache()
    mesh = axes.make_mesh(axes.parse_mesh(flags.mesh)) if flags.mesh else None
    with errors.full_memory("use --dtype bfloat16, or share the model among devices with --mesh"):
        restored = checkpoint.load(flags.checkpoint, dtype=dtype, mesh=mesh)
        return Generator.of(restored, mesh=mesh, **options)


def sampling_of(flags: argparse.Namespace) -> SamplingParams:
    """Returns the wishes that the flags say. Raises UserError for a value out of range."""
    wishes = {
        field.name: getattr(flags, field.name) for field in dataclasses.fields(SamplingParams)
    }
    return SamplingParams(**{**wishes, "stop": tuple(wishes["stop"])})
