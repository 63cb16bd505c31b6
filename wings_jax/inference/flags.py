"""Command-line flags of all commands that generate."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from wings_jax import cli, process
from wings_jax.inference.sampling import SamplingParams

if TYPE_CHECKING:
    from wings_jax.inference.generator import Generator

# What `--help` shows for each field of SamplingParams.
SAMPLING_HELP = {
    "max_new_tokens": "the most tokens of an answer",
    "temperature": "0 takes the likeliest token",
    "top_k": "only the K likeliest tokens; 0 for all",
    "top_p": "only the likeliest tokens that together have this probability",
    "min_p": "only tokens at least this fraction as likely as the likeliest",
    "repetition_penalty": "above 1 makes tokens of prompt and answer less likely",
    "seed": "of the random draws",
    "stop": "a string that ends an answer; may be given several times",
    "logprobs": "print the log-probability of each token",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that select the model and how answers are sampled."""
    # Which model, and on which devices.
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a run's directory, or one of its steps"
    )
    parser.add_argument(
        "--adapter",
        metavar="FILE",
        help="of `convert export --format adapter`, put on the checkpoint's LLM and tower",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of weights and caches; default: bfloat16 on a GPU or TPU, float32 on a CPU",
    )
    parser.add_argument("--mesh", help="share the model among devices, e.g. data=2,tensor=4")
    parser.add_argument("--system", default="", help="system text; default: the template's")

    # One flag for each field, with its default.
    group = parser.add_argument_group("sampling (default: greedy)")
    for field in dataclasses.fields(SamplingParams):
        flag, text = f"--{field.name.replace('_', '-')}", SAMPLING_HELP[field.name]
        if field.name == "stop":
            group.add_argument(flag, action="append", default=[], metavar="TEXT", help=text)
        elif field.name == "logprobs":
            group.add_argument(flag, action="store_true", help=text)
        else:
            group.add_argument(
                flag,
                type=type(field.default),
                default=field.default,
                metavar="N",
                help=f"{text} (default: %(default)s)",
            )

    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def open_generator(flags: argparse.Namespace, *, rows: int) -> Generator:
    """Returns the generator of the flags. Raises UserError naming what does not fit."""
    # Slow to import, and --help needs none of it.
    from wings_jax import checkpoint, distributed
    from wings_jax.inference import loading
    from wings_jax.weights import adapter

    # A mistake in a flag is an error before the model is loaded.
    sampling = sampling_params(flags)

    cli.use_compilation_cache()
    process.run_in_caller_thread()

    # What one host of a job does not have is an error of all.
    with distributed.together():
        steps = [checkpoint.find_step(flags.checkpoint, flag="--checkpoint").name]
        if flags.adapter:
            steps.append(str(adapter.open_adapter(flags.adapter).step))
    distributed.check_same(steps, "checkpoints")

    generator = loading.load_generator(
        flags.checkpoint,
        adapter=flags.adapter,
        dtype=flags.dtype,
        mesh=flags.mesh,
        rows=rows,
        sampling=sampling,
        flag="--checkpoint",
    )
    process.keep_freed_memory()
    return generator


def sampling_params(flags: argparse.Namespace) -> SamplingParams:
    """Returns the sampling parameters of the flags. Raises UserError for a value out of range."""
    # One flag for each field, under the same name.
    values = {
        field.name: getattr(flags, field.name) for field in dataclasses.fields(SamplingParams)
    }
    return SamplingParams(**{**values, "stop": tuple(values["stop"])})
