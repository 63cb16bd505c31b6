"""Plans a training step without running it: memory, operations, collectives, time, largest batch.

    python -m wings_jax.plan --config=configs/stage2.py:qwen1_5_7b --topology=v5p:2x2x2
    python -m wings_jax.plan --config=configs/stage2.py:qwen1_5_7b --devices=8 --chip=h100

Nothing is allocated: the step of `wings_jax.train` is compiled from shapes. For a TPU topology
(`--topology`, needs libtpu but no TPU) by the TPU's compiler; for GPUs and others (`--devices`) by
the CPU's, for as many virtual devices, which stands for theirs.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import typing

from wings_jax import cli, config_files, errors, files
from wings_jax import config as config_lib
from wings_jax.errors import UserError
from wings_jax.planning import compiled, report, targets
from wings_jax.training import arguments, chips
from wings_jax.weights import starting

PROGRAM = cli.program_name("wings_jax.plan")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of this command's own flags; the others are those of `train`."""
    parser = _Parser(
        prog=cli.program_name("wings_jax.plan"),
        description=__doc__.split("\n\n")[0],
        epilog="--config=FILE[:PRESET] and --config.KEY=VALUE are as in wings_jax.train.",
        allow_abbrev=False,
    )

    # The target.
    parser.add_argument(
        "--topology", default="", help="TPU slice: v5p:2x2x2, v5litepod-16, v6e-8, ..."
    )
    parser.add_argument("--devices", type=int, default=1, help="virtual devices (default 1)")
    parser.add_argument("--chip", default="", help=f"what a device is: {', '.join(chips.CHIPS)}")
    parser.add_argument(
        "--hbm", type=float, default=0.0, help="GiB of one device (default: the chip's)"
    )

    # What is done and written.
    parser.add_argument(
        "--fit", action="store_true", help="find the largest batch: 3 or more compilations"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="only what follows from shapes; seconds"
    )
    parser.add_argument("--json", default="", help="file that the plan is written to")
    return parser


def main() -> None:
    """Prints the plan of what the command line describes."""
    flags, rest = make_parser().parse_known_args(sys.argv[1:])
    options = arguments.parse(config_files.resolve_flags(rest))
    if options.workdir or options.distributed:
        raise UserError("--workdir and --distributed: nothing is trained; leave them out")
    config = config_lib.from_config_dict(options.config)
    check_flags(flags)

    # Devices before anything else: JAX counts them once.
    if flags.topology:
        target = targets.open_topology(flags.topology)
    else:
        target = targets.open_devices(flags.devices, flags.chip, flags.hbm)
    cli.use_compilation_cache()
    config = compiled.resolve_config(config, target)
    arch = starting.resolve_arch(config.model)

    with errors.full_memory("compile fewer rows (--config.batch_size), or use --no-compile"):
        plan = report.make_plan(
            config,
            arch,
            target,
            is_compiled=not flags.no_compile,
            find_fit=flags.fit,
            report=lambda line: print(line, file=sys.stderr, flush=True),
        )

    # The plan goes to standard output, progress to standard error.
    print(report.format_plan(plan))
    if flags.json:
        files.write_json(pathlib.Path(flags.json), report.to_json(plan))


def check_flags(flags: argparse.Namespace) -> None:
    """Raises UserError for flags that exclude each other."""
    if flags.topology and (flags.devices != 1 or flags.chip or flags.hbm):
        raise UserError("--topology: has its own devices; leave out --devices, --chip and --hbm")
    if flags.fit and flags.no_compile:
        raise UserError("--fit: compiles; leave out --no-compile")
    if flags.fit and not (flags.topology or flags.chip or flags.hbm):
        raise UserError("--fit: into how much? give --hbm=GIB, --chip or --topology")


if __name__ == "__main__":
    cli.run_main(PROGRAM, main)
