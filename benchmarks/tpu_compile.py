"""Memory and operations of a training step on TPUs, compiled ahead of time without any.

    python benchmarks/tpu_compile.py [--topology=v5p:2x2x2] [--preset=qwen1_5_7b] \\
        [--stage=stage2] [--seq=2048] [--batch=N] [--layers=N] [--remat=full] \\
        [--attention=auto] [--unrolled] [--loss-chunk=512] [--moments=float32] [--json=FILE]

Needs libtpu (`pip install 'jax[tpu]'`), not a TPU. The step is the program of `wings_jax.train`,
in bfloat16 with all chips in `fsdp`, by default with one row per chip. Prints gigabytes (GiB) per
chip as the compiler reports them: arguments, temporaries and the peak of both; and what a chip
sends in a step's collectives.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

# libtpu requests the machine's metadata unless these variables name its target.
TOPOLOGIES = {
    "v5p:2x2x2": {"TPU_ACCELERATOR_TYPE": "v5p-16"},
    "v5e:4x4": {"TPU_ACCELERATOR_TYPE": "v5litepod-16"},
    "v6e:2x4": {"TPU_ACCELERATOR_TYPE": "v6e-8"},
}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used
}

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # from a clone


def make_config(flags: argparse.Namespace, chips: int) -> Any:
    """Returns the validated config of a stage, in bfloat16."""
    from wings_jax import config as config_lib

    tree = importlib.import_module(f"configs.{flags.stage}").get_config(flags.preset)
    tree.remat, tree.attention = flags.remat, flags.attention
    tree.scan_layers = not flags.unrolled
    tree.loss_chunk = flags.loss_chunk
    tree.batch_size = flags.batch or chips
    tree.data.sequence_length = flags.seq
    tree.optimizer.moment_dtype = flags.moments
    tree.compute_dtype = tree.frozen_dtype = "bfloat16"
    tree.mesh.data, tree.mesh.fsdp, tree.mesh.tensor = 1, chips // flags.tensor, flags.tensor
    return config_lib.from_config_dict(tree)


def make_step(flags: argparse.Namespace, devices: Sequence[Any]) -> tuple[Any, Any, tuple]:
    """Returns the mesh of the devices, the jitted step and its arguments as shapes."""
    from wings_jax import axes
    from wings_jax.training import meshes, program
    from wings_jax.weights import starting

    config = make_config(flags, len(devices))
    arch = starting.resolve_arch(config.model)
    if flags.layers:
        decoder = dataclasses.replace(arch.decoder, num_layers=flags.layers)
        arch = dataclasses.replace(arch, decoder=decoder)

    mesh = axes.make_mesh(meshes.mesh_shape(config.mesh, arch, len(devices)), devices)
    state, optimizer = program.abstract_state(config, arch, mesh, steps=1000)
    batch = program.abstract_batch(config, arch, mesh)
    return mesh, program.jit_update(config, arch, optimizer, state), (state, batch)


def compile_step(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns the memory per chip in GiB and operations per chip of one training step."""
    import jax
    from jax.experimental import topologies

    from wings_jax.model.kernels import choice
    from wings_jax.planning import hlo

    devices = topologies.get_topology_desc(flags.topology, "tpu").devices
    mesh, update, shapes = make_step(flags, devices)
    started = time.perf_counter()
    with jax.set_mesh(mesh), choice.compiling_for(devices[0]):
        lowered = update.lower(*shapes)
        print(f"lowered in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        compiled = lowered.compile()

    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    collectives = hlo.list_collectives(compiled.as_text(), len(devices))
    gib = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "sent": sum(traffic.bytes for traffic in collectives),
    }
    return {
        **vars(flags),
        "chips": len(devices),
        "rows": shapes[1].targets.shape[0],
        **{f"{name}_gib": size / 2**30 for name, size in gib.items()},
        "tflop": (cost or {}).get("flops", float("nan")) / 1e12,
        "seconds": time.perf_counter() - started,
    }


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the step, which `gpu_compile.py` has too."""
    parser.add_argument("--preset", default="qwen1_5_7b")
    parser.add_argument("--stage", default="stage2")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=0, help="rows of all devices; one each")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--layers", type=int, default=0, help="of the LLM; all of them")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--unrolled", action="store_true", help="config.scan_layers=False")
    parser.add_argument("--loss-chunk", type=int, default=512)
    parser.add_argument("--moments", default="float32", help="dtype of the first moment")
    parser.add_argument("--json", default="", help="file for the result")


def print_row(
    flags: argparse.Namespace, device: str, row: dict[str, Any], columns: list[str]
) -> None:
    """Prints a table of one row, and writes it to the file of `--json`."""
    print("| devices | stage | preset | attention | remat | rows | " + " | ".join(columns) + " |")
    print("|---" * (6 + len(columns)) + "|")
    remat = flags.remat + ", unrolled" * flags.unrolled
    labels = (device, flags.stage, flags.preset, flags.attention, remat, row["rows"])
    print("| " + " | ".join([*map(str, labels), *(f"{row[x]:.2f}" for x in columns)]) + " |")
    if flags.json:
        pathlib.Path(flags.json).write_text(json.dumps(row, indent=1))


def main() -> None:
    """Prints one row of a Markdown table."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/tpu_compile.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--topology", default="v5p:2x2x2", choices=TOPOLOGIES)
    add_flags(parser)
    flags = parser.parse_args()

    os.environ.update({**ENVIRONMENT, **TOPOLOGIES[flags.topology]})
    row = compile_step(flags)
    columns = ["arguments_gib", "temporaries_gib", "peak_gib", "sent_gib", "tflop", "seconds"]
    print_row(flags, flags.topology, row, columns)


if __name__ == "__main__":
    main()
